"""LoRA students: what trains, in distillers and after a resume; merging; adapters alone on a fresh model; bad input."""

import copy
import json
import sys

import pytest
import torch
from torch import nn

from tests.conftest import Encoder, adaptor, make_config, make_loader, seed_all
from textbrewer import DistillationConfig, GeneralDistiller
from textbrewer.compression import factorize_, load_adapter, lora_, merge_lora, save_adapter

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

MATCHES = [{"layer_T": 2, "layer_S": 2, "feature": "hidden", "loss": "hidden_mse", "weight": 1}]


def bert(seed=0, dropout=0.0):
    seed_all(seed)
    return transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=3,
        max_position_embeddings=16, hidden_dropout_prob=dropout, attention_probs_dropout_prob=0.0,
    )).eval()  # fmt: skip


def gpt2(seed=0):
    seed_all(seed)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=40, n_embd=32, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )).eval()  # fmt: skip


def draw_(model, scale=0.1):
    """Give the additions weights other than zero."""
    seed_all(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=scale)
    return model


def tokens():
    seed_all(3)
    return {"input_ids": torch.randint(0, 40, (3, 8))}


def logits(model):
    with torch.no_grad():
        return model.eval()(**tokens())["logits"]


def own_batch():
    return next(iter(make_loader()))


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def distil(student, teacher, folder, views="auto", epochs=4, resume_from=None, lr=1e-2, **training):
    distiller = GeneralDistiller(
        make_config(folder, **training), DistillationConfig(temperature=2, intermediate_matches=MATCHES),
        teacher, student, views, views,
    )  # fmt: skip
    optimizer = torch.optim.AdamW([item for item in student.parameters() if item.requires_grad], lr=lr)
    seed_all(11)
    with distiller:
        distiller.train(optimizer, make_loader(24, 8), num_epochs=epochs, resume_from=resume_from)


# ---- what is added -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (
            bert,
            {"query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense", "pooler.dense"},
        ),
        (gpt2, {"c_attn", "c_proj", "c_fc"}),
        (Encoder, {"query", "key", "value", "feed.0"}),
    ],
    ids=["bert", "gpt2", "own module"],
)
def test_auto_takes_all_maps_but_heads_and_changes_no_output(make, names):
    model = make()
    batch = own_batch() if make is Encoder else tokens()
    before = model.eval()(**batch)["logits"].detach()
    weights = sum(parameter.numel() for parameter in model.parameters())
    widths = {name: module.weight.shape for name, module in model.named_modules()
              if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"}  # fmt: skip
    adapted = lora_(model, rank=4)
    torch.testing.assert_close(adapted.eval()(**batch)["logits"], before, rtol=0, atol=0)
    reached = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in trainable(adapted)}
    assert all(any(name.endswith(end) for end in names) for name in reached)
    assert all(any(name.endswith(end) for name in reached) for end in names)
    added = sum(4 * sum(widths[name]) for name in reached)
    assert sum(parameter.numel() for parameter in adapted.parameters()) == weights + added


def test_the_addition_is_the_papers_formula():
    model = Encoder()
    weight = model.layers[0].query.weight.detach().clone()
    adapted = draw_(lora_(model, rank=3, alpha=12, targets=["layers.0.query"]))
    layer, states = adapted.base_model.model.layers[0].query, torch.randn(2, 32)
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert down.shape == (3, 32)
    assert up.shape == (32, 3)
    expected = states @ (weight + 12 / 3 * up @ down).T + layer.base_layer.bias
    torch.testing.assert_close(layer(states), expected)


@pytest.mark.parametrize(
    ("targets", "count"),
    [(["query", "value"], 4), (["attention.self"], 0), (["*.layer.1.*"], 6), (["bert.pooler.dense"], 1)],
    ids=str,
)
def test_targets_by_name_last_part_and_pattern(targets, count):
    if not count:
        with pytest.raises(ValueError, match=r"targets must name linear maps.*'attention.self'; known: classifier, de"):
            lora_(bert(), targets=targets)
    else:
        assert len(trainable(lora_(bert(), targets=targets))) == 2 * count


def test_a_low_rank_student_takes_additions_too():
    model = bert()
    factorize_(model, [tokens()], ratio=0.5)
    before = logits(model)
    adapted = draw_(lora_(model, rank=2))
    assert any(".query.up.lora_A" in name for name in trainable(adapted))
    after = logits(adapted)
    assert not torch.allclose(after, before, atol=1e-3)
    torch.testing.assert_close(logits(merge_lora(adapted)), after, rtol=0, atol=1e-6)


