"""Accuracy of students distilled with and without a teacher cache, on SST-2.

    python benchmarks/cache_accuracy.py                         # the table of the docs: 3 seeds, 12,000 training rows
    python benchmarks/cache_accuracy.py --rows 4000 --seeds 2
    python benchmarks/cache_accuracy.py --size tiny             # only to try the script, in seconds

The quickstart's teacher (MiniLM, fine-tuned once, on these rows) is distilled into three of its layers with the
quickstart's settings, without a cache and with caches of float16 and int8, three seeds each; the accuracy is that on
the 872 dev rows. A seed orders the batches; student and teacher are the same in all cells, and dropout is 0. The seeds
share one cache a storage, so the first of them fills it. Every finished cell is kept in runs/cache_accuracy: the same
command goes on after the last one.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import headline
import torch
import transformers
import workers
from headline import ROOT
from torch.utils.data import DataLoader

import textbrewer

sys.path.insert(0, str(ROOT / "examples"))
import quickstart
import quickstart_report
from quickstart_data import make_batches

STORAGES = ("none", "float16", "int8")


def read_data(rows: int, held_out: int) -> dict[str, Any]:
    """Return batches of like length, of fixed training rows spread over the file and of the dev rows."""
    train = headline.sst2_rows("train")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    tokenizer = transformers.AutoTokenizer.from_pretrained(quickstart.get_model_path())
    return {
        "train": make_batches([train[number] for number in order[:rows]], tokenizer),
        "held_out": make_batches(headline.sst2_rows("dev")[:held_out], tokenizer),
    }


def arguments(model: Any, role: str, data: dict[str, Any], epochs: int, seed: int) -> dict[str, Any]:
    """Return the arguments of ``train()``: the quickstart's."""
    torch.manual_seed(seed)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    steps = epochs * len(data["train"])
    return {
        "optimizer": torch.optim.AdamW(groups, lr=quickstart.RATES[role], fused=True),
        "dataloader": DataLoader(data["train"], batch_size=None, shuffle=True),
        "num_epochs": epochs,
        "scheduler_class": transformers.get_linear_schedule_with_warmup,
        "scheduler_args": {"num_warmup_steps": steps // 10, "num_training_steps": steps},
        "max_grad_norm": 1.0,
    }


def training_config(folder: Path | str) -> Any:
    """Return settings without checkpoints but the last."""
    return textbrewer.TrainingConfig(output_dir=str(folder), ckpt_epoch_frequency=10**6, save_total_limit=1)


def make_teacher(data: dict[str, Any], options: argparse.Namespace) -> Any:
    """Return the fine-tuned teacher, from the disk if it is there."""
    path = options.output / "teacher.pt"
    torch.manual_seed(0)
    teacher = transformers.AutoModelForSequenceClassification.from_pretrained(quickstart.get_model_path(), num_labels=2)
    if path.exists():
        teacher.load_state_dict(torch.load(path, weights_only=True))
        return teacher
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = textbrewer.BasicTrainer(training_config(folder), teacher, adaptor="auto")
        with trainer:
            trainer.train(**arguments(teacher, "teacher", data, max(1, options.epochs - 1), 0))
    unfinished = path.with_suffix(".tmp")
    torch.save(teacher.state_dict(), unfinished)
    unfinished.replace(path)
    print(f"teacher: fine-tuned in {time.perf_counter() - start:.0f} s", flush=True)
    return teacher


def distil(teacher: Any, data: dict[str, Any], storage: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Distil a student and return its accuracy and the seconds."""
    student = quickstart.shorten(teacher, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    matches = [
        {"layer_T": 2 * layer, "layer_S": layer, "feature": "hidden", "loss": "hidden_mse", "weight": 3}
        for layer in range(len(quickstart.LAYERS) + 1)
    ]
    learn = textbrewer.DistillationConfig(temperature=4, kd_loss_type="kl", intermediate_matches=matches)
    cache = None
    if storage != "none":
        cache = headline.make_cache(textbrewer, options.output / f"cache-{storage}", storage)
    given = {} if cache is None else {"teacher_cache": cache}
    with tempfile.TemporaryDirectory() as folder:
        distiller = textbrewer.GeneralDistiller(
            training_config(folder), learn, copy.deepcopy(teacher), student, "auto", "auto", **given
        )
        start = time.perf_counter()
        with distiller, headline.quiet():
            distiller.train(**arguments(student, "student", data, options.epochs, seed))
        seconds = time.perf_counter() - start
    measured = {**quickstart_report.evaluate(student, data["held_out"]), "seconds": seconds}
    if cache is not None:
        info = cache.info()
        measured |= {"bytes": info.bytes, "entries": info.entries, "waited": info.seconds_waited}
    workers.close(cache)
    return measured


def percent(values: list[float]) -> str:
    """Return mean, deviation and range."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation} ({min(values):.2f} to {max(values):.2f})"


def report(cells: dict[tuple[str, int], dict[str, Any]], seeds: int) -> list[str]:
    """Print the table and return which storages are outside the spread of no cache."""
    rows, outside = [], []
    plain = [cells["none", seed]["accuracy"] for seed in range(seeds)]
    for storage in STORAGES:
        found = [cells[storage, seed] for seed in range(seeds)]
        accuracies = [cell["accuracy"] for cell in found]
        seconds = [cell["seconds"] for cell in found]
        row = ["no cache" if storage == "none" else f"cache, {storage}", percent(accuracies)]
        row.append(f"{statistics.mean(accuracies) - statistics.mean(plain):+.2f}")
        row.append(f"{statistics.mean(cell['loss'] for cell in found):.4f}")
        row.append(", ".join(f"{value:.0f}" for value in seconds))
        row.append(f"{found[-1]['bytes'] / 1e6:.0f}" if storage != "none" else "")
        rows.append(row)
        if not min(plain) <= statistics.mean(accuracies) <= max(plain):
            outside.append(storage)
    header = ["student", f"accuracy, %, of {seeds} seeds (range)", "to no cache", "dev loss", "training, s, by seed"]
    print(headline.markdown([*header, "cache, MB"], rows))
    return outside


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=headline.SIZES, default="full", help="tiny: 96 rows, 1 epoch, 2 seeds")
    parser.add_argument("--rows", type=int, help="training rows (default 12000)")
    parser.add_argument("--epochs", type=int, help="of the students; the teacher one fewer (default 3)")
    parser.add_argument("--seeds", type=int, help="default 3")
    parser.add_argument("--storages", default=",".join(STORAGES), help="cells to run, comma-separated (default: all)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="default runs/cache_accuracy, or runs/cache_accuracy-tiny")
    parser.add_argument("--restart", action="store_true", help="begin anew instead of going on")
    options = parser.parse_args()
    tiny = options.size == "tiny"
    options.rows = options.rows or (96 if tiny else 12000)
    options.epochs = options.epochs or (1 if tiny else 3)
    options.seeds = options.seeds or (2 if tiny else 3)
    options.output = options.output or ROOT / "runs" / ("cache_accuracy-tiny" if tiny else "cache_accuracy")
    options.storages = options.storages.split(",")
    if not set(options.storages) <= set(STORAGES):
        parser.error(f"--storages must be of {', '.join(STORAGES)}, got {','.join(options.storages)}")
    return options


def begin(options: argparse.Namespace) -> None:
    """Make the output folder; refuse to go on with other settings than it was begun with."""
    settings = {"rows": options.rows, "epochs": options.epochs}
    path = options.output / "settings.json"
    if options.restart and path.exists():
        for storage in STORAGES:
            shutil.rmtree(options.output / f"cache-{storage}", ignore_errors=True)
        for written in (path, options.output / "teacher.pt", *options.output.glob("*-seed*.json")):
            written.unlink(missing_ok=True)
    if path.exists() and json.loads(path.read_text()) != settings:
        raise SystemExit(f"{options.output} was begun with {path.read_text()}, not {settings}: add --restart")
    options.output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings))


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    begin(options)
    headline.print_header(options.threads, textbrewer=textbrewer.__version__)
    data = read_data(options.rows, 64 if options.size == "tiny" else 872)
    teacher = make_teacher(data, options)
    accuracy = quickstart_report.evaluate(teacher, data["held_out"])["accuracy"]
    print(
        f"teacher: {accuracy:.2f}% on {sum(len(batch['labels']) for batch in data['held_out'])} dev rows\n", flush=True
    )
    cells: dict[tuple[str, int], dict[str, Any]] = {}
    for seed in range(options.seeds):
        for storage in options.storages:
            path = options.output / f"{storage}-seed{seed}.json"
            if not path.exists():
                measured = distil(teacher, data, storage, seed, options)
                path.with_suffix(".tmp").write_text(json.dumps(measured))
                path.with_suffix(".tmp").replace(path)
            cells[storage, seed] = json.loads(path.read_text())
            cell = cells[storage, seed]
            print(f"seed {seed}, {storage}: {cell['accuracy']:.2f}%, {cell['seconds']:.0f} s", flush=True)
    if set(options.storages) != set(STORAGES):
        return 0
    print()
    outside = report(cells, options.seeds)
    verdict = f"**not met** by {', '.join(outside)}" if outside else "met"
    print(f"\nMeans within the seed spread (least to largest) without a cache asked: {verdict}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
