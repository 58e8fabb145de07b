"""Queries, keys, values and scores heard inside the models: the same training however the teacher is run."""

import pytest
import torch
from torch import nn

from tests.conftest import CLASSES, VOCABULARY, adaptor, make_loader
from tests.teacher_cache.jobs import SAME, Job, Varied, apart, cache_at
from textbrewer import GeneralDistiller
from textbrewer.adaptors import auto_adaptor
from textbrewer.distillers.inner_features import InnerFeatures
from textbrewer.hooks import attention_modules, attention_scores, capture_qkv

transformers = pytest.importorskip("transformers")

RELATION = {
    "layer_T": -1, "layer_S": -1, "feature": "value", "loss": ["relation_kl", {"heads": 4}], "weight": 3.0,
}  # fmt: skip
ATTENTION = {"layer_T": 1, "layer_S": 1, "feature": "scores", "loss": "attention_kl", "weight": 2.0}
MATCHES = [RELATION, {**RELATION, "feature": "query", "layer_T": 0}, {**RELATION, "feature": "key"}, ATTENTION]


def bert(layers, width, seed, **settings):
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=width, max_position_embeddings=32, num_labels=CLASSES, **settings,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.BertForSequenceClassification(config)


def job(folder, cache=None, matches=MATCHES, config=None, **options):
    teachers = options.pop("teachers", None) or [bert(3, 24, 1)]
    student = options.pop("student", None) or bert(2, 16, 2)
    config = {"intermediate_matches": matches, **(config or {})}
    options = {"adaptor_T": "auto", "adaptor_S": "auto", **options}
    return Job(folder, options.pop("kind", "GeneralDistiller"), cache, teachers, student, config=config, **options)


def by_hand(model):
    """An adaptor that captures everything itself, for as long as the model lives."""
    inner = capture_qkv(model, attention_modules(model)).attach()

    def views(batch, outputs):
        captured = inner.views()
        scores = [attention_scores(*pair) for pair in zip(captured["query"], captured["key"], strict=True)]
        return {**auto_adaptor(batch, outputs), **captured, "scores": scores}

    return views


def hooks_of(model):
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def test_is_the_training_of_adaptors_that_capture_by_hand(tmp_path):
    auto = job(tmp_path / "auto").train(Varied().loader())
    teacher, student = bert(3, 24, 1), bert(2, 16, 2)
    hand = job(
        tmp_path / "hand", teachers=[teacher], student=student, adaptor_T=by_hand(teacher), adaptor_S=by_hand(student)
    ).train(Varied().loader())
    assert torch.equal(auto.end, hand.end)
    without = job(tmp_path / "without", matches=[]).train(Varied().loader())
    assert apart(auto, without) > 100 * SAME


def test_nothing_is_left_in_the_models(tmp_path):
    found = job(tmp_path)
    models = [found.student, *found.teachers]
    before = [hooks_of(model) for model in models]
    found.train(make_loader(8, 4))
    assert [hooks_of(model) for model in models] == before
    assert "value" not in found.student(input_ids=torch.ones(1, 3, dtype=torch.long))

    def stop(model, step):
        raise ZeroDivisionError

    with pytest.warns(UserWarning, match="earlier run"), pytest.raises(ZeroDivisionError):
        found.train(make_loader(8, 4), callback=stop)
    assert [hooks_of(model) for model in models] == before


@pytest.mark.parametrize("matches", [[RELATION], [ATTENTION], MATCHES], ids=["value", "scores", "all"])
def test_a_teacher_cache_gives_the_same_student(matches, tmp_path):
    """Rows of different lengths, in other batches too; the teacher is run once for each."""
    data = Varied()
    plain = job(tmp_path / "plain", matches=matches).train(data.loader())
    first = job(tmp_path / "first", cache_at(tmp_path), matches=matches).train(data.loader())
    again = job(tmp_path / "again", cache_at(tmp_path), matches=matches).train(data.loader())
    assert apart(first, plain) < SAME
    assert torch.equal(again.end, first.end)
    assert (first.rows, again.rows) == (24, 0)
    plain = job(tmp_path / "other plain", matches=matches).train(data.loader(7))
    other = job(tmp_path / "other", cache_at(tmp_path), matches=matches).train(data.loader(7))
    assert apart(other, plain) < SAME
    assert other.rows == 0


def test_what_is_stored_has_no_padding_and_only_the_layers_named(tmp_path, caplog):
    caplog.set_level("INFO", logger="textbrewer")
    job(tmp_path, cache_at(tmp_path), config={"kd_loss_weight": 0}).train(Varied().loader(), num_steps=2)
    (line,) = [item.getMessage() for item in caplog.records if "stores" in item.getMessage()]
    stored = line.partition("stores ")[2].partition(" as float32")[0]
    assert set(stored.split("; ")) == {"value 2", "query 0", "key 2", "scores 1"}
    assert "padding" not in line


