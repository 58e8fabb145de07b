"""The quickstart's output folder, measurements, table and curves."""

import json
import shutil
import statistics
import sys
import time

import torch


def begin(output, settings, restart):
    """Make the output folder; refuse to go on with other settings than it was begun with.

    Args:
        output: the folder.
        settings: what must stay the same for an interrupted experiment to be gone on with.
        restart: forget what is there (only what this script wrote is deleted).
    """
    path = output / "settings.json"
    if restart and path.exists():
        for folder in output.glob("seed*"):
            shutil.rmtree(folder)
        path.unlink()
    if path.exists() and read(path) != settings:
        sys.exit(
            f"{output} holds an experiment with the settings {read(path)}, not {settings}: add --restart to begin "
            "anew there, or name another folder with --output"
        )
    write(path, json.dumps(settings))


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def write(path, text):
    """Write a file whole or, if interrupted, not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


@torch.no_grad()
def evaluate(model, batches):
    """Return accuracy in percent and mean cross-entropy."""
    model.eval()
    right, loss, count = 0, 0.0, 0
    for batch in batches:
        outputs = model(**{name: column.to(model.device) for name, column in batch.items()})
        right += int((outputs.logits.argmax(dim=-1).cpu() == batch["labels"]).sum())
        loss += float(outputs.loss) * len(batch["labels"])
        count += len(batch["labels"])
    return {"accuracy": 100 * right / count, "loss": loss / count}


def measure(models, folder, rows, tokenizer):
    """Return accuracy, sizes and latency of each model of one seed.

    Args:
        models: by role.
        folder: where their trainings wrote, in a folder a role.
        rows: ``(text, label)``, the texts to time the models on.
        tokenizer: theirs.
    """
    times = latencies(models, [text for text, _ in rows], tokenizer)
    measured = {}
    for role, model in models.items():
        curve = sorted((int(step), values) for step, values in read(folder / role / "curve.json").items())
        last, values = curve[-1]
        measured[role] = {
            "accuracy": values["accuracy"],
            "layers": model.config.num_hidden_layers,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "file_bytes": (folder / role / f"gs{last}.pkl").stat().st_size,
            "latency_ms": times[role],
            "curve": [{"step": step, **values} for step, values in curve],
        }
    return measured


def latencies(models, texts, tokenizer):
    """Return each model's median milliseconds for one text on the CPU; the models take turns, text by text."""
    times = {role: [] for role in models}
    for model in models.values():
        model.to("cpu").eval()
    with torch.inference_mode():
        for text in texts:
            inputs = tokenizer(text, return_tensors="pt")
            for role, model in models.items():
                start = time.perf_counter()
                model(**inputs)
                times[role].append(1000 * (time.perf_counter() - start))
    return {role: statistics.median(values) for role, values in times.items()}


def spread(values):
    """Return one value as text, several as ``mean ± standard deviation``."""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def table(seeds, names):
    """Return a Markdown table.

    Args:
        seeds: what :func:`measure` returned, for each seed.
        names: what to call each role.
    """
    rows = [["model", "layers", "accuracy, %", "of the teacher's, %", "parameters, M", "file, MB", "latency, ms"]]
    for role, name in names.items():
        results = [measured[role] for measured in seeds]
        shares = [100 * measured[role]["accuracy"] / measured["teacher"]["accuracy"] for measured in seeds]
        rows.append(
            [
                name,
                str(results[0]["layers"]),
                spread([result["accuracy"] for result in results]),
                spread(shares),
                f"{results[0]['parameters'] / 1e6:.1f}",
                f"{results[0]['file_bytes'] / 1e6:.1f}",
                spread([result["latency_ms"] for result in results]),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    padded = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def conclusion(seeds):
    """Return one sentence: what the student keeps of the teacher's accuracy, and gains over each baseline."""

    def mean(role):
        return statistics.mean(measured[role]["accuracy"] for measured in seeds)

    student = mean("student")
    return (
        f"The distilled student keeps {100 * student / mean('teacher'):.1f}% of the teacher's accuracy; against the "
        f"same student without a teacher: {student - mean('pretrained'):+.1f} points (layers of the pretrained model), "
        f"{student - mean('finetuned'):+.1f} (of the fine-tuned one)."
    )


def draw(seeds, names, path):
    """Draw held-out accuracy and loss over the steps, one thin line a seed.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, value in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
        for color, (role, name) in enumerate(names.items()):
            for number, measured in enumerate(seeds):
                curve = measured[role]["curve"]
                axes.plot(
                    [point["step"] for point in curve],
                    [point[value] for point in curve],
                    color=f"C{color}",
                    marker=".",
                    label=None if number else name,
                )
        axes.set_xlabel("optimiser steps")
        axes.set_ylabel("held-out accuracy, %" if value == "accuracy" else "held-out loss (cross-entropy)")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)


def finish(output, seeds, names, facts):
    """Print the table and write it with all numbers and the curves.

    Args:
        output: the folder.
        seeds: what :func:`measure` returned, for each seed.
        names: what to call each role.
        facts: what else to keep with the numbers.
    """
    threads = torch.get_num_threads()
    over = "" if len(seeds) == 1 else f" Mean ± standard deviation over {len(seeds)} seeds."
    text = (
        f"{table(seeds, names)}\n\n{conclusion(seeds)}\n\nAccuracy on {facts['held_out']} held-out reviews after the "
        f"last step; files in float32; latency: median for one review on the CPU, {threads} threads.{over}"
    )
    print(f"\n{text}")
    write(output / "table.md", text + "\n")
    write(output / "results.json", json.dumps({**facts, "threads": threads, "seeds": seeds}, indent=1))
    try:
        draw(seeds, names, output / "curves.png")
    except ImportError:
        print("curves.png is left out, since matplotlib is missing: pip install -e '.[plot]'")
    print(f"\ntable.md, results.json and curves.png are in {output}, the students in its folders seed*/")