# ---- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True], ids=["auto", "own module"])
def test_only_the_additions_train_and_a_copy_teaches(tmp_path, own):
    teacher = Encoder(dropout=0.0) if own else bert()
    start = copy.deepcopy(teacher)
    for name, parameter in start.named_parameters():
        if "query" in name or "dense" in name:  # the student is the teacher, damaged
            parameter.data += 0.1 * torch.randn_like(parameter)
    student = lora_(start, rank=8)
    frozen = {name: value.clone() for name, value in student.state_dict().items() if "lora_" not in name}
    taught = copy.deepcopy(teacher.state_dict())
    batch = own_batch()

    def distance():
        with torch.no_grad():
            return float((student.eval()(**batch)["logits"] - teacher.eval()(**batch)["logits"]).square().mean())

    before = distance()
    distil(student, teacher, tmp_path / "out", adaptor if own else "auto", epochs=20)
    assert distance() < 0.3 * before
    after = student.state_dict()
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert all("lora_" in name for name in trainable(student))
    assert all(float(after[name].abs().max()) > 0 for name in after if "lora_B" in name)
    assert all(torch.equal(teacher.state_dict()[name], value) for name, value in taught.items())


def test_resuming_goes_on_as_if_it_had_never_stopped(tmp_path):
    def fresh(seed):
        model = bert(1, dropout=0.1)
        seed_all(seed)  # other additions at the start: the checkpoint's count
        return lora_(model, rank=4, dropout=0.2)

    teacher, whole, half, resumed = bert(), fresh(0), fresh(0), fresh(5)
    settings = {"ckpt_epoch_frequency": 1}
    distil(whole, teacher, tmp_path / "whole", epochs=4, **settings)
    distil(half, teacher, tmp_path / "half", epochs=2, **settings)
    distil(resumed, teacher, tmp_path / "half", epochs=4, resume_from="latest", **settings)
    one, other = whole.state_dict(), resumed.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=0, atol=0, msg=name)
    last = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.default.weight"
    assert not torch.equal(one[last], half.state_dict()[last])


def test_a_head_can_be_trained_whole(tmp_path):
    model = bert()
    adapted = lora_(model, rank=2, targets=["query"], also_train=["classifier"])
    assert {name.rpartition("default")[2] for name in trainable(adapted) if "lora_" not in name} == {".weight", ".bias"}
    distil(adapted, bert(1), tmp_path / "out")
    save_adapter(adapted, tmp_path / "adapter")
    before = logits(adapted)
    torch.testing.assert_close(logits(load_adapter(bert(), tmp_path / "adapter")), before, rtol=0, atol=0)
    merged = merge_lora(adapted)
    torch.testing.assert_close(logits(merged), before, rtol=0, atol=1e-6)
    assert not torch.equal(merged.classifier.weight, bert().classifier.weight)
    assert merged.state_dict().keys() == bert().state_dict().keys()


# ---- merging and saving ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [bert, gpt2])
def test_merged_is_adapted_and_plain(make):
    adapted = draw_(lora_(make()))
    before = logits(adapted)
    merged = merge_lora(adapted)
    torch.testing.assert_close(logits(merged), before, rtol=0, atol=1e-6)
    assert not torch.allclose(before, logits(make()), atol=1e-3)
    plain = make()
    assert type(merged) is type(plain)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert all(parameter.requires_grad for parameter in merged.parameters())
    fresh = make(1)
    fresh.load_state_dict(merged.state_dict())
    torch.testing.assert_close(logits(fresh), logits(merged), rtol=0, atol=0)


