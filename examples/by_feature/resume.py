"""Resuming: a run that is interrupted and resumed ends with the very weights of one that never stopped.

    python examples/by_feature/resume.py

Beyond the smallest script of docs/quickstart.md there are two lines: ``ckpt_steps``, and ``resume_from="latest"``.
"""

import os
import signal
import tempfile

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig

torch.manual_seed(0)
POINTS = torch.randn(960, 8)
TEACHER = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 3))


def adaptor(batch, outputs):
    return {"logits": outputs}


def train(output_dir, interrupt_at=None):
    """Train a student for 90 steps; the model, the optimiser and the data are made as in the first run, each time."""
    torch.manual_seed(1)
    student = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1), nn.Tanh(), nn.Linear(8, 3))
    loader = DataLoader(TensorDataset(POINTS), batch_size=32, shuffle=True)
    distiller = GeneralDistiller(
        TrainingConfig(output_dir=output_dir, ckpt_steps=20, progress_bar=False),  # a checkpoint every 20 steps
        DistillationConfig(temperature=2),
        model_T=TEACHER,
        model_S=student,
        adaptor_T=adaptor,
        adaptor_S=adaptor,
    )

    def callback(model, step):
        print(f"  checkpoint at step {step}")
        if step == interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)  # what Ctrl-C sends: the step under way is finished, and saved

    with distiller:
        distiller.train(
            torch.optim.AdamW(student.parameters(), lr=1e-2),
            loader,
            num_steps=90,
            callback=callback,
            resume_from="latest",  # the newest checkpoint in output_dir; none yet: from the start
        )
    return nn.utils.parameters_to_vector(student.parameters())


with tempfile.TemporaryDirectory() as folder:
    print("without a stop")
    uninterrupted = train(f"{folder}/whole")
    print("interrupted")
    try:
        train(f"{folder}/stopped", interrupt_at=40)
    except KeyboardInterrupt as stop:
        print(f"  {str(stop).partition(' (')[0]}")
    print("the same command again")
    resumed = train(f"{folder}/stopped")
print(f"largest difference of the weights: {(uninterrupted - resumed).abs().max().item()}")
