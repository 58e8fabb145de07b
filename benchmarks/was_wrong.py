"""Show that every defect of TextBrewer 0.2.1 listed here is one there, and none here.

Runs ``tests/test_was_wrong`` with the original TextBrewer 0.2.1.post1, in an environment of its own, and with this
library, and writes ``docs/was-wrong.md``. The exit status is 1 if a test passes on the original or fails here.

    python benchmarks/was_wrong.py [--original-python PATH]
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
SUITE = ROOT / "tests" / "test_was_wrong"
ORDER = ("loop", "configurations", "caching", "adaptors_and_batches", "matches", "losses", "multi_gpu", "utilities")
LONGEST = 150
INTRODUCTION = """# What was wrong with TextBrewer 0.2.1

Written by `python benchmarks/was_wrong.py`, which anyone can run; do not edit by hand.

Every defect of TextBrewer 0.2.1.post1 that this library set out to mend has a test in `tests/test_was_wrong`. The tests
use torch and TextBrewer's public API alone, so the same files run with the original, in an environment of its own, and
with this library: each must fail there and pass here. *There* is what the original did instead, in the first of the
test's cases.
"""

Results = Mapping[str, Sequence[str | None]]
"""By test: for each of its cases the failure's first line, ``None`` where it passed."""


@dataclass(frozen=True)
class Item:
    """One defect: the test's file and function, the defect, and how it is shown."""

    file: str
    test: str
    defect: str
    note: str

    @property
    def key(self) -> str:
        """Names the test in the results."""
        return f"{self.file}::{self.test}"


def suite_files() -> list[Path]:
    """Return the suite's files in the order of the report.

    Raises:
        ValueError: if there are others than the report knows.
    """
    files = {path.stem.removeprefix("test_"): path for path in SUITE.glob("test_*.py")}
    if set(files) != set(ORDER):
        raise ValueError(f"ORDER must name the files of {SUITE.name}, {sorted(files)}, got {sorted(ORDER)}")
    return [files[name] for name in ORDER]


def paragraphs(docstring: str | None) -> tuple[str, str]:
    """Return a docstring's first line and the rest, each as one line."""
    first, _, rest = (docstring or "").strip().partition("\n")
    return first, " ".join(rest.split())


def items(file: Path) -> Iterator[Item]:
    """Yield the defects of a file of the suite: its test functions' docstrings."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield Item(file.stem, node.name, *paragraphs(ast.get_docstring(node)))


def run(python: str, library: Path | None = None) -> tuple[str, Results]:
    """Run the suite with an environment's textbrewer (or ``library``'s); return its version and the results."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
    if library is not None:
        environment["PYTHONPATH"] = str(library)
    # A copy outside the checkout, from where the original's environment cannot import this library.
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(SUITE, Path(folder, SUITE.name), ignore=shutil.ignore_patterns("__pycache__"))
        ask = "import textbrewer, torch; print('textbrewer', textbrewer.__version__ + ', torch', torch.__version__)"
        version = subprocess.run(
            [python, "-W", "ignore", "-c", ask],
            env=environment,
            cwd=folder,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        print(f"running the tests with {version.stdout.strip()} ...", file=sys.stderr)
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=report.xml", SUITE.name]
        done = subprocess.run(command, env=environment, cwd=folder, check=False, stdout=subprocess.PIPE, text=True)
        report = Path(folder, "report.xml")
        if not report.exists():
            raise SystemExit(f"{done.stdout}\n{python} must have pytest, see the error above")
        return version.stdout.strip(), read(report)


def read(report: Path) -> Results:
    """Return the results in a JUnit report."""
    results: dict[str, list[str | None]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("name", "").partition("[")[0]
        key = f"{case.get('classname', '').rpartition('.')[2]}::{name}"
        bad = next((part for part in case if part.tag in ("failure", "error", "skipped")), None)
        message = None if bad is None else bad.get("message", "").split("\n")[0]
        results.setdefault(key, []).append(message)
    return results


def shown(message: str) -> str:
    """Return a failure's first line, as it reads in a table."""
    message = message.removeprefix("AssertionError: ").removeprefix("Failed: ").replace("|", "\\|")
    return message if len(message) <= LONGEST else message[: LONGEST - 4] + " ..."


def row(item: Item, theirs: Results, ours: Results) -> tuple[bool, str]:
    """Return whether an item is as it must be, and its row."""
    there, here = theirs.get(item.key, []), ours.get(item.key, [])
    good = bool(there) and all(case is not None for case in there) and bool(here) and not any(here)
    cases = f", {len(here)} cases" if len(here) > 1 else ""
    failure = "**passes**" if None in there else f"{shown(there[0] or '')}" if there else "**not run**"
    success = "passes" if here and not any(here) else "**fails**"
    defect = f"{item.defect} {item.note}".strip()
    return good, f"| {defect} | {failure} | {success} | `{item.test}`{cases} |"


def report(theirs: Results, ours: Results) -> tuple[int, int, str]:
    """Return the numbers of items, of those that are as they must be, and the tables."""
    lines: list[str] = []
    verdicts: list[bool] = []
    for file in suite_files():
        title, note = paragraphs(ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))))
        lines += [f"\n## {title}\n", *([f"{note}\n"] if note else [])]
        lines += ["| defect | there | here | test |", "|---|---|---|---|"]
        for item in items(file):
            good, line = row(item, theirs, ours)
            verdicts.append(good)
            lines.append(line)
    return len(verdicts), sum(verdicts), "\n".join(lines) + "\n"


def original_python(given: str | None) -> str:
    """Return the python of the original's environment, made where none is given, with pytest in it."""
    if given is None:
        sys.path.insert(0, str(ROOT / "benchmarks" / "parity"))
        from compare import make_original

        folder = ROOT / "runs" / "parity"
        folder.mkdir(parents=True, exist_ok=True)
        python: str = make_original(folder / "original")
    else:
        python = str(Path(given).absolute()) if Path(given).exists() else given
    if subprocess.run([python, "-c", "import pytest"], check=False, stderr=subprocess.DEVNULL).returncode:
        subprocess.run([python, "-m", "pip", "install", "--quiet", "pytest"], check=True)
    return python


def main() -> int:
    """Run both sides, write the report, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original-python", help="python of an environment that has the original; default: make one")
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "was-wrong.md", help="where the tables go")
    options = parser.parse_args()
    version_theirs, theirs = run(original_python(options.original_python))
    if not version_theirs.startswith("textbrewer 0.2.1"):
        raise SystemExit(f"the original must be textbrewer 0.2.1.post1, got {version_theirs}")
    version_ours, ours = run(sys.executable, ROOT)
    count, good, tables = report(theirs, ours)
    summary = f"{good} of {count} tests fail there and pass here. There: {version_theirs}. Here: {version_ours}."
    print(summary)
    options.report.write_text(f"{INTRODUCTION}\n{summary}\n{tables}", encoding="utf-8")
    return 0 if good == count else 1


if __name__ == "__main__":
    sys.exit(main())
