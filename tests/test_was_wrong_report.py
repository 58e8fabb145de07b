"""The report of ``benchmarks/was_wrong.py``: how it reads results, and that the one in docs/ is up to date."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def was_wrong():
    spec = importlib.util.spec_from_file_location("was_wrong", ROOT / "benchmarks" / "was_wrong.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_every_test_is_in_the_report(was_wrong):
    written = (ROOT / "docs" / "was-wrong.md").read_text(encoding="utf-8")
    items = [item for file in was_wrong.suite_files() for item in was_wrong.items(file)]
    assert len(items) > 60
    missing = [item.key for item in items if f"| {item.defect}" not in written or f"`{item.test}`" not in written]
    assert not missing, "run python benchmarks/was_wrong.py"
    for bad in ("**passes**", "**fails**", "**not run**"):
        assert bad not in written


def test_every_test_says_what_was_wrong(was_wrong):
    for file in was_wrong.suite_files():
        for item in was_wrong.items(file):
            assert item.defect.endswith("."), item.key


REPORT = """<testsuites><testsuite>
<testcase classname="test_was_wrong.test_loop" name="test_a[one]">
  <failure message="AssertionError: 2 | 3&#10;more"/></testcase>
<testcase classname="test_was_wrong.test_loop" name="test_a[two]"/>
<testcase classname="test_was_wrong.test_loop" name="test_b"><error message="no such fixture"/></testcase>
<testcase classname="test_was_wrong.test_losses" name="test_b"><skipped message="no GPU"/></testcase>
</testsuite></testsuites>"""


def test_results_are_read(was_wrong, tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    assert was_wrong.read(tmp_path / "report.xml") == {
        "test_loop::test_a": ["AssertionError: 2 | 3", None],
        "test_loop::test_b": ["no such fixture"],
        "test_losses::test_b": ["no GPU"],
    }


@pytest.mark.parametrize(
    ("theirs", "ours", "good", "cells"),
    [
        ({"f::t": ["AssertionError: 2 | 3", "x"]}, {"f::t": [None, None]}, True, [r"2 \| 3", "passes", "`t`, 2 cases"]),
        ({"f::t": ["x", None]}, {"f::t": [None, None]}, False, ["**passes**", "passes", "`t`, 2 cases"]),
        ({"f::t": ["x"]}, {"f::t": ["y"]}, False, ["x", "**fails**", "`t`"]),
        ({"f::t": ["x"]}, {}, False, ["x", "**fails**", "`t`"]),
        ({}, {"f::t": [None]}, False, ["**not run**", "passes", "`t`"]),
    ],
    ids=["as it must be", "a case passes there", "fails here", "not run here", "not run there"],
)
def test_rows(was_wrong, theirs, ours, good, cells):
    item = was_wrong.Item("f", "t", "It was wrong.", "Shown so.")
    expected = f"| It was wrong. Shown so. | {' | '.join(cells)} |"
    assert was_wrong.row(item, theirs, ours) == (good, expected)
