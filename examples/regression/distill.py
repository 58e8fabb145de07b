"""Regression: an ensemble of ten networks predicts how diabetes goes on, and teaches one small network.

    python examples/regression/distill.py [--fast]

The models are plain torch modules with one output, a number. The 442 patients come with scikit-learn
(pip install scikit-learn), so nothing is downloaded. Between numbers the loss is the squared difference,
kd_loss_type="mse". The teacher can be asked about patients that nobody measured: the student learns from those as well.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from textbrewer import BasicTrainer, DistillationConfig, GeneralDistiller, TrainingConfig

TRAIN = 342  # patients; the other 100 evaluate


class Network(nn.Module):
    """Predicts the target, in standard deviations from its mean."""

    def __init__(self, width, dropout=0.0):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 1))

    def forward(self, inputs, targets=None):
        """Return predictions ``(batch, 1)``, and their mean squared error where there are targets."""
        outputs = self.layers(inputs)
        return outputs, None if targets is None else (outputs - targets).square().mean()


class Ensemble(nn.Module):
    """Networks that each learn the task; their mean is the prediction."""

    def __init__(self, networks):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, inputs, targets=None):
        """Return the mean prediction, and the mean of the networks' own errors."""
        outputs, losses = zip(*(network(inputs, targets) for network in self.networks), strict=True)
        return torch.stack(outputs).mean(dim=0), None if targets is None else torch.stack(losses).mean()


def adaptor(batch, outputs):
    """Say what a Network returns: the prediction takes the logits' place."""
    prediction, loss = outputs
    return {"logits": prediction, "losses": loss}


def read():
    """Return inputs ``(442, 10)`` and targets ``(442, 1)`` of mean 0 and deviation 1, and the target's own deviation.

    Raises:
        SystemExit: if the package is missing.
    """
    try:
        from sklearn.datasets import load_diabetes
    except ImportError:
        raise SystemExit("the data comes with the package scikit-learn: pip install scikit-learn") from None
    inputs, targets = (torch.tensor(part, dtype=torch.float32) for part in load_diabetes(return_X_y=True))
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    inputs, targets = inputs[order], targets[order, None]
    (of_inputs, mean_inputs), (of_targets, mean_targets) = (
        torch.std_mean(part[:TRAIN], dim=0) for part in (inputs, targets)
    )
    return (inputs - mean_inputs) / of_inputs, (targets - mean_targets) / of_targets, of_targets.item()


def invented(inputs, count):
    """Return ``count`` patients that nobody measured: each a mixture of two real ones, for the teacher to label."""
    pairs, share = torch.randint(len(inputs), (2, count)), torch.rand(count, 1)
    return share * inputs[pairs[0]] + (1 - share) * inputs[pairs[1]]


@torch.no_grad()
def evaluate(model, inputs, targets, deviation):
    """Return the share of the variance explained, R², and the root of the mean squared error in the target's unit."""
    model.eval()
    device = next(model.parameters()).device
    error = (model(inputs.to(device))[0].cpu() - targets).square().mean()
    return (1 - error / targets.var(correction=0)).item(), deviation * error.sqrt().item()


def report(model, step, name, held_out):
    """Evaluate at each checkpoint: the callback."""
    print("{}, step {}: R2 {:.3f}, RMSE {:.1f}".format(name, step, *evaluate(model, *held_out)), flush=True)


def training(model, name, rows, steps, held_out):
    """Return the arguments of train() that all trainings need; all make as many steps, however many rows there are."""
    torch.manual_seed(0)
    return {
        "optimizer": torch.optim.AdamW(model.parameters(), lr=3e-3),
        "dataloader": DataLoader(rows, batch_size=32, shuffle=True),
        "num_steps": steps,
        "scheduler_class": torch.optim.lr_scheduler.CosineAnnealingLR,
        "scheduler_args": {"T_max": steps},
        "callback": partial(report, name=name, held_out=held_out),
    }


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500, help="of each student's training; the teacher gets a third")
    parser.add_argument("--output", type=Path, default=Path("runs/regression"))
    parser.add_argument("--fast", action="store_true", help="a short run: 1,000 steps")
    options = parser.parse_args()
    if options.fast:
        options.steps = 1000
    return options


def main():
    options = parse()
    inputs, targets, deviation = read()
    labelled = [{"inputs": x, "targets": y} for x, y in zip(inputs[:TRAIN], targets[:TRAIN], strict=True)]
    held_out = (inputs[TRAIN:], targets[TRAIN:], deviation)
    config = {
        name: TrainingConfig(output_dir=options.output / name, ckpt_steps=max(1, options.steps // 3))
        for name in ("teacher", "alone", "student")
    }
    torch.manual_seed(0)
    teacher = Ensemble(Network(width=64, dropout=0.3) for _ in range(10))
    with BasicTrainer(config["teacher"], teacher, adaptor) as trainer:
        trainer.train(**training(teacher, "teacher", labelled, max(1, options.steps // 3), held_out))

    torch.manual_seed(1)
    alone, student = Network(width=16), Network(width=16)
    student.load_state_dict(alone.state_dict())  # both students begin with the same weights
    with BasicTrainer(config["alone"], alone, adaptor) as trainer:
        trainer.train(**training(alone, "student without teacher", labelled, options.steps, held_out))

    unlabelled = [{"inputs": row} for row in torch.cat([inputs[:TRAIN], invented(inputs[:TRAIN], 2000)])]
    learn = DistillationConfig(temperature=1, kd_loss_type="mse")  # 1: a temperature would divide the predictions
    with GeneralDistiller(config["student"], learn, teacher, student, adaptor, adaptor) as distiller:
        distiller.train(**training(student, "student, distilled", unlabelled, options.steps, held_out))

    print(f"{'':26}parameters     R2  RMSE")
    for name, model in [("teacher", teacher), ("student without teacher", alone), ("student, distilled", student)]:
        size = sum(parameter.numel() for parameter in model.parameters())
        print("{:26}{:10,}  {:5.3f}  {:4.1f}".format(name, size, *evaluate(model, *held_out)))


if __name__ == "__main__":
    main()
