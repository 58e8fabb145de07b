"""Several processes: the script of one process, started by torchrun.

    torchrun --nproc_per_node 2 examples/by_feature/distributed.py
    python examples/by_feature/distributed.py --batch-size 64

Give the distiller plain models and a plain loader: it shares the batches out among the processes and averages the
gradients. Two processes with 32 rows each make the steps of one with 64, so both commands above end with the same
student. Without a GPU the processes talk through gloo; with several, each takes its own.
"""

import argparse
import os

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig


def adaptor(batch, outputs):
    return {"logits": outputs}


def callback(model, step):
    """Look at the student, the model itself without any wrapper: called on every process, the same on all."""
    total = sum(parameter.detach().double().abs().sum().item() for parameter in model.parameters())
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"step {step}: sum of the weights' sizes {total:.4f}")


def main(batch_size, output_dir):
    torch.manual_seed(0)  # the same on every process, so that all begin with the same models
    teacher = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 3))
    student = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    # shuffle=True works as well; in the order of the rows, the two commands can be compared.
    loader = DataLoader(TensorDataset(torch.randn(1280, 8)), batch_size=batch_size)
    distiller = GeneralDistiller(
        # Every parameter of this student is used in each step; saying so saves torch a search.
        TrainingConfig(output_dir=output_dir, find_unused_parameters=False, progress_bar=False),
        DistillationConfig(temperature=2),
        model_T=teacher,
        model_S=student,
        adaptor_T=adaptor,
        adaptor_S=adaptor,
    )
    with distiller:
        distiller.train(torch.optim.SGD(student.parameters(), lr=1.0), loader, num_epochs=3, callback=callback)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32, help="of each process")
    parser.add_argument("--output", default="runs/distributed", help="folder of the checkpoints, for all processes")
    options = parser.parse_args()
    main(options.batch_size, options.output)
