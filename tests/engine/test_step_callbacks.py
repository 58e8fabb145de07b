"""What takes part in every optimiser step: when it is called, what it sees, and how it is resumed."""

import itertools

import pytest
import torch

from tests import processes
from tests.conftest import Encoder, adaptor, make_config, make_loader
from textbrewer import BasicDistiller, BasicTrainer, DistillationConfig, MultiTaskDistiller
from textbrewer.callbacks import StepCallback
from textbrewer.engine import NonFiniteError

ROWS, BATCH = 24, 4


class Watcher(StepCallback):
    """Notes its calls, and adds up the gradient of one weight."""

    def __init__(self):
        self.calls, self.total, self.seen = [], None, []

    def begin(self, run):
        self.run, self.weight = run, run.student.classifier.weight
        self.total = torch.zeros_like(self.weight)
        self.calls.append("begin")

    def before_step(self, step):
        self.calls.append(("before", step))

    def after_backward(self, step):
        self.seen.append(self.weight.grad.clone())
        self.total += self.weight.grad
        self.calls.append(("backward", step))

    def after_step(self, step):
        assert self.weight.grad is not None, "gradients are still there"
        self.calls.append(("after", step))
        return {"total": self.total.norm(), "steps": step}

    def end(self):
        self.calls.append("end")

    def state_dict(self):
        return {"total": self.total}

    def load_state_dict(self, state):
        self.total = state["total"].clone()


def train(folder, watchers, length=None, rows=ROWS, student=None, settings=None, read=adaptor, **options):
    """Train an encoder and return it."""
    student = student or Encoder(dropout=0.0, seed=1)
    torch.manual_seed(0)
    trainer = BasicTrainer(make_config(folder, **(settings or {})), student, read)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    loader = make_loader(rows, BATCH, full=True, shuffle=True)
    trainer.train(optimizer, loader, **(length or {"num_epochs": 1}), step_callbacks=watchers, **options)
    return student


def calls_of(steps, first=0):
    """Return the calls of a whole run."""
    names = [[("before", step), ("backward", step), ("after", step + 1)] for step in range(first, steps)]
    return ["begin", *itertools.chain(*names), "end"]


@pytest.mark.parametrize(
    ("accumulation", "weighting", "steps"), [(1, "micro_batch", 6), (4, "micro_batch", 2), (4, "positions", 2)]
)
def test_each_step_has_its_calls(tmp_path, accumulation, weighting, steps):
    watcher = Watcher()
    settings = {"gradient_accumulation_steps": accumulation, "accumulation_weighting": weighting}
    train(tmp_path, [watcher], settings=settings)
    assert watcher.calls == calls_of(steps)


