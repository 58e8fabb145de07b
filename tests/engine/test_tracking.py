"""What a run logs, and what it does with losses and gradients that are not finite."""

import logging
import math
import struct
import warnings

import pytest
import torch
from tensorboardX.proto.event_pb2 import Event, SessionLog

from tests.conftest import Encoder, adaptor, make_config, make_loader
from tests.engine.runs import PROJECTED, Run, checkpoints, distil, equal, weights
from tests.engine.test_step_callbacks import Watcher, train
from textbrewer import BasicTrainer, GeneralDistiller
from textbrewer.engine import NonFiniteError, Runtime, loop
from textbrewer.engine.tracking import Tracker


def scalars(folder):
    """Return ``{name: {step: value}}`` of all tensorboard files of a folder, by its record format.

    Each record is its length (8 bytes), a checksum (4), the event, and a checksum (4). What a resumed run says that
    it will log again counts no more.
    """
    found = {}
    for path in sorted(folder.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack("<Q", content[place : place + 8])
            event = Event.FromString(content[place + 12 : place + 12 + length])
            place += 16 + length
            if event.session_log.status == SessionLog.START:
                for values in found.values():
                    for step in [step for step in values if step >= event.step]:
                        del values[step]
            for value in event.summary.value:
                values = found.setdefault(value.tag, {})
                assert event.step not in values
                values[event.step] = value.simple_value
    return found


class Recorder:
    """A tracker's ``record`` that keeps what it gets."""

    def __init__(self, monkeypatch):
        self.rows = []
        original = Tracker.record

        def record(tracker, step, logs):
            self.rows.append((step, {name: float(value.detach()) for name, value in logs.items()}))
            original(tracker, step, logs)

        monkeypatch.setattr(Tracker, "record", record)


NAMES = {
    "scalar/total_loss",
    "scalar/unweighted_kd_loss",
    "scalar/unweighted_hard_label_loss",
    "scalar/unweighted_hidden_hidden_mse_2_2",
    "scalar/unweighted_hidden_cos_1_1",
    "scalar/unweighted_attention_attention_mse_0_0",
}


def test_tensorboard_has_every_term_of_every_micro_batch(tmp_path, monkeypatch):
    recorder = Recorder(monkeypatch)
    distil(
        tmp_path / "out",
        make_loader(20),
        {"num_epochs": 2},
        log_dir=str(tmp_path / "log"),
        gradient_accumulation_steps=2,
        logging_steps=4,
        distill={"intermediate_matches": PROJECTED, "hard_label_weight": 0.5},
    )
    found = scalars(tmp_path / "log")
    assert found.keys() == NAMES
    assert all(list(values) == list(range(10)) for values in found.values())
    for number, (_, row) in enumerate(recorder.rows):
        for name, value in row.items():
            assert found[f"scalar/{name}"][number] == pytest.approx(value, rel=1e-6)
    # Steps of two micro-batches, and a last one of one.
    assert [step for step, _ in recorder.rows] == [1, 1, 2, 2, 3, 4, 4, 5, 5, 6]
    weighted = {"unweighted_kd_loss": 1, "unweighted_hard_label_loss": 0.5}
    weighted |= {"unweighted_hidden_hidden_mse_2_2": 1, "unweighted_hidden_cos_1_1": 0.5}
    weighted |= {"unweighted_attention_attention_mse_0_0": 1}
    for _, row in recorder.rows:
        total = sum(weight * row[name] for name, weight in weighted.items())
        assert row["total_loss"] == pytest.approx(total, rel=1e-5)


def test_tasks_are_logged_by_name(tmp_path):
    Run("multi-task", tmp_path / "out", log_dir=str(tmp_path / "log"), every_step=False).train()
    found = scalars(tmp_path / "log")
    by_task = [set(found[f"scalar/{task}/unweighted_kd_loss"]) for task in "ab"]
    assert by_task[0] | by_task[1] == set(range(13)) == set(found["scalar/unweighted_kd_loss"])
    assert not by_task[0] & by_task[1]
    assert all(by_task)


def test_the_trainer_logs_its_loss(tmp_path):
    Run("trainer", tmp_path / "out", log_dir=str(tmp_path / "log"), every_step=False).train()
    assert {name: list(values) for name, values in scalars(tmp_path / "log").items()} == {
        "scalar/total_loss": list(range(12))
    }


def test_numbers_go_on_after_a_resume(tmp_path):
    """The run of before went on after its checkpoint: what it logged then is logged again, and counts once."""
    name = "general, projections, accumulation"
    Run(name, tmp_path / "whole", log_dir=str(tmp_path / "whole-log")).train()
    whole = scalars(tmp_path / "whole-log")
    Run(name, tmp_path / "out", log_dir=str(tmp_path / "log")).train(num_epochs=1)
    assert len(scalars(tmp_path / "log")["scalar/total_loss"]) == 6
    Run(name, tmp_path / "out2", seed=7, log_dir=str(tmp_path / "log")).train(
        resume_from=tmp_path / "out" / "checkpoint-1"
    )
    assert scalars(tmp_path / "log") == whole
    assert list(whole["scalar/total_loss"]) == list(range(18))


def test_without_a_log_folder_nothing_is_written(tmp_path):
    distil(tmp_path, make_loader(8), {"num_steps": 1})
    assert not list(tmp_path.rglob("events*"))


def test_trackers_of_accelerate_get_the_same(tmp_path):
    distil(tmp_path / "out", make_loader(8), {"num_steps": 3}, log_dir=str(tmp_path / "log"), log_with=["tensorboard"])
    ours, theirs = scalars(tmp_path / "log"), scalars(tmp_path / "log" / "textbrewer")
    assert len(ours) == 3
    assert {name.removeprefix("scalar/"): values for name, values in ours.items()} == theirs


@pytest.mark.parametrize("bar", [False, True])
def test_the_bar_shows_terms_and_rate(bar, tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    config = make_config(tmp_path, logging_steps=1)
    config.progress_bar = bar
    model = Encoder()
    GeneralDistiller(
        config,
        Run("basic, epochs, in order", tmp_path / "x").distiller.d_config,
        Encoder(seed=4),
        model,
        adaptor,
        adaptor,
    ).train(torch.optim.SGD(model.parameters(), lr=0.25), make_loader(12), num_epochs=2)
    shown = capfd.readouterr().err
    if not bar:
        assert shown == ""
        return
    last = shown.strip().split("\r")[-1]
    assert "6/6" in last
    assert "total_loss=" in last
    assert "kd_loss=" in last
    assert "lr=0.25" in last
    assert "step/s" in last


def test_losses_are_read_only_when_logged(tmp_path, monkeypatch):
    """Where reading waits for the device, nothing is read in between."""
    batches, reads = list(make_loader(28)), []
    original = Tracker.flush
    monkeypatch.setattr(
        Tracker, "flush", lambda self, show=None: (reads.append(len(self._pending)), original(self, show))
    )
    monkeypatch.setattr(Runtime, "__init__", slow_device(Runtime.__init__))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("read"))
    monkeypatch.setattr(loop._Loop, "_checkpoint", lambda self: None)
    distil(tmp_path, batches, {"num_epochs": 1}, logging_steps=3)
    assert reads == [3, 3, 1]


def slow_device(original):
    """Return a constructor of a runtime that says that reading from its device is not free."""

    def construct(self, config):
        original(self, config)
        self.reads_are_free = False

    return construct


# What is not finite


def poison(number, poisoned):
    """Return an adaptor whose ``losses`` are poisoned for the ``number``-th batch, whenever that comes."""
    seen = []

    def adapt(batch, outputs):
        views = adaptor(batch, outputs)
        seen.append(batch["input_ids"])
        if len(seen) >= number and torch.equal(seen[number - 1], batch["input_ids"]):
            views["losses"] = poisoned(views["losses"], views["logits"])
        return views

    return adapt


POISONS = {
    "nan": lambda loss, logits: loss * math.nan,
    "infinite": lambda loss, logits: loss + math.inf,
    # The value is 0, the gradient infinity times 0.
    "gradient": lambda loss, logits: loss + (logits * 0).square().sum().sqrt(),
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", POISONS)
def test_the_run_stops_before_the_update_and_names_the_term(name, accumulation, tmp_path):
    """In the first micro-batch of step 3."""
    number = 2 * accumulation + 1
    settings = {
        "distill": {"hard_label_weight": 1, "intermediate_matches": PROJECTED},
        "ckpt_steps": 1,
        "save_total_limit": None,
        "gradient_accumulation_steps": accumulation,
    }
    good = distil(tmp_path / "good", make_loader(24), {"num_steps": 2}, **settings)
    student = Encoder(dropout=0.0, seed=1)
    what = "gradient of unweighted_hard_label_loss" if name == "gradient" else "unweighted_hard_label_loss is (nan|inf)"
    with pytest.raises(NonFiniteError, match=f"step 3: (the )?{what}.* last checkpoint is good"):
        distil(
            tmp_path / "bad",
            make_loader(24),
            {"num_steps": 9},
            student=student,
            adaptor_S=poison(number, POISONS[name]),
            **settings,
        )
    assert equal(student.state_dict(), good.model_S.state_dict())
    assert [path.name for path in checkpoints(tmp_path / "bad")] == ["checkpoint-1", "checkpoint-2"]
    assert not list((tmp_path / "bad").glob("gs3*"))


@pytest.mark.parametrize("name", POISONS)
def test_the_trainer_stops_too(name, tmp_path):
    model = Encoder()
    trainer = BasicTrainer(make_config(tmp_path), model, poison(3, POISONS[name]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(NonFiniteError, match=r"step 3: .*total.loss"):
        trainer.train(optimizer, make_loader(24), num_steps=9)
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


@pytest.mark.parametrize("name", POISONS)
def test_on_a_device_that_is_read_seldom_no_bad_student_is_saved(name, tmp_path, monkeypatch):
    """The bad step is the one before the checkpoint: the loss of the next one would come too late."""
    monkeypatch.setattr(Runtime, "__init__", slow_device(Runtime.__init__))
    with pytest.raises(NonFiniteError, match=r"step 4: .*not finite|step 4: unweighted_hard_label_loss is (nan|inf)"):
        distil(
            tmp_path,
            make_loader(24),
            {"num_steps": 8},
            adaptor_S=poison(4, POISONS[name]),
            distill={"hard_label_weight": 1},
            ckpt_steps=2,
        )
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "gs2.pkl"}


def test_a_bad_loss_is_in_the_log(tmp_path):
    with pytest.raises(NonFiniteError):
        distil(
            tmp_path / "out",
            make_loader(24),
            {"num_steps": 9},
            adaptor_S=poison(3, POISONS["nan"]),
            distill={"hard_label_weight": 1},
            log_dir=str(tmp_path / "log"),
        )
    found = scalars(tmp_path / "log")["scalar/unweighted_hard_label_loss"]
    assert [math.isfinite(value) for value in found.values()] == [True, True, False]


# Gradient scaling for fp16, here on the CPU and with an overflow made by the scale alone


UNSCALED = Runtime.__init__


@pytest.fixture
def scaled(monkeypatch):
    """Give every runtime a gradient scaler, as precision='fp16' does on a GPU, but no half precision."""
    scalers = []

    def construct(self, config, original=Runtime.__init__):
        original(self, config)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, backoff_factor=2.0**-63, growth_interval=3)
        self.accelerator.scaler, self.accelerator.native_amp = self.scaler, True
        self.accelerator.state._mixed_precision = "fp16"
        self.accelerator.autocast = None
        scalers.append(self.scaler)

    monkeypatch.setattr(Runtime, "__init__", construct)
    # Without half precision: the model is not wrapped.
    monkeypatch.setattr("accelerate.Accelerator.prepare_model", lambda self, model, **options: model)
    return scalers


def test_an_overflow_under_scaling_skips_the_step(scaled, tmp_path):
    """The scale of the first step is too large for this loss; the second step is as the first without scaling."""
    learning_rates = []

    def step_of(steps, **more):
        student = Encoder(dropout=0.0, seed=1)
        run = distil(
            tmp_path / str(steps),
            make_loader(4),
            {"num_steps": steps},
            student=student,
            distill={"kd_loss_weight": 1000},
            train={
                "scheduler_class": torch.optim.lr_scheduler.LambdaLR,
                "scheduler_args": {"lr_lambda": lambda step: learning_rates.append(step) or 0.5**step},
                "max_grad_norm": 0.5,
                **more,
            },
        )
        return weights(run)

    start = step_of_nothing()
    with pytest.warns(UserWarning, match="step 1: gradients overflowed fp16; step skipped, scale lowered"):
        assert torch.equal(step_of(1), start)
    assert learning_rates == [0], "the schedule takes no step"
    with pytest.warns(UserWarning, match="step 1: gradients overflowed") as warned:
        moved = step_of(2)
    assert len([item for item in warned if "overflowed" in str(item.message)]) == 1
    assert scaled[-1].get_scale() == 2.0**63
    scaled.clear()
    assert torch.allclose(moved, unscaled_step(), rtol=0, atol=1e-6)
    assert not torch.equal(moved, start)


def step_of_nothing():
    return torch.cat([parameter.detach().flatten() for parameter in Encoder(dropout=0.0, seed=1).parameters()])


def unscaled_step():
    """One step by hand: the clipped gradient times the learning rate."""
    student, teacher = Encoder(dropout=0.0, seed=1), Encoder(width=48, seed=2).eval()
    batch = next(iter(make_loader(4)))
    with torch.no_grad():
        target = (teacher(**batch)["logits"] / 4).softmax(dim=-1)
    loss = -1000 * (target * (student(**batch)["logits"] / 4).log_softmax(dim=-1)).sum(dim=-1).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 0.5)
    return torch.cat(
        [
            (p - 0.1 * p.grad).detach().flatten() if p.grad is not None else p.detach().flatten()
            for p in student.parameters()
        ]
    )


def test_the_scale_is_resumed(scaled, tmp_path):
    name = "basic, steps, shuffled"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = Run(name, tmp_path / "whole").train().state()
        scale = scaled[-1].state_dict()
        resumed = Run(name, tmp_path / "resumed", seed=7).train(resume_from=tmp_path / "whole" / "checkpoint-5")
    assert equal(resumed.state(), whole)
    assert scaled[-1].state_dict() == scale
    assert scale["scale"] != 2.0**126


def test_the_line_after_a_signal_is_seen_without_a_bar(caplog, tmp_path):
    config = make_config(tmp_path)
    tracker = Tracker(config, Runtime(config), 3, 0, 0, {})
    with caplog.at_level(logging.INFO, logger="textbrewer"):
        tracker.say("resumed")
        tracker.say("interrupted", urgent=True)
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", "resumed"),
        ("WARNING", "interrupted"),
    ]


