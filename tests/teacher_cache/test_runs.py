"""Runs with a teacher cache: resumed, interrupted, killed, out of space, with damaged rows, with rows that change."""

import dataclasses

import pytest

from tests.engine.runs import SCENARIOS, Run, checkpoints, equal

RESUMED = [name for name, item in SCENARIOS.items() if item.kind != "trainer" and "cached" not in name]


@pytest.fixture
def with_cache(monkeypatch, tmp_path):
    """``with_cache(name, folder)``: the scenario of that name gets a teacher cache in a folder."""

    def change(name, folder="cache"):
        scenario = SCENARIOS[name]
        distill = {**scenario.distill, "teacher_cache": str(tmp_path / folder)}
        monkeypatch.setitem(SCENARIOS, name, dataclasses.replace(scenario, distill=distill))

    return change


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_runs_end_the_same(name, with_cache, tmp_path):
    with_cache(name)
    whole = Run(name, tmp_path / "whole").train().state()
    for path in checkpoints(tmp_path / "whole")[:-1]:
        resumed = Run(name, tmp_path / path.name, seed=7).train(resume_from=path).state()
        wrong = [key for key in whole if not equal(whole[key], resumed[key])]
        assert not wrong, f"{path.name}: {wrong}"
