"""Span reading comprehension in Chinese: a small BERT trained on CMRC 2018 or DRCD, distilled into a smaller one.

    python examples/span_qa/distill.py --dataset cmrc2018 --data path/to/squad-style-data [--fast]

Both models start from random weights, with the characters of the training questions as vocabulary, so that nothing has
to be downloaded. That shows the flow and no more: good answers need a pretrained teacher (load it in main()).
"""

import argparse
from functools import partial
from pathlib import Path

import squad
import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForQuestionAnswering, get_linear_schedule_with_warmup

from textbrewer import BasicTrainer, DistillationConfig, GeneralDistiller, TrainingConfig

# The official training files are larger; the development files do for a demonstration.
FILES = {"cmrc2018": ("cmrc2018_dev.json", "cmrc2018_trial.json"), "drcd": ("DRCD_dev.json", "DRCD_test.json")}
LENGTH, STRIDE, LONGEST_ANSWER = 256, 128, 30
MATCHES = [
    {"layer_T": 0, "layer_S": 0, "feature": "hidden", "loss": "hidden_mse", "weight": 1, "proj": "linear"},
    {"layer_T": 4, "layer_S": 2, "feature": "hidden", "loss": "hidden_mse", "weight": 1, "proj": "linear"},
    {"layer_T": [4, 4], "layer_S": [2, 2], "feature": "hidden", "loss": "mmd", "weight": 1},
]


def adaptor(batch, outputs):
    """Say what the outputs are: two heads, start and end. adaptor="auto" would do the same."""
    padding = batch["attention_mask"] == 0
    return {
        "logits": [head.masked_fill(padding, -1e4) for head in (outputs.start_logits, outputs.end_logits)],
        "labels": [batch["start_positions"], batch["end_positions"]],
        "hidden": outputs.hidden_states,
        "losses": outputs.loss,
        "inputs_mask": batch["attention_mask"],
    }


def collate(rows):
    """Pad rows; those of training have the answer's place."""
    columns = {"input_ids": 0, "token_type_ids": 0}
    batch = {
        name: torch.nn.utils.rnn.pad_sequence([torch.tensor(row[name]) for row in rows], True, padding)
        for name, padding in columns.items()
    }
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    if "start_positions" in rows[0]:
        batch |= {name: torch.tensor([row[name] for row in rows]) for name in ("start_positions", "end_positions")}
    return batch


def training_rows(questions, vocab):
    """Return the windows that hold the whole answer."""
    rows = []
    for item in questions:
        start, end = squad.span(item)
        for row in squad.windows(item, vocab, LENGTH, STRIDE):
            place = [row["front"] + character - row["first"] for character in (start, end)]
            if row["front"] <= place[0] and place[1] < len(row["input_ids"]) - 1:
                rows.append({**row, "start_positions": place[0], "end_positions": place[1]})
    return rows


def evaluate(model, questions, vocab):
    """Return exact match and F1 in percent; a question's answer is the best span of all its windows."""
    device = next(model.parameters()).device
    totals = torch.zeros(2)
    model.eval()
    for item in questions:
        rows = squad.windows(item, vocab, LENGTH, STRIDE)
        with torch.no_grad():
            outputs = model(**{name: column.to(device) for name, column in collate(rows).items()})
        best, answer = float("-inf"), ""
        for number, row in enumerate(rows):
            inside = slice(row["front"], len(row["input_ids"]) - 1)
            sums = outputs.start_logits[number, inside, None] + outputs.end_logits[number, None, inside]
            allowed = torch.ones_like(sums).triu().tril(LONGEST_ANSWER - 1).bool()
            value, place = sums.masked_fill(~allowed, float("-inf")).flatten().max(dim=0)
            if value > best:
                best, (start, end) = value, divmod(place.item(), len(sums))
                answer = item.passage[row["first"] + start : row["first"] + end + 1]
        totals += torch.tensor(squad.score(answer, [text for text, _ in item.answers]))
    return (100 * totals / len(questions)).tolist()


def report(model, step, name, questions, vocab):
    """Evaluate at each checkpoint: the callback."""
    print("{}, step {}: EM {:.1f}, F1 {:.1f}".format(name, step, *evaluate(model, questions, vocab)), flush=True)


def optimisation(model, loader, epochs):
    """Return the arguments of train() that both trainings need: AdamW, and warm-up before a linear decay."""
    steps = len(loader) * epochs
    return {
        "optimizer": torch.optim.AdamW(model.parameters(), lr=5e-4),
        "dataloader": loader,
        "num_epochs": epochs,
        "scheduler_class": get_linear_schedule_with_warmup,
        "scheduler_args": {"num_warmup_steps": steps // 10, "num_training_steps": steps},
        "max_grad_norm": 1.0,
    }


def main(options):
    torch.manual_seed(0)
    train_set, eval_set = (squad.read(options.data / name, options.dataset) for name in FILES[options.dataset])
    usable = [item for item in train_set if squad.span(item)]
    print(f"{len(train_set) - len(usable)} of {len(train_set)} questions dropped: no answer stands where it says")
    train_set, eval_set = usable[: options.rows], eval_set[: options.eval_rows]
    vocab = squad.vocabulary(train_set)
    loader = DataLoader(training_rows(train_set, vocab), batch_size=8, shuffle=True, collate_fn=collate)
    common = {"vocab_size": len(vocab), "max_position_embeddings": LENGTH, "type_vocab_size": 3}
    size = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 768}
    teacher = BertForQuestionAnswering(BertConfig(**common, **size))
    size = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
    student = BertForQuestionAnswering(BertConfig(**common, **size))
    callback = partial(report, questions=eval_set, vocab=vocab)
    callback(student, 0, "student")

    with BasicTrainer(TrainingConfig(output_dir=options.output / "teacher"), teacher, adaptor) as trainer:
        trainer.train(callback=partial(callback, name="teacher"), **optimisation(teacher, loader, options.epochs))

    train_config = TrainingConfig(output_dir=options.output / "student")
    distill_config = DistillationConfig(temperature=8, intermediate_matches=MATCHES)
    train = optimisation(student, loader, options.epochs)
    with GeneralDistiller(train_config, distill_config, teacher, student, adaptor, adaptor) as distiller:
        distiller.train(callback=partial(callback, name="student"), output_hidden_states=True, **train)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the dataset's files")
    parser.add_argument("--dataset", choices=sorted(FILES), default="cmrc2018")
    parser.add_argument("--rows", type=int, default=1000, help="training questions")
    parser.add_argument("--eval-rows", type=int, default=500, help="evaluation questions")
    parser.add_argument("--epochs", type=int, default=4, help="of both trainings")
    parser.add_argument("--output", type=Path, default=Path("runs/span_qa"))
    parser.add_argument("--fast", action="store_true", help="a short run: 100 questions, 20 of evaluation, 2 epochs")
    given = parser.parse_args()
    if given.fast:
        given.rows, given.eval_rows, given.epochs = 100, 20, 2
    main(given)