def spoiling(steps, value):
    """Return an adaptor whose loss is ``value`` in the first ``steps`` calls."""
    calls = []

    def spoilt(batch, outputs):
        calls.append(0)
        views = adaptor(batch, outputs)
        return {**views, "losses": views["losses"] * (value if len(calls) <= steps else 1.0)}

    return spoilt


@pytest.mark.filterwarnings("ignore:step [12]. gradients overflowed")
def test_an_infinite_loss_under_scaling_skips_the_step(scaled, tmp_path):
    """Neither the loss nor the student's weights are spoilt for the steps after it."""
    student = Encoder(dropout=0.0, seed=1)
    trainer = BasicTrainer(make_config(tmp_path), student, spoiling(3, math.inf))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="step 3: gradients overflowed fp16"):
        trainer.train(optimizer, make_loader(4), num_steps=6)
    moved = torch.cat([parameter.detach().flatten() for parameter in student.parameters()])
    assert torch.isfinite(moved).all()
    assert not torch.equal(moved, step_of_nothing())


@pytest.mark.filterwarnings("ignore:step .* gradients overflowed")
def test_an_infinite_loss_that_stays_ends_the_training(scaled, tmp_path):
    student = Encoder(dropout=0.0, seed=1)
    trainer = BasicTrainer(make_config(tmp_path), student, spoiling(1000, math.inf))
    with pytest.raises(NonFiniteError, match="not finite"):
        trainer.train(torch.optim.SGD(student.parameters(), lr=0.1), make_loader(4), num_steps=100)
    assert torch.equal(
        torch.cat([parameter.detach().flatten() for parameter in student.parameters()]), step_of_nothing()
    )


def test_step_callbacks_see_unscaled_gradients_and_no_overflow(scaled, tmp_path):
    """The first step overflows and is left out; the second's gradients are as without scaling, clipped or not."""

    def large(batch, outputs):
        return {"losses": 1000 * outputs["loss"]}

    plain, watcher = Watcher(), Watcher()
    with pytest.warns(UserWarning, match="gradients overflowed"):
        train(tmp_path / "scaled", [watcher], {"num_steps": 2}, rows=4, max_grad_norm=1.0, read=large)
    assert [call for call in watcher.calls if call[0] == "backward"] == [("backward", 1)]
    scaled.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runtime, "__init__", UNSCALED)
        train(tmp_path / "plain", [plain], {"num_steps": 1}, rows=4, read=large)
    assert torch.allclose(watcher.seen[0], plain.seen[0], rtol=1e-5, atol=1e-8)
