"""Settings of each task: weights, given or learned, a configuration and a callback of its own."""

import numpy as np
import pytest
import torch

from tests.conftest import Encoder, adaptor, make_config, seed_all
from tests.distillers.setups import batches, make_student, make_teacher
from tests.distillers.test_multi_task import drawn_in, make, train
from tests.engine.test_tracking import scalars
from textbrewer import DistillationConfig, GeneralDistiller, MultiTaskDistiller, precompute
from textbrewer.registry import KD_LOSS_MAP

# ---- weights -----------------------------------------------------------------------------------------------------


def totals(distiller, loaders, num_steps=8, **arguments):
    """Each step's task, total loss and logs."""
    seen, step = [], distiller.step

    def watched(module, batch, progress, share):
        loss, logs = step(module, batch, progress, share)
        seen.append((batch.task, loss.item(), {name: value.item() for name, value in logs.items()}))
        return loss, logs

    distiller.step = watched
    np.random.seed(3)
    train(distiller, loaders, num_steps, **arguments)
    return seen


@pytest.mark.parametrize("weights", [{"a": 2.0, "b": 0.5}, {"b": 3.0}, {}], ids=str)
def test_weights_of_tasks(weights, tmp_path):
    """A task's loss is multiplied by its weight, 1 without; what is logged is not."""
    teachers = {task: make_teacher(seed) for seed, task in enumerate("ab", 1)}
    distiller = MultiTaskDistiller(
        make_config(tmp_path), DistillationConfig(), teachers, make_student(dropout=0.0), dict.fromkeys("ab", adaptor),
        dict.fromkeys("ab", adaptor), task_weights=weights,
    )  # fmt: skip
    seen = totals(distiller, dict.fromkeys("ab", batches()))
    assert {task for task, *_ in seen} == {"a", "b"}
    for task, total, logs in seen:
        assert total == pytest.approx(weights.get(task, 1.0) * logs["unweighted_kd_loss"])
        assert logs[f"{task}/unweighted_kd_loss"] == logs["unweighted_kd_loss"]
        assert f"{task}/log_variance" not in logs


def test_learned_weights_of_tasks(tmp_path):
    """exp(-a) L + a / 2, with a log-variance a task: logged, and moved by the gradient 1/2 - exp(-a) L."""
    teachers = {task: make_teacher(seed) for seed, task in enumerate("ab", 1)}
    distiller = MultiTaskDistiller(
        make_config(tmp_path), DistillationConfig(), teachers, make_student(dropout=0.0), dict.fromkeys("ab", adaptor),
        dict.fromkeys("ab", adaptor), task_weights=["uncertainty", {"lr": 0.5}],
    )  # fmt: skip
    seen = totals(distiller, dict.fromkeys("ab", batches()), 12)
    learned = {"a": 0.0, "b": 0.0}
    for task, total, logs in seen:
        loss, value = logs["unweighted_kd_loss"], learned[task]
        assert logs[f"{task}/log_variance"] == pytest.approx(value, abs=1e-5)
        assert total == pytest.approx(np.exp(-value) * loss + value / 2, rel=1e-5)
        learned[task] = value - 0.5 * (0.5 - np.exp(-value) * loss)
    assert all(abs(value) > 0.1 for value in learned.values())
    assert distiller.learner.log_variance.tolist() == pytest.approx(list(learned.values()), rel=1e-4)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ({"c": 1}, KeyError, "task_weights: unknown key 'c'"),
        ({"a": -1}, ValueError, r"task_weights\['a'\] must be at least 0, got -1"),
        ({"a": "1"}, TypeError, r"task_weights\['a'\] must be a number"),
        ("uncertain", KeyError, "unknown task_weights 'uncertain'; did you mean 'uncertainty'"),
        (["uncertainty", {"rate": 1}], ValueError, "has no constant 'rate'; known: lr"),
        (3, TypeError, "a task_weights must be a name"),
    ],
    ids=str,
)
def test_wrong_weights(weights, error, message, tmp_path):
    adaptors = dict.fromkeys("ab", adaptor)
    with pytest.raises(error, match=message):
        MultiTaskDistiller(make_config(tmp_path), DistillationConfig(), dict.fromkeys("ab", make_teacher()),
                           make_student(), adaptors, adaptors, task_weights=weights)  # fmt: skip


# ---- a configuration for each task -------------------------------------------------------------------------------

HIDDEN = {
    "layer_T": 2,
    "layer_S": 1,
    "feature": "hidden",
    "loss": "hidden_mse",
    "weight": 2,
    "proj": ["linear", 32, 48],
}
OTHER = {"layer_T": 1, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 1, "proj": "linear"}


