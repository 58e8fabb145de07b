"""The slimming penalty: by autograd of the penalty itself."""

import pytest
import torch
from torch import nn

from tests.compression.families import with_labels
from tests.compression.pruned_runs import still
from tests.compression.pruned_runs import train as train_family
from tests.compression.trained.linear import adaptor
from tests.conftest import make_config
from textbrewer import BasicTrainer
from textbrewer.callbacks import StepCallback
from textbrewer.compression.trained import SlimPenalty


class Images(nn.Module):
    """A convolution with batch normalisation, and a classifier."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
        self.plain = nn.BatchNorm1d(6, affine=False)
        self.head = nn.Linear(6, 3)
        self.bn.weight.data = torch.tensor([1.0, -0.5, 0.2, 0.0, 2.0, -1.0])

    def forward(self, images, labels):
        hidden = torch.relu(self.bn(self.conv(images))).mean((2, 3))
        return nn.functional.cross_entropy(self.head(self.plain(hidden)), labels)


def data(count):
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "images": torch.randn(5, 1, 6, 6, generator=generator),
            "labels": torch.randint(0, 3, (5,), generator=generator),
        }
        for _ in range(count)
    ]


def train(folder, model, callbacks, count=1, rate=0.1):
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    trainer = BasicTrainer(make_config(folder), model, adaptor)
    trainer.train(optimizer, data(count), num_epochs=1, step_callbacks=callbacks)
    return model


def test_one_step_goes_down_loss_and_penalty(tmp_path):
    model = Images()
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    loss = model(**data(1)[0]) + 0.3 * model.bn.weight.abs().sum()
    gradients = dict(zip(start, torch.autograd.grad(loss, list(model.parameters()))))
    trained = train(tmp_path, Images(), [SlimPenalty(0.3)])
    for name, value in trained.named_parameters():
        torch.testing.assert_close(value, start[name] - 0.1 * gradients[name])


def test_scales_that_do_not_matter_go_to_zero(tmp_path):
    penalty, figures = SlimPenalty(0.05), []
    inner = penalty.after_step
    penalty.after_step = lambda step: figures.append(inner(step))
    model = train(tmp_path / "slim", Images(), [penalty], 100)
    plain = train(tmp_path / "plain", Images(), [], 100)
    # Three start at 0, 0.2 and -0.5, within reach of 100 steps of 0.005.
    assert sorted(model.bn.weight.abs().tolist())[2] < 0.1
    assert sorted(plain.bn.weight.abs().tolist())[2] > 0.3
    assert float(figures[-1]["slim_penalty"]) == pytest.approx(0.05 * float(model.bn.weight.detach().abs().sum()))


@pytest.mark.parametrize(
    ("name", "modules", "exclude", "expected"),
    [
        ("bert-classifier", None, (), 1 + 2 * 4),
        ("bert-classifier", ["*.layer.*"], ["*.attention.*"], 4),
        ("t5", None, (), 4 * 2 + 1 + 4 * 3 + 1),
        ("llama", None, (), 4 * 2 + 1),
    ],
)
def test_the_layers_that_are_meant(tmp_path, name, modules, exclude, expected):
    """Found by what changes: a penalty far above the loss moves all scales by the same step."""
    model = still(name)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}

    class Alone(StepCallback):
        def after_backward(self, step):
            for parameter in model.parameters():
                parameter.grad = None

    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    penalty = SlimPenalty(0.01, modules=modules, exclude=exclude)
    train_family(tmp_path, model, [Alone(), penalty], 1, optimizer=optimizer)
    changed = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert len(changed) == expected
    for key in changed:
        torch.testing.assert_close(model.get_parameter(key), before[key] - 0.005 * before[key].sign())
    assert outputs_are_finite(model)


def outputs_are_finite(model):
    return bool(model(**with_labels(model)).loss.isfinite())


def test_what_cannot_be(tmp_path):
    for settings, error, message in (
        ({"scale": 0}, ValueError, "scale must be greater than 0"),
        ({"modules": "bn"}, TypeError, "modules must be a list"),
    ):
        with pytest.raises(error, match=message):
            SlimPenalty(**settings)
    model = Images()
    for penalty, error, message in (
        (SlimPenalty(modules=["head"]), ValueError, "modules must name normalisation layers that have a weight"),
        (SlimPenalty(modules=["plain"]), ValueError, "modules must name normalisation layers that have a weight"),
        (SlimPenalty(modules=["norm"]), KeyError, "has no module 'norm'"),
        (SlimPenalty(exclude=["bn"]), ValueError, "has none there"),
    ):
        with pytest.raises(error, match=message):
            train(tmp_path, model, [penalty])
    model.bn.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'bn\.weight' is frozen"):
        train(tmp_path, model, [SlimPenalty()])
