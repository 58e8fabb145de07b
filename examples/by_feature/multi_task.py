"""Several tasks: one student with a head for each task, taught by one teacher a task.

    python examples/by_feature/multi_task.py

Models, adaptors and loaders go by the task's name. Each step takes a batch of a task drawn by its size; ``tau=0.5``
gives small tasks more steps than their size alone would.
"""

import tempfile

import torch
from torch import nn
from torch.utils.data import DataLoader

from textbrewer import BasicTrainer, DistillationConfig, MultiTaskDistiller, TrainingConfig

torch.manual_seed(0)
RULES = {  # what the tasks ask of a point, and how many points they have
    "ball": (lambda points: (points.square().sum(dim=1) > 5.3).long(), 1200),
    "sign": (lambda points: (points[:, 0] * points[:, 1] > 0).long(), 400),
}


class Net(nn.Module):
    """One body, and a head for each task."""

    def __init__(self, width, tasks):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.heads = nn.ModuleDict({task: nn.Linear(width, 2) for task in tasks})

    def forward(self, points, labels, task):
        """Return logits and loss of the task's head."""
        logits = self.heads[task](self.body(points))
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits, labels)}


def adaptor(batch, outputs):
    return {"logits": outputs["logits"], "losses": outputs["loss"]}


def make_loader(task):
    rule, count = RULES[task]
    points = torch.randn(count, 6)
    rows = list(zip(points, rule(points), strict=True))

    def collate(batch):
        points, labels = (torch.stack(column) for column in zip(*batch, strict=True))
        return {"points": points, "labels": labels, "task": task}

    return DataLoader(rows, batch_size=40, shuffle=True, collate_fn=collate)


def accuracy(model, task):
    points = torch.randn(1000, 6, generator=torch.Generator().manual_seed(1))
    labels = RULES[task][0](points)
    with torch.no_grad():
        return 100 * (model(points, labels, task)["logits"].argmax(dim=1) == labels).float().mean().item()


loaders = {task: make_loader(task) for task in RULES}
teachers = {task: Net(64, [task]) for task in RULES}
student = Net(24, RULES)
with tempfile.TemporaryDirectory() as folder:
    for task, teacher in teachers.items():
        config = TrainingConfig(output_dir=f"{folder}/{task}", progress_bar=False)
        with BasicTrainer(config, teacher, adaptor) as trainer:
            trainer.train(torch.optim.AdamW(teacher.parameters(), lr=5e-3), loaders[task], num_steps=300)
    distiller = MultiTaskDistiller(
        TrainingConfig(output_dir=f"{folder}/student", progress_bar=False),
        DistillationConfig(temperature=2, kd_loss_type="kl"),
        model_T=teachers,
        model_S=student,
        adaptor_T=dict.fromkeys(RULES, adaptor),
        adaptor_S=dict.fromkeys(RULES, adaptor),
    )
    with distiller:
        distiller.train(torch.optim.AdamW(student.parameters(), lr=5e-3), loaders, num_steps=600, tau=0.5)
for task, teacher in teachers.items():
    print(f"{task}: teacher {accuracy(teacher, task):.1f}% right, student {accuracy(student, task):.1f}%")
