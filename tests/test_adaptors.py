"""Views and the ready-made adaptor, on tiny transformers models made from their configurations.

The oracle of the ready-made adaptor is the models' own loss: computed again by explicit loops from the views' logits,
masks and labels it must come out the same, so masks and labels belong to the logits, shifts included.
"""

import math

import pytest
import torch
from torch import nn

from tests.conftest import make_config
from textbrewer import FEATURES, DistillationConfig, GeneralDistiller
from textbrewer.adaptors import ADAPTOR_KEYS, Views, auto_adaptor, auto_arguments, normalise, resolve

VOCABULARY, LENGTH = 40, 7


# ---- views -------------------------------------------------------------------------------------------------------


def test_views_read_as_the_adaptor_s_dict():
    logits = [torch.zeros(2, 3)]
    views = Views({"logits": logits}, projected={0: "p"}, captured={1: "c"})
    assert isinstance(views, dict)
    assert views["logits"] is logits
    assert "labels" not in views
    assert views.get("labels") is None
    assert (views.projected, views.captured) == ({0: "p"}, {1: "c"})
    assert (Views({}).projected, Views({}).captured) == ({}, {})


def test_normalise_makes_lists():
    tensor = torch.zeros(2, 3)
    views = normalise({"logits": tensor, "logits_mask": (tensor,), "losses": [tensor, tensor], "labels": tensor})
    assert {key: len(value) for key, value in views.items()} == {
        "logits": 1,
        "logits_mask": 1,
        "losses": 2,
        "labels": 1,
    }
    assert all(isinstance(value, list) and value[0] is tensor for value in views.values())


def test_normalise_leaves_layers_and_masks():
    hidden, stacked, mask = (torch.zeros(1), None), torch.zeros(3, 2, 4, 8), torch.ones(2, 4)
    views = normalise({"hidden": hidden, "attention": stacked, "inputs_mask": mask})
    assert views["hidden"] is hidden
    assert views["attention"] is stacked
    assert views["inputs_mask"] is mask


def test_normalise_leaves_out_what_is_none_or_empty():
    given = dict.fromkeys(ADAPTOR_KEYS)
    assert normalise(given) == {}
    assert normalise({"logits": [], "losses": (), "labels": []}) == {}
    assert given == dict.fromkeys(ADAPTOR_KEYS)  # the user's dict is left as it is


def test_normalise_does_not_change_the_user_s_lists():
    given = {"logits": [torch.zeros(2, 3)]}
    normalise(given)["logits"].append("more")
    assert len(given["logits"]) == 1


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        ([1], TypeError, r"^me must return a dict with keys of \['logits', .*got list"),
        ({"logit": 1}, KeyError, "returned by me: unknown key 'logit'; did you mean 'logits'"),
        ({"Hidden": 1}, KeyError, "did you mean 'hidden'"),
        ({"hidden_states": 1}, KeyError, "unknown key 'hidden_states'; did you mean 'hidden'"),
        ({"losses": 0.5}, TypeError, "^me: 'losses' must be a tensor or a list of tensors, got float"),
        ({"labels": [torch.zeros(1), None]}, TypeError, "^me: 'labels' must be .*got NoneType"),
        ({"attention": {1: torch.zeros(1)}}, TypeError, "^me: 'attention' must be a list of tensors, one a layer"),
    ],
)
def test_normalise_refuses(result, error, message):
    with pytest.raises(error, match=message):
        normalise(result, "me")


def test_features_of_the_user():
    FEATURES.append("gates")
    try:
        layers = [torch.zeros(1)]
        assert normalise({"gates": layers})["gates"] is layers
        with pytest.raises(KeyError, match="did you mean 'gates'"):
            normalise({"gate": layers})
    finally:
        FEATURES.remove("gates")


def test_resolve():
    assert resolve("auto", "adaptor_S") is auto_adaptor
    assert resolve(max, "adaptor_S") is max
    for wrong in ("automatic", None, 3):
        with pytest.raises(TypeError, match=r'adaptor_S must be a function .*or "auto", got'):
            resolve(wrong, "adaptor_S")


