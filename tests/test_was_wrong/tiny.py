"""Tiny models, data and helpers of these tests: torch and the public API alone."""

import contextlib
import math
import signal

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import textbrewer
from textbrewer import DistillationConfig, TrainingConfig

LENGTH, FEATURES, CLASSES = 4, 3, 3


class Net(nn.Module):
    """Two layers over ``(batch, length, 3)`` numbers, with logits by row and by position.

    ``calls`` holds ``training`` of every forward pass.
    """

    def __init__(self, width=4, classes=CLASSES, dropout=0.0):
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, width), nn.Linear(width, width)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(width, classes)
        self.calls = []

    def forward(self, x, mask=None, labels=None):
        self.calls.append(self.training)
        first = torch.tanh(self.first(x))
        second = torch.tanh(self.second(self.dropout(first)))
        tags = self.head(second)
        return {
            "logits": tags.mean(dim=1),
            "tags": tags,
            "hidden": [first, second],
            "attention": [(first @ second.transpose(1, 2)).unsqueeze(1)],
        }


def make(seed, **settings):
    """A model whose weights depend on the seed alone."""
    torch.manual_seed(seed)
    return Net(**settings)


def pair(**settings):
    """A teacher and a student."""
    return make(1, **settings), make(2, **settings)


def rows(count=8):
    """Random rows with a mask that keeps the first positions, and labels."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "x": torch.randn(LENGTH, FEATURES, generator=generator),
            "mask": (torch.arange(LENGTH) < 2 + number % 3).long(),
            "labels": torch.tensor(number % CLASSES),
        }
        for number in range(count)
    ]


def loader(count=8, batch_size=2, **settings):
    """A loader of dict batches in a fixed order, unless told otherwise."""
    return DataLoader(rows(count), batch_size=batch_size, **settings)


def batches(count=8, batch_size=2):
    """The loader's batches as a list."""
    return list(loader(count, batch_size))


class Stream:
    """A loader without a length."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def logits_only(batch, outputs):
    return {"logits": outputs["logits"]}


def everything(batch, outputs):
    return {
        "logits": outputs["logits"],
        "hidden": outputs["hidden"],
        "attention": outputs["attention"],
        "inputs_mask": batch["mask"],
        "labels": batch["labels"],
    }


def tags(batch, outputs):
    return {"logits": outputs["tags"], "logits_mask": batch["mask"]}


def distiller(kind, folder, teacher, student, adaptor_T=logits_only, adaptor_S=None, training=None, **config):
    """Make a distiller by its class's name; ``config`` goes to DistillationConfig, ``training`` to TrainingConfig."""
    adaptor_S = adaptor_T if adaptor_S is None else adaptor_S
    kind = getattr(textbrewer, kind) if isinstance(kind, str) else kind
    train_config = TrainingConfig(**{"output_dir": str(folder), "device": "cpu", **(training or {})})
    if issubclass(kind, textbrewer.BasicTrainer):
        return kind(train_config, student, adaptor_S)
    if issubclass(kind, textbrewer.MultiTeacherDistiller) and not isinstance(teacher, list):
        teacher = [teacher]
    if issubclass(kind, textbrewer.MultiTaskDistiller) and not isinstance(teacher, dict):
        teacher, adaptor_T, adaptor_S = {"task": teacher}, {"task": adaptor_T}, {"task": adaptor_S}
    return kind(train_config, DistillationConfig(**config), teacher, student, adaptor_T, adaptor_S)


def sgd(model, rate=0.1):
    return torch.optim.SGD(model.parameters(), lr=rate)


def counting(optimizer):
    """Return a list that grows by one at each of the optimiser's steps."""
    steps = []
    optimizer.register_step_post_hook(lambda *ignored: steps.append(1))
    return steps


def saved(folder):
    """The steps whose weights are in the output folder."""
    return sorted(int(path.stem[2:]) for path in folder.glob("gs*.pkl"))


def weights(model):
    """All weights in one vector."""
    return torch.cat([value.detach().flatten() for value in model.parameters()]).clone()


def watching(kind):
    """A subclass of a distiller that keeps what ``compute_loss`` returns, as numbers, in ``seen``."""
    base = getattr(textbrewer, kind)

    class Watching(base):
        def compute_loss(self, results_S, results_T):
            total, parts = super().compute_loss(results_S, results_T)
            self.__dict__.setdefault("seen", []).append(
                {name: float(value.detach()) for name, value in {"total": total, **parts}.items()}
            )
            return total, parts

    return Watching


def soft_cross_entropy(logits_S, logits_T, temperature=4.0):
    """The KD loss ``ce`` of rows of logits, by explicit loops."""
    losses = []
    for row_S, row_T in zip(logits_S.tolist(), logits_T.tolist(), strict=True):
        exp_S = [math.exp(value / temperature) for value in row_S]
        exp_T = [math.exp(value / temperature) for value in row_T]
        terms = (t / sum(exp_T) * math.log(s / sum(exp_S)) for s, t in zip(exp_S, exp_T, strict=True))
        losses.append(-sum(terms))
    return sum(losses) / len(losses)


@contextlib.contextmanager
def within(seconds):
    """Stop what takes longer, with an error that says so."""

    def stop(signum, frame):
        pytest.fail(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(action, *words):
    """Assert that ``action`` raises an error whose message has all the words."""
    raised = None
    try:
        action()
    except Exception as error:  # whatever it raises, its message is what counts
        raised = error
    assert raised is not None, "went on silently"
    missing = [word for word in words if word not in str(raised)]
    shown = f"{type(raised).__name__}: {str(raised)[:200]}"
    assert not missing, f"only {shown!r}, which does not say {', '.join(missing)}"


def custom_match(**settings):
    """A custom match; the original has the class, but not among its public names."""
    if hasattr(textbrewer, "CustomMatch"):
        return textbrewer.CustomMatch(**settings)
    from textbrewer.distiller_utils import CustomMatch

    return CustomMatch(**settings)