def test_precomputed_rows_need_no_teacher(tmp_path):
    import textbrewer

    data = Varied()
    plain = job(tmp_path / "plain").train(data.loader())
    settings = plain.distiller.d_config
    textbrewer.precompute(bert(3, 24, 1), data.loader(), "auto", cache_at(tmp_path), settings)
    alone = job(tmp_path / "alone", cache_at(tmp_path), teachers=[None]).train(data.loader())
    assert apart(alone, plain) < SAME


def test_remembered_teachers_give_the_same_student(tmp_path):
    caching = {"is_caching_logits": True}
    found = job(tmp_path / "found", config=caching).train(Varied().loader())
    teacher, student = bert(3, 24, 1), bert(2, 16, 2)
    hand = job(
        tmp_path / "hand", teachers=[teacher], student=student, config=caching,
        adaptor_T=by_hand(teacher), adaptor_S=by_hand(student),
    ).train(Varied().loader())  # fmt: skip
    assert torch.equal(found.end, hand.end)
    assert found.rows == 24


@pytest.mark.parametrize(
    ("match", "blocks"),
    [
        ({**ATTENTION, "layer_T": 0}, 1),
        ({**RELATION, "layer_T": 1, "loss": "relation_kl"}, 2),
        ({**RELATION, "loss": "relation_kl"}, 3),
    ],
)
def test_a_teacher_stops_after_the_block_that_is_read(match, blocks, tmp_path):
    """Without logits it runs only so far, from the third batch on, and the student is the same."""
    results = []
    for stops in (True, False):
        teacher = bert(4, 24, 1) if blocks < 3 else bert(3, 24, 1)
        if not stops:
            # Two stacks of one length: it is not known which of them to shorten.
            teacher.other = nn.ModuleList(nn.Linear(1, 1) for _ in teacher.bert.encoder.layer)
        runs = [0] * len(teacher.bert.encoder.layer)
        for number, block in enumerate(teacher.bert.encoder.layer):
            block.register_forward_pre_hook(lambda module, inputs, n=number: runs.__setitem__(n, runs[n] + 1))
        results.append(
            job(tmp_path / str(stops), teachers=[teacher], matches=[match], config={"kd_loss_weight": 0}).train(
                Varied().loader()
            )
        )
        if stops and blocks < 3:
            assert runs[blocks - 1] > 17
            assert runs[blocks] <= 4
        else:
            assert runs[-1] >= 18
    assert torch.equal(results[0].end, results[1].end)


def test_a_run_goes_on_where_it_stopped(tmp_path):
    whole = job(tmp_path / "whole").train(Varied().loader(shuffle=False), num_steps=12)
    options = {"training": {"ckpt_steps": 6}}
    half = job(tmp_path / "half", **options)

    def stop(model, step):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half.train(Varied().loader(shuffle=False), num_steps=12, callback=stop)
    rest = job(tmp_path / "half", **options)
    rest.train(Varied().loader(shuffle=False), num_steps=12, resume_from="latest")
    assert torch.equal(rest.end, whole.end)


@pytest.mark.parametrize("kind", ["MultiTeacherDistiller", "MultiTaskDistiller"])
def test_several_teachers(kind, tmp_path):
    """Each is heard on its own; a match names the second."""
    matches = [RELATION] if kind == "MultiTaskDistiller" else [RELATION, {**ATTENTION, "teacher": 1}]
    results = []
    for hand in (False, True):
        teachers, student = [bert(3, 24, 1), bert(2, 16, 3)], bert(2, 16, 2)
        options = {}
        if hand:
            own = [by_hand(teacher) for teacher in teachers]
            adaptors = dict(zip("ab", own, strict=True)) if kind == "MultiTaskDistiller" else own
            options = {"adaptor_T": adaptors, "adaptor_S": by_hand(student)}
        results.append(
            job(tmp_path / str(hand), kind=kind, teachers=teachers, student=student, matches=matches, **options).train(
                Varied().loader()
            )
        )
    assert torch.equal(results[0].end, results[1].end)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_teacher_of_another_precision_gives_nearly_the_same(precision, tmp_path):
    plain = job(tmp_path / "plain").train(Varied().loader())
    rounded = job(tmp_path / "rounded", training={"teacher_precision": precision}).train(Varied().loader())
    assert 0 < apart(rounded, plain) < 0.05


def test_a_projection_whose_widths_are_read_from_a_batch(tmp_path):
    """Values brought to the teacher's head width, which the configurations do not tell."""
    match = {"layer_T": 0, "layer_S": 0, "feature": "value", "loss": "hidden_mse", "weight": 1.0, "proj": "linear"}
    found = job(tmp_path, matches=[{**match, "loss": "relation_kl"}]).train(Varied().loader())
    assert found.distiller.projections[0].weight.shape == (12, 8)