@pytest.mark.parametrize("make", [bert, gpt2])
@pytest.mark.parametrize("again", [False, True], ids=["trainable", "frozen"])
def test_an_adapter_alone_loads_on_a_fresh_model(tmp_path, make, again):
    adapted = draw_(lora_(make(), rank=4, alpha=12))
    before = logits(adapted)
    save_adapter(lora_(make(1)), tmp_path / "adapter")  # which is replaced
    save_adapter(adapted, tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    added = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 4 * added + 200 * len(
        trainable(adapted)
    )
    loaded = load_adapter(make(), tmp_path / "adapter", trainable=again)
    torch.testing.assert_close(logits(loaded), before, rtol=0, atol=0)
    assert trainable(loaded) == (trainable(adapted) if again else set())
    assert trainable(adapted)
    reference = peft.PeftModel.from_pretrained(make(), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(reference), before, rtol=0, atol=0)


# ---- bad input ---------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head, self.other_head = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)
        self.embedding, self.output = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.output.weight = self.embedding.weight


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"rank": 1.5}, ValueError, "rank must be a whole number"),
        ({"alpha": 0}, ValueError, "alpha must be greater than 0"),
        ({"dropout": 1.0}, ValueError, "dropout must be less than 1"),
        ({"targets": "body"}, TypeError, "targets must be 'auto' or a list of names"),
        ({"targets": []}, ValueError, "targets must name at least one linear map"),
        ({"targets": ["bodies"]}, ValueError, "got 'bodies'; known: body, head"),
        ({"targets": ["output"]}, ValueError, "'output': its weight is shared by embedding.weight and output.weight"),
        ({"targets": ["body"], "also_train": ["tail"]}, KeyError, "has no module 'tail'"),
        ({"targets": ["body"], "also_train": ["head"]}, ValueError, "means 'other_head' too"),
        ({"targets": ["body"], "also_train": ["body"]}, ValueError, "'body' must be no target"),
        ({"targets": ["body"], "also_train": ["output"]}, ValueError, "'output' must not share weights"),
        ({"also_train": "head"}, TypeError, "also_train must be a list"),
    ],
    ids=str,
)
def test_bad_arguments_leave_the_model_untouched(options, error, message):
    model = Heads()
    modules = list(model.modules())
    with pytest.raises(error, match=message):
        lora_(model, **options)
    assert list(model.modules()) == modules
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_without_maps():
    with pytest.raises(ValueError, match="model must have linear maps beside its output heads, got none"):
        lora_(nn.Sequential(nn.Linear(4, 2)))


def test_additions_are_not_added_twice_nor_factorised():
    adapted = lora_(bert())
    for action in (lora_, lambda model: load_adapter(model, "anywhere")):
        with pytest.raises(ValueError, match="must have no adapters of peft yet"):
            action(adapted)
    with pytest.raises(ValueError, match="must have no adapters of peft inside; merge them first"):
        factorize_(adapted, ratio=0.5, method="svd")


@pytest.mark.parametrize("action", [merge_lora, lambda model: save_adapter(model, "anywhere")])
def test_a_plain_model_has_nothing_to_merge_or_save(action):
    with pytest.raises(TypeError, match="model must be a model with additions, of lora_ or load_adapter"):
        action(bert())


def test_merging_refuses_additions_that_are_not_finite():
    adapted = draw_(lora_(bert()))
    next(parameter for name, parameter in adapted.named_parameters() if "lora_B" in name).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        merge_lora(adapted)


def wider(model):
    model.bert.encoder.layer[1].output.dense = nn.Linear(64, 48)
    return model


@pytest.mark.parametrize("other", [gpt2, Encoder, lambda: wider(bert())], ids=["gpt2", "own", "wider"])
def test_an_adapter_of_another_model_changes_nothing(tmp_path, other):
    save_adapter(lora_(bert()), tmp_path / "adapter")
    model = other()
    modules = list(model.modules())
    with pytest.raises(ValueError, match=r"must be one of this model, got 'bert\.encoder\.layer"):
        load_adapter(model, tmp_path / "adapter")
    assert list(model.modules()) == modules


@pytest.mark.parametrize("damage", ["missing", "config", "weights", "kind"])
def test_a_folder_that_holds_no_adapter(tmp_path, damage):
    folder = tmp_path / "adapter"
    save_adapter(lora_(bert()), folder)
    config = folder / "adapter_config.json"
    if damage == "missing":
        folder = tmp_path / "elsewhere"
    elif damage == "config":
        config.write_text("{", encoding="utf-8")
    elif damage == "weights":
        (folder / "adapter_model.safetensors").write_bytes(b"\x10")
    else:
        config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": "IA3"}), encoding="utf-8")
    message = "with one of type 'IA3'" if damage == "kind" else "must be a folder written by save_adapter"
    with pytest.raises(ValueError, match=message):
        load_adapter(bert(), folder)


def test_a_failed_save_leaves_the_old_files(tmp_path, monkeypatch):
    adapted = lora_(bert())
    save_adapter(adapted, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(folder, **options):
        (tmp_path / folder).mkdir()
        raise OSError("the disk is full")

    monkeypatch.setattr(adapted, "save_pretrained", fail)
    with pytest.raises(OSError, match="the disk is full"):
        save_adapter(draw_(adapted), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_without_peft_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"LoRA needs peft: pip install 'textbrewer\[lora\]'"):
        lora_(bert())