def of_two(folder, config, student=None, teachers=None, **options):
    teachers = teachers or {"a": make_teacher(1), "b": Encoder(layers=1, width=16, seed=3)}
    adaptors = dict.fromkeys("ab", adaptor)
    seed_all(0)
    student = student or make_student(dropout=0.0)
    training = options.pop("training", {})
    return MultiTaskDistiller(make_config(folder, **training), config, teachers, student, adaptors, adaptors, **options)


def configs(**shared):
    return {
        "a": DistillationConfig(temperature=2, intermediate_matches=[HIDDEN], **shared),
        "b": DistillationConfig(temperature=8, kd_loss_type="mse", kd_loss_weight=0.5, hard_label_weight=1,
                                intermediate_matches=[OTHER, {**HIDDEN, "layer_T": 1, "proj": ["tanh", 32, 16]}],
                                **shared),
    }  # fmt: skip


def test_each_task_has_its_own_configuration(tmp_path):
    """Its terms, KD loss, temperature and weights; by what the losses of both sides' outputs are before training."""
    names = {
        "a": {"kd_loss", "hard_label_loss", "hidden_hidden_mse_1_2"},
        "b": {"kd_loss", "hard_label_loss", "hidden_hidden_mse_1_1", "hidden_hidden_mse_1_1_2"},
    }
    (batch,) = batches(4)
    first = {}
    for seed in range(6):
        distiller = of_two(tmp_path / str(seed), configs())
        np.random.seed(seed)
        ((task, logs),) = first_step(distiller, {"a": [batch], "b": [batch]})
        first[task] = distiller, logs
    assert set(first) == {"a", "b"}
    for task, (distiller, logs) in first.items():
        config, teacher = configs()[task], distiller.model_T[task]
        assert {name for name in logs if "/" not in name} == {"total", *(f"unweighted_{name}" for name in names[task])}
        with torch.no_grad():
            logits = make_student(dropout=0.0)(**batch)["logits"]
            loss = KD_LOSS_MAP[config.kd_loss_type](logits, teacher.eval()(**batch)["logits"], config.temperature)
        assert logs["unweighted_kd_loss"] == pytest.approx(loss.item(), rel=1e-5)
        weights = {"hidden_hidden_mse_1_1": 1, "kd_loss": config.kd_loss_weight, "hard_label_loss": int(task == "b")}
        total = sum(weights.get(name, 2) * logs[f"unweighted_{name}"] for name in names[task])
        assert logs["total"] == pytest.approx(total, rel=1e-5)


def first_step(distiller, loaders):
    """The task and the logs of one step, with the total."""
    seen, step = [], distiller.step

    def watched(module, batch, progress, share):
        loss, logs = step(module, batch, progress, share)
        seen.append((batch.task, {"total": loss.item(), **{name: value.item() for name, value in logs.items()}}))
        return loss, logs

    distiller.step = watched
    train(distiller, loaders, 1)
    return seen


def test_projections_of_each_task(tmp_path):
    """Three matches, three projections, each trained by its own task alone."""
    distiller = of_two(tmp_path, configs())
    start = {}

    def callback(model, step):
        for number, module in distiller.projections.items():
            start.setdefault(number, []).append(module.weight.clone() if hasattr(module, "weight")
                                                else next(module.parameters()).clone())  # fmt: skip

    distiller.t_config.ckpt_steps = 1
    seen = drawn_in(distiller)
    train(distiller, dict.fromkeys("ab", batches()), 8, callback=callback)
    assert {number: tuple(items[0].shape) for number, items in start.items()} == {0: (48, 32), 1: (16, 32), 2: (16, 32)}
    for number, items in start.items():
        for step in range(1, 8):
            moved = not torch.equal(items[step], items[step - 1])
            assert moved == ((seen[step][0] == "a") == (number == 0))