@pytest.mark.parametrize("stacked", [True, False])
def test_matches_of_one_kind_computed_together(stacked, tmp_path):
    matches = [{**ATTENTION, "layer_T": 0, "layer_S": 0}, ATTENTION]
    found = job(tmp_path / "a", matches=matches, training={"stack_matches": stacked}).train(Varied().loader())
    plain = job(tmp_path / "b", matches=matches).train(Varied().loader())
    assert apart(found, plain) < SAME


# ---- what is heard


def heard(model, layers, **inputs):
    with InnerFeatures(model, layers).attached(), torch.no_grad():
        return model(**inputs)


IDS = torch.randint(1, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_scores_give_the_models_own_attention(implementation):
    model = bert(3, 16, 1, attn_implementation=implementation).eval()
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    outputs = heard(model, {"scores": [0, 1, 2]}, input_ids=IDS, attention_mask=mask)
    eager = bert(3, 16, 1, attn_implementation="eager").eval()
    expected = eager(IDS, attention_mask=mask, output_attentions=True).attentions
    for scores, maps in zip(outputs["scores"], expected, strict=True):
        own = scores.masked_fill(mask[:, None, None, :] == 0, -torch.inf).softmax(dim=-1)
        torch.testing.assert_close(own, maps, atol=1e-6, rtol=0)


def test_only_what_is_asked_for_is_there():
    model = bert(4, 16, 1).eval()
    outputs = heard(model, {"scores": [1], "value": [-1, 0]}, input_ids=IDS)
    assert [item is None for item in outputs["scores"]] == [True, False, True, True]
    assert [item is None for item in outputs["value"]] == [False, True, True, False]
    assert "query" not in outputs
    views = auto_adaptor({"input_ids": IDS}, outputs)
    assert views["value"] is outputs["value"]
    assert "key" not in views


def test_blocks_that_share_one_module_are_told_apart_by_their_order():
    config = transformers.AlbertConfig(
        vocab_size=VOCABULARY, hidden_size=16, embedding_size=8, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=16, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AlbertModel(config).eval()
    outputs = heard(model, {"scores": [0, -1]}, input_ids=IDS, output_attentions=True)
    assert [item is None for item in outputs["scores"]] == [False, True, False]
    for layer in (0, 2):
        torch.testing.assert_close(outputs["scores"][layer].softmax(-1), outputs.attentions[layer], atol=1e-6, rtol=0)


def test_several_shared_modules_are_refused():
    config = transformers.AlbertConfig(
        vocab_size=VOCABULARY, hidden_size=16, embedding_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, inner_group_num=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"runs .* several times in a forward pass.*capture_qkv"):
        heard(transformers.AlbertModel(config), {"value": [0]}, input_ids=IDS)


def test_scores_are_not_rounded_by_autocast():
    model = bert(2, 16, 1).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = heard(model, {"scores": [1], "query": [1], "key": [1]}, input_ids=IDS)
    assert outputs["query"][1].dtype == torch.bfloat16
    expected = attention_scores(outputs["query"][1].double(), outputs["key"][1].double())
    assert outputs["scores"][1].dtype == torch.float32
    torch.testing.assert_close(outputs["scores"][1].double(), expected, rtol=1e-5, atol=1e-6)


# ---- what is refused


def test_a_layer_that_is_not_there_is_named(tmp_path):
    with pytest.raises(IndexError, match="layer_T=7 is out of range: 'value' of the teacher has 3 entries"):
        job(tmp_path, matches=[{**RELATION, "layer_T": 7}]).train(Varied().loader())


def test_an_adaptor_of_ones_own_returns_them_itself(tmp_path):
    with pytest.raises(KeyError, match="needs 'value' of the teacher"):
        job(tmp_path, adaptor_T=lambda batch, outputs: {"logits": outputs.logits}).train(Varied().loader())


@pytest.mark.parametrize("wanted", [True, "teacher", "student"])
def test_compiled_models_are_refused(wanted, tmp_path):
    who = "student" if wanted == "student" else "teacher"
    with pytest.raises(ValueError, match=f"matches of .*value exclude each other.*inside the {who}.*compile=False"):
        job(tmp_path, training={"compile": wanted}).train(Varied().loader())


def test_copies_on_several_gpus_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data_parallel=True and matches of .* exclude each other"):
        job(tmp_path, training={"data_parallel": True}).train(Varied().loader())


def test_a_model_whose_attention_is_not_found(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)

    with pytest.raises(ValueError, match="self-attention modules of Odd cannot be found"):
        job(tmp_path, teachers=[Odd()]).train(Varied().loader())


def test_a_side_whose_adaptor_is_ones_own_is_let_alone(tmp_path):
    """The library's tiny encoder has query, key and value, but its adaptor returns none."""
    found = Job(tmp_path, GeneralDistiller, adaptor_T=adaptor, adaptor_S=adaptor).train(make_loader(8, 4))
    assert all(count == 0 for count in hooks_of(found.student))
