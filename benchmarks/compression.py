"""What compression gives on SST-2: pruning, module replacement and low rank, trained in as many steps as the recipes.

    python benchmarks/compression.py              # everything that is missing, teachers included
    python benchmarks/compression.py --list       # what is there and what is missing
    python benchmarks/compression.py --latency    # milliseconds of each shape, at batch 1 and 8 x 128
    python benchmarks/compression.py --report     # docs/compression_results.md
    python benchmarks/compression.py --size tiny  # only to try the script

Rows, steps, teachers, learning rates and the files of the results are those of recipes.py, which see; trainings can be
stopped and gone on with in the same way, and two processes share the work.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import compression_methods
import recipe_grid
import recipe_models
import recipes
import torch
from compression_findings import findings
from compression_methods import BESIDE, COMPRESSED, TASK, Compressed
from headline import markdown
from recipe_grid import Grid
from recipe_methods import METHODS
from recipe_report import NOTHING, paired, spread
from recipe_tasks import TASKS

from textbrewer import compression

SIZES = {"1 x 32": (1, 32), "8 x 128": (8, 128)}
"""Rows and tokens that latency is measured with."""
ROUNDS = 30

PAGE = """\
# What compression gives: experiments

MiniLM-L6, fine-tuned on 16,000 rows of SST-2, made smaller in several ways; each trained in the same steps of the same
batches as the recipes of [the other experiments](experiments.md), whose figures of the student with three layers stand
beside. Scores are accuracy on the development rows, which served no choice.

```
python benchmarks/compression.py             # all trainings that are missing
python benchmarks/compression.py --latency   # milliseconds
python benchmarks/compression.py --report    # this page
```

Pruned are attention heads and feed-forward units: {amounts}.
With "gradual" they go on a cubic schedule over the first 60% of the steps, with "at once" before the first. Distilled:
by KD and the hidden states after each layer, for CoFi with its dynamic matching. Movement's scores are trained by SGD,
which on a tenth of the training rows kept aside gave 90.2 where Adam gave 89.2 (70% pruned, one run each). Percentages
pruned are of the encoder's parameters, without the embeddings.
"""


def write_report(grid: Grid, folder: Any) -> None:
    """Write ``compression_results.md`` from the results."""
    amounts = "; ".join(
        f"{heads:.0%} and {ffn:.0%} of them are {percent}% of the parameters"
        for percent, (heads, ffn) in compression_methods.HEADS_AND_UNITS.items()
    )
    path = grid.results / "latency-compression.json"
    latencies = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    sizes = {size: latencies[size] for size in SIZES if size in latencies}
    parts = [PAGE.format(amounts=amounts), "## What it shows\n", findings(grid, sizes)]
    parts += ["\n## Scores\n", score_table(grid)]
    if latencies:
        parts += ["\n## Latency\n", latency_table(latencies)]
    recipe_grid.write(folder / "compression_results.md", "\n".join(parts) + "\n")
    print(f"{folder / 'compression_results.md'} is written")


def score_table(grid: Grid) -> str:
    """Return the table of scores."""
    teacher = grid.finals(TASK, "teacher")
    rows = []
    for name in (*BESIDE, *COMPRESSED):
        found = grid.finals(TASK, name)
        if not found:
            continue
        scores = [result["score"] for result in found.values()]
        deltas = [mine - theirs for mine, theirs in paired(found, teacher)]
        sizes = [result.get("encoder_parameters") for result in found.values()]
        size = f"{mean(sizes) / 1e6:.2f}" if None not in sizes else NOTHING
        shares = spread([100 * mine / theirs for mine, theirs in paired(found, teacher)])
        rows.append([METHODS[name].title, f"{spread(scores)} ({len(scores)})", f"{mean(deltas):+.1f}", shares, size])
    header = ["method", "accuracy, % (seeds)", "to the teacher", "share of the teacher, %", "encoder, M parameters"]
    return markdown(header, rows)


# ---- latency


def measure_latency(grid: Grid) -> None:
    """Measure the milliseconds of each shape of model, the models in turns, and keep them."""
    base = recipe_models.pretrained(TASKS[TASK], grid.model, 0, grid.tiny)
    models = {"6 layers": base}
    for method in COMPRESSED.values():
        if isinstance(method, Compressed) and method.shape not in models:
            models[method.shape] = method.example(base)
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "rounds": ROUNDS, "versions": recipe_grid.versions()}
    batches = {size: random_batch(*shape) for size, shape in SIZES.items()}
    with tempfile.TemporaryDirectory() as folder:
        exported = {f"6 layers, ONNX {kind}": export(base, kind, batches, Path(folder)) for kind in ("float32", "int8")}
        for size, batch in batches.items():
            calls = {name: runner(model.eval(), batch) for name, model in models.items()}
            found[size] = timed(calls | {name: runner(model, batch) for name, model in exported.items()})
            print(f"{size}: " + ", ".join(f"{name} {times['median']:.1f} ms" for name, times in found[size].items()))
    recipe_grid.write(grid.results / "latency-compression.json", json.dumps(found, indent=1) + "\n")


def random_batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    """Return a batch without padding."""
    ids = torch.randint(1000, 2000, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def export(model: torch.nn.Module, kind: str, batches: dict[str, Any], folder: Path) -> Callable[..., Any]:
    """Return a model as ONNX Runtime runs it, with as many threads as torch; its head is random."""
    path, quantize = folder / f"{kind}.onnx", None if kind == "float32" else kind
    bounds = {} if quantize is None else {"tolerance": 10.0, "agreement": 0.0}
    compression.export(model, path, data=list(batches.values()), quantize=quantize, **bounds)
    return compression.load_exported(path, threads=torch.get_num_threads())


def runner(model: Callable[..., Any], batch: dict[str, Any]) -> Callable[[], Any]:
    """Return a function that runs a model on a batch."""

    @torch.inference_mode()
    def run() -> Any:
        return model(**batch)

    return run


def timed(calls: dict[str, Callable[[], Any]]) -> dict[str, dict[str, float]]:
    """Return median and quartiles of each call's milliseconds; the calls take turns, after a round that warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(ROUNDS + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number:
                times[name].append(1000 * (time.perf_counter() - start))
    found = {}
    for name, values in times.items():
        low, _, high = quantiles(values, n=4)
        found[name] = {"median": round(median(values), 3), "low": round(low, 3), "high": round(high, 3)}
    return found


def latency_table(found: dict[str, Any]) -> str:
    """Return the table of latencies, as milliseconds and as times faster than the whole model."""
    names = list(found[next(iter(SIZES))])
    rows = []
    for name in names:
        row = [name]
        for size in SIZES:
            times, whole = found[size][name], found[size][names[0]]
            row += [
                f"{times['median']:.1f} ({times['low']:.1f} to {times['high']:.1f})",
                f"{whole['median'] / times['median']:.2f}",
            ]
        rows.append(row)
    header = ["model"]
    for size in SIZES:
        header += [f"{size}: ms (quartiles)", "times faster"]
    text = f"Rows x tokens, float32, {found['threads']} thread, {found['rounds']} rounds in turns.\n\n"
    return text + markdown(header, rows)


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line asks for."""
    compression_methods.register()
    options = recipes.parse(arguments)
    if not options.named:
        options.methods = list(COMPRESSED)
    options.tasks = [TASK]
    grid = recipes.set_up(options)
    if options.report:
        write_report(grid, options.docs)
    elif options.list:
        recipes.show(grid, options)
    elif options.latency:
        measure_latency(grid)
    else:
        return recipes.train_missing(grid, options)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Interrupted. The same command goes on where it stopped.")