def test_it_sees_the_gradient_of_the_whole_step(tmp_path):
    """One window over all batches: its gradient is that of one large batch, and is not clipped."""
    watcher = Watcher()
    train(tmp_path, [watcher], settings={"gradient_accumulation_steps": ROWS // BATCH}, max_grad_norm=1e-3)
    model = Encoder(dropout=0.0, seed=1)
    (batch,) = make_loader(ROWS, ROWS, full=True)
    model(**batch)["loss"].backward()
    (seen,) = watcher.seen
    assert torch.allclose(seen, model.classifier.weight.grad, atol=1e-6)
    assert seen.norm() > 1e-2


def test_what_it_changes_counts(tmp_path):
    class Freeze(StepCallback):
        def begin(self, run):
            self.weight = run.student.classifier.weight

        def after_backward(self, step):
            self.weight.grad.zero_()

    start, student = Encoder(dropout=0.0, seed=1), train(tmp_path, [Freeze()])
    assert torch.equal(student.classifier.weight, start.classifier.weight)
    assert not torch.equal(student.embedding.weight, start.embedding.weight)


def test_several_are_called_in_their_order_and_end_in_reverse(tmp_path):
    order = []

    class Named(StepCallback):
        def __init__(self, name):
            self.name = name

        def before_step(self, step):
            order.append(self.name)

        def end(self):
            order.append(f"end {self.name}")

    train(tmp_path, [Named("a"), Named("b")], length={"num_steps": 1})
    assert order == ["a", "b", "end b", "end a"]


def test_it_ends_after_an_error(tmp_path):
    watcher, student = Watcher(), Encoder(dropout=0.0, seed=1)
    with torch.no_grad():
        student.classifier.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        train(tmp_path, [watcher], student=student)
    assert watcher.calls[-1] == "end"


def test_figures_are_logged(tmp_path, monkeypatch):
    rows = []
    monkeypatch.setattr("textbrewer.engine.tracking.Tracker._write", lambda self, row: rows.append(row))
    watcher = Watcher()
    train(tmp_path, [watcher], length={"num_steps": 3})
    assert "steps" not in rows[0]
    assert [row["steps"] for row in rows[1:]] == [1, 2]
    assert rows[2]["total"] == pytest.approx(float((watcher.seen[0] + watcher.seen[1]).norm()), rel=1e-5)


def test_its_state_is_resumed(tmp_path):
    whole, part, rest = Watcher(), Watcher(), Watcher()
    train(tmp_path / "whole", [whole], {"num_steps": 6})
    train(tmp_path / "part", [part], {"num_steps": 4})
    student = Encoder(dropout=0.0, seed=2)
    train(tmp_path / "part", [rest], {"num_steps": 6}, student=student, resume_from="latest")
    assert rest.calls == calls_of(6, first=4)
    assert torch.equal(rest.total, whole.total)
    assert not torch.equal(rest.total, part.total)


@pytest.mark.parametrize(("first", "second"), [([], [Watcher]), ([Watcher], []), ([Watcher], [StepCallback])])
def test_a_checkpoint_of_other_callbacks_is_refused(tmp_path, first, second):
    train(tmp_path, [kind() for kind in first], {"num_steps": 2})
    names = [kind.__name__ for kind in second]
    with pytest.raises(ValueError, match=r"was written with step_callbacks .* must be resumed with") as error:
        train(tmp_path, [kind() for kind in second], {"num_steps": 4}, resume_from="latest")
    assert str(names) in str(error.value)


@pytest.mark.parametrize(
    ("given", "name"), [(Watcher(), "step_callbacks"), ([Watcher(), print], r"step_callbacks\[1\]")]
)
def test_what_is_no_callback_is_refused(tmp_path, given, name):
    with pytest.raises(TypeError, match=name):
        train(tmp_path, given)


def test_every_distiller_has_them(tmp_path):
    student, teacher = Encoder(dropout=0.0, seed=1), Encoder(seed=2)
    watchers = [Watcher(), Watcher()]
    config, learn = make_config(tmp_path), DistillationConfig()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    BasicDistiller(config, learn, teacher, student, adaptor, adaptor).train(
        optimizer, make_loader(8, BATCH), num_epochs=1, step_callbacks=watchers[:1]
    )
    tasks = MultiTaskDistiller(config, learn, {"a": teacher}, student, {"a": adaptor}, {"a": adaptor})
    with pytest.warns(UserWarning, match="has checkpoints of an earlier run"):
        tasks.train(optimizer, {"a": make_loader(8, BATCH)}, num_steps=2, step_callbacks=watchers[1:])
    assert [watcher.calls for watcher in watchers] == [calls_of(2), calls_of(2)]


class Averager(StepCallback):
    """Keeps the mean of the ranks' numbers."""

    def __init__(self, rank):
        self.rank = rank

    def begin(self, run):
        self.number = torch.tensor([float(self.rank)])
        run.average([self.number])


def on_ranks(rank, folder):
    averager, watcher = Averager(rank), Watcher()
    train(folder / "run", [averager, watcher], {"num_steps": 2})
    torch.save([averager.number, *watcher.seen], folder / f"{rank}.pt")


def test_two_ranks_average_and_see_the_same(tmp_path):
    processes.run_ranks(2, tmp_path, on_ranks, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert first[0].item() == 0.5
