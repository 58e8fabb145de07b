"""Caching: the teacher runs once over the data, not once an epoch.

    python examples/by_feature/caching.py

``is_caching_logits=True`` keeps, in main memory, each batch with what the losses need of the teacher's outputs: logits,
and the layers that matches name. In exchange the batches keep their rows; only their order is shuffled.
"""

import itertools
import tempfile
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig

torch.manual_seed(0)
POINTS = torch.randn(1024, 4)
PROJECTION = ["linear", 16, 512]
MATCH = {"layer_T": 0, "layer_S": 0, "feature": "hidden", "loss": "hidden_mse", "weight": 1, "proj": PROJECTION}


class Net(nn.Module):
    """Layers of one width, and a head; counts its forward passes."""

    def __init__(self, width, layers):
        super().__init__()
        sizes = [4, *[width] * layers]
        self.inside = nn.Sequential(*[nn.Linear(*pair) for pair in itertools.pairwise(sizes)], nn.Tanh())
        self.head = nn.Linear(width, 3)
        self.passes = 0

    def forward(self, points):
        """Return logits and the last hidden layer."""
        self.passes += 1
        hidden = self.inside(points)
        return self.head(hidden), hidden


def adaptor(batch, outputs):
    logits, hidden = outputs
    return {"logits": logits, "hidden": [hidden]}


def train(caching, folder):
    """Return the teacher's forward passes, the seconds taken, and how often the student then agrees with it."""
    torch.manual_seed(1)
    teacher, student = Net(width=512, layers=12), Net(width=16, layers=1)
    distiller = GeneralDistiller(
        TrainingConfig(output_dir=folder, progress_bar=False),
        DistillationConfig(temperature=2, intermediate_matches=[MATCH], is_caching_logits=caching),
        model_T=teacher,
        model_S=student,
        adaptor_T=adaptor,
        adaptor_S=adaptor,
    )
    loader = DataLoader(TensorDataset(POINTS), batch_size=64, shuffle=True)
    start = time.perf_counter()
    with distiller:
        distiller.train(torch.optim.AdamW(student.parameters(), lr=1e-2), loader, num_epochs=10)
    seconds, passes = time.perf_counter() - start, teacher.passes
    with torch.no_grad():
        agree = (teacher(POINTS)[0].argmax(dim=1) == student(POINTS)[0].argmax(dim=1)).float().mean().item()
    return passes, seconds, 100 * agree


for caching in (False, True):
    with tempfile.TemporaryDirectory() as folder:
        passes, seconds, agree = train(caching, folder)
    print(f"caching {caching!s:5}: teacher ran {passes:3} times, {seconds:5.2f} s, student agrees on {agree:.0f}%")