def test_auto_arguments():
    assert auto_arguments(auto_adaptor, set()) == {}
    assert auto_arguments(auto_adaptor, {"hidden"}) == {"output_hidden_states": True}
    assert auto_arguments(auto_adaptor, {"hidden", "attention", "values"}) == {
        "output_hidden_states": True,
        "output_attentions": True,
    }
    assert auto_arguments(max, {"hidden"}) == {}


# ---- transformers ------------------------------------------------------------------------------------------------

BERT = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES = {
    "Bert": {**BERT, "intermediate_size": 32, "max_position_embeddings": 16},
    "Llama": {**BERT, "intermediate_size": 32, "num_key_value_heads": 1, "max_position_embeddings": 16},
    "GPT2": {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16},
    "Bart": {
        "vocab_size": VOCABULARY,
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "max_position_embeddings": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
    },
    "T5": {
        "vocab_size": VOCABULARY,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_decoder_layers": 1,
        "num_heads": 2,
        "decoder_start_token_id": 0,
    },
}


def make_model(name, attention="eager", **settings):
    """A tiny model of a class of transformers, in eval mode."""
    transformers = pytest.importorskip("transformers")
    family = next(family for family in SIZES if name.startswith(family))
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES[family], **settings)
    config._attn_implementation = attention
    return getattr(transformers, name)(config).eval()


def draw(high, *size, seed=0):
    return torch.randint(3, high, size, generator=torch.Generator().manual_seed(seed))


MASK = (torch.arange(LENGTH) < torch.tensor([[7], [4], [5]])).long()
BY_TOKEN = draw(VOCABULARY, 3, LENGTH, seed=1).masked_fill(MASK == 0, -100)


def make_batch(**more):
    return {"input_ids": draw(VOCABULARY, 3, LENGTH), "attention_mask": MASK, **more}


def run(model, batch, **settings):
    with torch.no_grad():
        outputs = model(**batch, output_hidden_states=True, output_attentions=True, **settings)
    return outputs, normalise(auto_adaptor(batch, outputs))


def mean_cross_entropy(views):
    """The mean over the heads of the mean over the kept positions, by explicit loops."""
    means = []
    masks = views.get("logits_mask", [None] * len(views["logits"]))
    for logits, labels, mask in zip(views["logits"], views["labels"], masks, strict=True):
        rows = logits.flatten(0, -2).tolist()
        kept = labels.flatten() >= 0 if mask is None else mask.flatten()
        values = []
        for row, label, keep in zip(rows, labels.flatten().tolist(), kept.tolist(), strict=True):
            if keep:
                values.append(math.log(sum(math.exp(value) for value in row)) - row[label])
        means.append(sum(values) / len(values))
    return sum(means) / len(means)


MODELS = {
    "BertForSequenceClassification": torch.tensor([0, 2, 1]),
    "BertForTokenClassification": (BY_TOKEN % 3).masked_fill(MASK == 0, -100),
    "BertForMaskedLM": BY_TOKEN.masked_fill(torch.arange(LENGTH) % 2 == 0, -100),
    "BertLMHeadModel": BY_TOKEN,
    "GPT2LMHeadModel": BY_TOKEN,
    "GPT2ForSequenceClassification": torch.tensor([0, 2, 1]),
    "GPT2ForTokenClassification": (BY_TOKEN % 3).masked_fill(MASK == 0, -100),
    "LlamaForCausalLM": BY_TOKEN,
    "BartForConditionalGeneration": BY_TOKEN[:, :5].contiguous(),
    "BartForSequenceClassification": torch.tensor([0, 2, 1]),
    "T5ForConditionalGeneration": BY_TOKEN[:, :5].contiguous(),
}


