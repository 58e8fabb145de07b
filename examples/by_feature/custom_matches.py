"""Custom matches: features that no adaptor returns, by the names of the modules that compute them.

    python examples/by_feature/custom_matches.py

The models below return only logits. Each custom match names a module of either side, a loss (your own, or a name of
MATCH_LOSS_MAP) and, where the widths differ, a projection, which is trained and saved with the student.
"""

import tempfile

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig
from textbrewer.matching import CustomMatch

torch.manual_seed(0)
POINTS = torch.randn(960, 8)


class Net(nn.Module):
    """Two layers and a head."""

    def __init__(self, width):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, width), nn.Tanh())
        self.second = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.head = nn.Linear(width, 3)

    def forward(self, points):
        """Return the logits."""
        return self.head(self.second(self.first(points)))


def adaptor(batch, outputs):
    return {"logits": outputs}


def similarities(output_S, output_T, mask_S, mask_T):
    """A loss without a projection: rows alike for the teacher shall be alike for the student. No masks here."""
    rows_S, rows_T = (nn.functional.normalize(rows, dim=-1) for rows in (output_S, output_T))
    return (rows_S @ rows_S.T - rows_T @ rows_T.T).square().mean()


def distance(teacher, student, projection):
    """How far the student's second layer, projected, is from the teacher's."""
    with torch.no_grad():
        return (projection(student.second(student.first(POINTS))) - teacher.second(teacher.first(POINTS))).norm().item()


teacher, student = Net(width=32), Net(width=8)
projection = nn.Linear(8, 32)
matches = [
    CustomMatch(  # dotted names or the modules themselves; a dict with the same keys does too
        module_T="second",
        module_S="second",
        weight=10,
        loss="hidden_mse",
        proj_func=projection,
        proj_group={"lr": 2e-2},  # options of the projection's own in the optimizer
    ),
    CustomMatch(module_T=teacher.first, module_S=student.first, weight=1, loss=similarities),
]
before = distance(teacher, student, projection)
with tempfile.TemporaryDirectory() as folder:
    distiller = GeneralDistiller(
        TrainingConfig(output_dir=folder, progress_bar=False),
        DistillationConfig(temperature=2),
        model_T=teacher,
        model_S=student,
        adaptor_T=adaptor,
        adaptor_S=adaptor,
        custom_matches=matches,
    )
    loader = DataLoader(TensorDataset(POINTS), batch_size=32, shuffle=True)
    with distiller:
        distiller.train(torch.optim.AdamW(student.parameters(), lr=1e-2), loader, num_epochs=5)
print(f"distance of the second layers: {before:.1f} before, {distance(teacher, student, projection):.1f} after")
print(
    f"hooks left on the models: {sum(len(part._forward_hooks) for net in (teacher, student) for part in net.modules())}"
)
