"""Trajectories against those of the original TextBrewer 0.2.1.post1, recorded in its own environment.

The oracle, ``data/parity_reference.json``, was written by the original (``benchmarks/parity/compare.py --record``): the
student's movement in each case, as eight projections on fixed random directions. All cases, side by side with the
original: ``benchmarks/parity/compare.py``.
"""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import textbrewer

HERE = Path(__file__).parent
REFERENCE = json.loads((HERE / "data" / "parity_reference.json").read_text())
TOLERANCE = 1e-3


@pytest.fixture
def run_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The benchmark's runner, with torch's numbers of threads as it was when the reference was recorded."""
    monkeypatch.syspath_prepend(str(HERE.parent / "benchmarks" / "parity"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module("run_one")
    torch.set_num_threads(threads)


def test_reference_covers_every_distiller(run_one: ModuleType) -> None:
    cases = {case.name: case for case in run_one.CASES if case.reference}
    assert set(cases) == set(REFERENCE["cases"])
    assert len({case.distiller for case in cases.values()}) == 5


@pytest.mark.parametrize("name", REFERENCE["cases"])
def test_movement_is_the_original_s(run_one: ModuleType, name: str) -> None:
    case = next(case for case in run_one.CASES if case.name == name)
    expected = REFERENCE["cases"][name]
    path = run_one.run_case(case, textbrewer)["path"].double()
    theirs = torch.tensor(expected["projections"], dtype=torch.float64)
    assert len(path) == expected["steps"]
    difference = float((path[-1] - theirs).norm() / theirs.norm())
    assert difference < TOLERANCE, f"{name}: recorded with {REFERENCE['recorded_with']}, here torch {torch.__version__}"