@pytest.mark.parametrize("kind", ["memory", "cache"])
def test_configurations_of_each_task_from_a_cache(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("random.shuffle", lambda items: None)
    expected = totals(of_two(tmp_path / "plain", configs()), dict.fromkeys("ab", batches()), 16)
    if kind == "memory":
        found = totals(of_two(tmp_path / "x", configs(is_caching_logits=True)), dict.fromkeys("ab", batches()), 16)
        tolerance = 1e-5
    else:
        pytest.importorskip("lmdb")
        folder, tolerance = str(tmp_path / "cache"), 2e-2
        of = {"a": make_teacher(1), "b": Encoder(layers=1, width=16, seed=3)}
        settings = configs()
        settings["b"].intermediate_matches[0].proj = ["linear", 32, 16]
        for task, teacher in of.items():
            precompute(teacher, batches(), adaptor, folder, settings[task], make_config(tmp_path), task=task)
        expected = totals(of_two(tmp_path / "again", settings), dict.fromkeys("ab", batches()), 16)
        distiller = of_two(tmp_path / "x", settings, teachers=dict.fromkeys("ab"), teacher_cache=folder)
        found = totals(distiller, dict.fromkeys("ab", batches()), 16)
    for (task, total, _), (other, cached, _) in zip(expected, found, strict=True):
        assert task == other
        assert cached == pytest.approx(total, rel=tolerance)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"a": DistillationConfig()}, KeyError, r"distill_config must have the tasks of model_T, \['a', 'b'\], got"),
        ({"a": DistillationConfig(), "b": {}}, TypeError, r"distill_config\['b'\] must be a DistillationConfig"),
        (
            {"a": DistillationConfig(is_caching_logits=True), "b": DistillationConfig()},
            ValueError,
            r"is_caching_logits must be the same in the distill_config of every task, got \[True, False\]",
        ),
    ],
    ids=["missing", "type", "caching"],
)
def test_wrong_configurations(config, error, message, tmp_path):
    with pytest.raises(error, match=message):
        of_two(tmp_path, config)


def test_one_task_has_no_configurations(tmp_path):
    with pytest.raises(TypeError, match="distill_config must be a DistillationConfig, got"):
        GeneralDistiller(
            make_config(tmp_path), {"": DistillationConfig()}, make_teacher(), make_student(), adaptor, adaptor
        )


# ---- a callback for each task ------------------------------------------------------------------------------------


def test_what_the_tasks_callbacks_return_is_logged(tmp_path, caplog):
    """A number is the score, names are kept; each is written once a checkpoint, and said in one line."""
    calls = []

    def first(model, step):
        calls.append(("a", model is distiller.model_S, step))
        return {"accuracy": torch.tensor(step / 10), "f1": step / 100}

    def second(model, step):
        calls.append(("b", model is distiller.model_S, step))
        return step / 2

    distiller = make(tmp_path / "out", training={"ckpt_steps": 2, "log_dir": str(tmp_path / "log")})
    with caplog.at_level("INFO", logger="textbrewer"):
        train(distiller, dict.fromkeys("ab", batches()), 4, callback={"a": first, "b": second})
    assert calls == [(task, True, step) for step in (2, 4) for task in "ab"]
    found = scalars(tmp_path / "log")
    assert found["scalar/a/accuracy"] == pytest.approx({2: 0.2, 4: 0.4})
    assert found["scalar/a/f1"] == pytest.approx({2: 0.02, 4: 0.04})
    assert found["scalar/b/score"] == pytest.approx({2: 1.0, 4: 2.0})
    said = [record.getMessage() for record in caplog.records if "accuracy" in record.getMessage()]
    assert said == [
        "Step 2: a/accuracy 0.2, a/f1 0.02, b/score 1",
        "Step 4: a/accuracy 0.4, a/f1 0.04, b/score 2",
    ]


def test_one_callback_s_return_value_is_left_alone(tmp_path):
    distiller = make(tmp_path / "out", training={"log_dir": str(tmp_path / "log")})
    train(distiller, dict.fromkeys("ab", batches()), 2, callback=lambda model, step: {"accuracy": "high"})
    assert not any("accuracy" in name for name in scalars(tmp_path / "log"))


@pytest.mark.parametrize(
    ("callback", "error", "message"),
    [
        ({"c": print}, KeyError, "callback: unknown key 'c'"),
        ({"a": 3}, TypeError, r"callback\['a'\] must be a function"),
        ({"a": lambda model, step: "good"}, TypeError, r"must return a number, .* got 'good' for 'score'"),
        ({"a": lambda model, step: {"f1": None}}, TypeError, r"callback\['a'\] .* got None for 'f1'"),
    ],
    ids=["task", "type", "text", "None"],
)
def test_wrong_callbacks(callback, error, message, tmp_path):
    with pytest.raises(error, match=message):
        train(make(tmp_path), dict.fromkeys("ab", batches()), 1, callback=callback)


def test_a_callback_that_finds_nothing(tmp_path):
    train(make(tmp_path), dict.fromkeys("ab", batches()), 1, callback={"a": lambda model, step: None})