def model_and_batch(name, labels=True):
    settings = {"num_labels": 3} if "Classification" in name else {}
    if name == "BertLMHeadModel":
        settings["is_decoder"] = True
    if name == "GPT2ForSequenceClassification":
        settings["pad_token_id"] = 0
    batch = make_batch(labels=MODELS[name]) if labels else make_batch()
    if name == "GPT2ForSequenceClassification":
        batch["input_ids"] = batch["input_ids"] * MASK
    if name == "BartForSequenceClassification":  # the last end-of-text token is what it classifies by
        batch["input_ids"] = batch["input_ids"].clone()
        batch["input_ids"][:, 3] = 2
    return make_model(name, **settings), batch


@pytest.mark.parametrize("name", MODELS)
def test_the_model_s_loss_from_the_views(name):
    model, batch = model_and_batch(name)
    outputs, views = run(model, batch)
    assert views["logits"][0] is outputs.logits
    assert len(views["losses"]) == 1
    assert views["losses"][0] is outputs.loss
    assert mean_cross_entropy(views) == pytest.approx(outputs.loss.item(), rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_features(name):
    model, batch = model_and_batch(name)
    outputs, views = run(model, batch)
    seq2seq = name.startswith(("Bart", "T5"))
    layers = 1 if seq2seq else 2
    assert len(views["hidden"]) == layers + 1
    assert len(views["attention"]) == layers
    length = views["hidden"][0].shape[1]
    assert views["attention"][0].shape == (3, 2, length, length)
    assert all(state.shape == (3, length, 16) for state in views["hidden"])
    expected = outputs.decoder_hidden_states if seq2seq else outputs.hidden_states
    assert views["hidden"] is expected
    assert views["inputs_mask"].shape == (3, length)


@pytest.mark.parametrize("name", ["BartForConditionalGeneration", "T5ForConditionalGeneration"])
def test_inputs_mask_of_seq2seq_is_that_of_its_decoder(name):
    model, batch = model_and_batch(name)
    _, views = run(model, batch)
    expected = [[label != -100 for label in row] for row in batch["labels"].tolist()]
    assert views["inputs_mask"].tolist() == expected
    assert views["logits_mask"][0].tolist() == expected


def test_two_heads_of_question_answering():
    model = make_model("BertForQuestionAnswering")
    beyond = {"start_positions": torch.tensor([1, 3, LENGTH]), "end_positions": torch.tensor([2, LENGTH + 4, 4])}
    batch = make_batch(**beyond)
    outputs, views = run(model, batch)
    assert views["logits"][0] is outputs.start_logits
    assert views["logits"][1] is outputs.end_logits
    assert [labels.tolist() for labels in views["labels"]] == [[1, 3, -100], [2, -100, 4]]
    assert mean_cross_entropy(views) == pytest.approx(outputs.loss.item(), rel=1e-5)
    assert "logits_mask" not in views
    assert views["inputs_mask"] is MASK
    assert len(views["hidden"]) == 3
    _, without = run(model, make_batch())
    assert "labels" not in without
    assert "losses" not in without


def test_question_answering_of_an_encoder_with_decoder():
    outputs, views = run(make_model("BartForQuestionAnswering"), make_batch())
    assert views["hidden"] is outputs.decoder_hidden_states
    assert len(views["logits"]) == 2


def next_kept(mask):
    """For each position, whether there is a next one and it is kept."""
    return [[column + 1 < len(row) and bool(row[column + 1]) for column in range(len(row))] for row in mask.tolist()]


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM", "BertLMHeadModel"])
def test_masks_of_causal_models(name):
    model, batch = model_and_batch(name)
    _, views = run(model, batch)
    assert views["logits_mask"][0].tolist() == next_kept(batch["labels"] != -100)
    for row, shifted in zip(batch["labels"].tolist(), views["labels"][0].tolist(), strict=True):
        assert shifted == [*row[1:], -100]
    model, batch = model_and_batch(name, labels=False)
    _, views = run(model, batch)
    assert views["logits_mask"][0].bool().tolist() == next_kept(MASK)
    assert "labels" not in views
    del batch["attention_mask"]
    _, views = run(model, batch)
    assert views["logits_mask"][0].bool().tolist() == next_kept(torch.ones_like(MASK))
    assert "inputs_mask" not in views


@pytest.mark.parametrize("name", ["BertForTokenClassification", "BertForMaskedLM"])
def test_masks_without_labels(name):
    model, batch = model_and_batch(name, labels=False)
    _, views = run(model, batch)
    assert views["logits_mask"][0] is MASK
    del batch["attention_mask"]
    _, views = run(model, batch)
    assert "logits_mask" not in views


def test_rows_have_no_logits_mask():
    model, batch = model_and_batch("BertForSequenceClassification")
    _, views = run(model, batch)
    assert "logits_mask" not in views
    assert views["labels"][0] is batch["labels"]


def test_base_models_have_features_only():
    batch = make_batch()
    outputs, views = run(make_model("BertModel"), batch)
    assert set(views) == {"hidden", "attention", "inputs_mask"}
    assert views["hidden"] is outputs.hidden_states


def test_what_auto_cannot_read():
    model, batch = model_and_batch("BertForSequenceClassification")
    for arguments in (
        (tuple(batch.values()), model(**batch)),
        (batch, model(**batch, return_dict=False)),
        (batch, torch.zeros(1)),
    ):
        with pytest.raises(TypeError, match=r'adaptor="auto" reads dict batches .*pass a function'):
            auto_adaptor(*arguments)


# ---- in training -------------------------------------------------------------------------------------------------


def distil(folder, teacher, student, batches, adaptor="auto", **config):
    seen = []

    class Watched(GeneralDistiller):
        def compute_loss(self, results_S, results_T):
            total, parts = super().compute_loss(results_S, results_T)
            seen.append({name: value.item() for name, value in parts.items()})
            return total, parts

    distiller = Watched(make_config(folder), DistillationConfig(**config), teacher, student, adaptor, adaptor)
    distiller.train(torch.optim.SGD(student.parameters(), lr=0.05), batches, num_epochs=1)
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_auto_trains(name, tmp_path):
    """KD and a hidden match by name alone; the first losses are compared with a loop over the model's outputs."""
    teacher, batch = model_and_batch(name)
    student = model_and_batch(name)[0]
    torch.manual_seed(1)
    for value in student.parameters():
        nn.init.normal_(value, std=0.1)
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    match = {"layer_T": 1, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 1}
    (_, views_S), (_, views_T) = run(student, batch), run(teacher, batch)
    seen = distil(tmp_path, teacher, student, [batch] * 2, temperature=1, intermediate_matches=[match])
    mask = views_S["inputs_mask"].bool()
    squares = (views_S["hidden"][1] - views_T["hidden"][1])[mask].square()
    assert seen[0]["unweighted_hidden_hidden_mse_1_1"] == pytest.approx(squares.mean().item(), rel=1e-4)
    kept = views_S["logits_mask"][0].bool() if "logits_mask" in views_S else slice(None)
    logits_S, logits_T = views_S["logits"][0][kept], views_T["logits"][0][kept]
    expected = -(logits_T.softmax(-1) * logits_S.log_softmax(-1)).sum(-1).mean().item()
    assert seen[0]["unweighted_kd_loss"] == pytest.approx(expected, rel=1e-4)


def test_sdpa_attention_says_how_to_get_it(tmp_path):
    batch = make_batch(labels=torch.tensor([0, 1, 0]))
    teacher, student = (make_model("BertForSequenceClassification", attention="sdpa") for _ in range(2))
    match = {"layer_T": 1, "layer_S": 1, "feature": "attention", "loss": "attention_mse", "weight": 1}
    with pytest.raises(KeyError, match="attn_implementation='eager'"):
        distil(tmp_path, teacher, student, [batch], intermediate_matches=[match])
    teacher, student = (make_model("BertForSequenceClassification") for _ in range(2))
    assert (
        "unweighted_attention_attention_mse_1_1"
        in distil(tmp_path, teacher, student, [batch], intermediate_matches=[match])[0]
    )
