"""Several teachers: a student learns the mean of three teachers' logits, and a hidden layer of one of them.

    python examples/by_feature/multi_teacher.py

Each teacher has seen a third of the labelled points; the student sees none of the labels, and learns from all three.
"""

import tempfile

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from textbrewer import BasicTrainer, DistillationConfig, MultiTeacherDistiller, TrainingConfig

torch.manual_seed(0)
POINTS = torch.randn(1100, 6)
LABELS = (POINTS.square().sum(dim=1) > 5.3).long()  # inside or outside a ball: about half and half
TRAIN, HELD_OUT = slice(0, 600), slice(600, None)
# "teacher" says whose layer it is, by its place in model_T.
MATCH = {"layer_T": 0, "layer_S": 0, "feature": "hidden", "loss": "hidden_mse", "weight": 0.1, "proj": "linear"}
MATCH["teacher"] = 1


class Net(nn.Module):
    """One hidden layer."""

    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, width), nn.GELU())
        self.head = nn.Linear(width, 2)

    def forward(self, points, labels):
        """Return logits, the hidden layer and the loss."""
        hidden = self.body(points)
        logits = self.head(hidden)
        return logits, hidden, nn.functional.cross_entropy(logits, labels)


def adaptor(batch, outputs):
    logits, hidden, loss = outputs
    return {"logits": logits, "hidden": [hidden], "losses": loss}


def accuracy(model):
    with torch.no_grad():
        logits, *_ = model(POINTS[HELD_OUT], LABELS[HELD_OUT])
    return 100 * (logits.argmax(dim=1) == LABELS[HELD_OUT]).float().mean().item()


def loader(rows):
    return DataLoader(TensorDataset(POINTS[rows], LABELS[rows]), batch_size=20, shuffle=True)


teachers, student = [Net(width=64) for _ in range(3)], Net(width=32)
with tempfile.TemporaryDirectory() as folder:
    for number, teacher in enumerate(teachers):
        own = slice(200 * number, 200 * (number + 1))
        config = TrainingConfig(output_dir=f"{folder}/teacher{number}", progress_bar=False)
        with BasicTrainer(config, teacher, adaptor) as trainer:
            trainer.train(torch.optim.AdamW(teacher.parameters(), lr=1e-2), loader(own), num_epochs=15)
        print(f"teacher {number}: {accuracy(teacher):.1f}% right")

    distiller = MultiTeacherDistiller(
        TrainingConfig(output_dir=f"{folder}/student", progress_bar=False),
        DistillationConfig(
            temperature=2,
            kd_loss_type="kl",
            intermediate_matches=[MATCH],
        ),
        model_T=teachers,
        model_S=student,
        adaptor_T=adaptor,  # one for all, or a list of one each
        adaptor_S=adaptor,
    )
    with distiller:
        distiller.train(torch.optim.AdamW(student.parameters(), lr=1e-2), loader(TRAIN), num_epochs=15)
print(f"student:   {accuracy(student):.1f}% right")
