"""Compare training trajectories of the original TextBrewer 0.2.1.post1 and of this library.

Both train the cases of ``cases.py``, each in its own environment, from the same seed, on the same data and models, in
fp32 on the CPU with one thread. The measure of a case is the relative difference of the student's movement,
``|| d_ours - d_theirs || / || d_theirs ||``, where ``d`` is the student's last weights minus its first. The exit
status is 1 if it reaches 1e-3 in a case, or if a case raises.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from cases import CASES, Case
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TOLERANCE, NUDGE = 1e-3, 1e-7
ORIGINAL = "textbrewer==0.2.1.post1"
INTRODUCTION = """# Trajectories equal to TextBrewer's

Written by `python benchmarks/parity/compare.py`, which anyone can run; do not edit by hand.

The original TextBrewer 0.2.1.post1, in an environment of its own, and this library train the same tiny transformer
student (2 layers, width 32, dropout on) from the same teachers (4 layers) with the same seed, data and optimiser, in
fp32 on one CPU thread. The *difference* of a case is that of the student's movement, last weights minus first,
`||d_ours - d_theirs|| / ||d_theirs||`; it must stay below 1e-3. *Projections* is the same for the projections of the
matches. *Rounding* is the original against itself when its student's first weights are changed by 1e-7 of their size,
about one unit in the last place: what rounding alone comes to.

Not compared, because the library differs by design (each of these was a defect of the original): weight schedulers,
which started one step late and overwrote the configured weight; clipping together with projections, which left the
projections unclipped; the last partial accumulation window, which was dropped.
"""


@dataclass(frozen=True)
class Verdict:
    """What became of one case: the figures of its row, or the error of the side that raised."""

    case: Case
    steps: int = 0
    difference: float = float("nan")
    projections: float | None = None
    rounding: float = float("nan")
    problem: str = ""

    @property
    def passed(self) -> bool:
        """Whether the case meets the tolerance."""
        return not self.problem and self.difference < TOLERANCE and (self.projections or 0.0) < TOLERANCE


def run(python: str, folder: Path, only: str, library: Path | None = None, nudge: float = 0.0) -> str:
    """Run the cases with an environment's textbrewer (or ``library``'s) and return the versions it ran with."""
    # Without the caller's PYTHONPATH, and outside the checkout, neither side can import the other's package.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
    if library is not None:
        environment["PYTHONPATH"] = str(library)
    command = [python, str(HERE / "run_one.py"), str(folder), "--only", only, "--nudge", str(nudge)]
    print(f"running the cases with the textbrewer of {library or python} ...", file=sys.stderr)
    with tempfile.TemporaryDirectory() as elsewhere:
        # The library's progress bars, hundreds of them, go to stderr: kept for the case of an error only.
        done = subprocess.run(command, env=environment, cwd=elsewhere, check=False, stderr=subprocess.PIPE, text=True)
    if not (folder / "versions").exists():
        raise SystemExit(f"{done.stderr}\n{python} must be able to import textbrewer and torch, see the error above")
    return (folder / "versions").read_text().strip()


def make_original(folder: Path) -> str:
    """Make the original's environment in ``folder``, unless it is there, and return its python."""
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet"]
    constraints = ROOT / "constraints.txt"
    pins = ["-c", str(constraints)] if constraints.exists() else []
    subprocess.run([*install, *pins, "torch", "numpy", "tqdm", "tensorboardX"], check=True)
    subprocess.run([*install, "--no-deps", ORIGINAL], check=True)
    return str(python)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Return ``||ours - theirs|| / ||theirs||``."""
    return float((ours - theirs).double().norm() / theirs.double().norm())


def movement(result: dict[str, Tensor], name: str = "") -> Tensor:
    """Return the last weights minus the first, of the student or (``projections_``) of the projections."""
    return result[f"{name}final"] - result[f"{name}initial"]


def judge(case: Case, theirs: Path, ours: Path, nudged: Path) -> Verdict:
    """Compare the results of one case."""
    for side, folder in (("original", theirs), ("original, nudged", nudged), ("library", ours)):
        error = folder / f"{case.name}.error"
        if error.exists():
            return Verdict(case, problem=f"{side} raised {error.read_text().strip().splitlines()[-1]}")
    a, b, c = (torch.load(folder / f"{case.name}.pt", weights_only=True) for folder in (theirs, ours, nudged))
    if not torch.equal(a["initial"], b["initial"]):
        return Verdict(case, problem="the first weights differ: the environments build other models")
    if len(a["path"]) != len(b["path"]):
        return Verdict(case, problem=f"the original took {len(a['path'])} steps, the library {len(b['path'])}")
    projections = None
    if a["projections_initial"].numel():
        if b["projections_initial"].numel() != a["projections_initial"].numel():
            return Verdict(case, problem="the library's optimiser was not given the original's projections")
        projections = relative(movement(b, "projections_"), movement(a, "projections_"))
    figures = relative(movement(b), movement(a)), projections, relative(movement(c), movement(a))
    return Verdict(case, len(a["path"]), *figures)


def diagnose(case: Case, theirs: Path, ours: Path) -> str:
    """Return where a failed case parts from the original: the first step, and whether random numbers differ."""
    a, b = (torch.load(folder / f"{case.name}.pt", weights_only=True) for folder in (theirs, ours))
    apart = [relative(y, x) for x, y in zip(a["path"], b["path"], strict=True)]
    first = next((step for step, value in enumerate(apart, 1) if value >= TOLERANCE / 10), None)
    generators = [n for n, x, y in zip(("torch", "numpy", "random"), a["random"], b["random"], strict=True) if x != y]
    start = a["projections_initial"], b["projections_initial"]
    drawn = "" if torch.equal(*start) else "; the projections' first weights differ"
    return f"parts at step {first}; random numbers used differ in: {', '.join(generators) or 'none'}{drawn}"


def table(verdicts: Sequence[Verdict]) -> str:
    """Return the verdicts as a Markdown table."""
    lines = ["| case | steps | difference | projections | rounding | verdict |", "|---|--:|--:|--:|--:|---|"]
    for v in verdicts:
        projections = "" if v.projections is None else f"{v.projections:.1e}"
        verdict = "equal" if v.passed else f"**differs** {v.problem}"
        note = f" ({v.case.note})" if v.case.note else ""
        figures = f"{v.steps} | {v.difference:.1e} | {projections} | {v.rounding:.1e}"
        lines.append(f"| {v.case.distiller}: `{v.case.name}`{note} | {figures} | {verdict} |")
    return "\n".join(lines) + "\n"


def record(folder: Path, versions: str, path: Path) -> None:
    """Write the fast test's reference: the original's movement in the reference cases, as eight projections of it."""
    entries = {}
    for case in CASES:
        if case.reference:
            result = torch.load(folder / f"{case.name}.pt", weights_only=True)
            numbers = [float(f"{x:.9g}") for x in result["path"][-1].tolist()]
            entries[case.name] = {"steps": len(result["path"]), "projections": numbers}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"recorded_with": versions, "cases": entries}, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original-python", help="python of an environment that has the original; default: make one")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "parity", help="folder of environment and results")
    parser.add_argument("--only", default="", help="compare the cases whose name contains this; writes no report")
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "parity.md", help="where the table goes")
    parser.add_argument("--record", type=Path, help="write the fast test's reference from the original, and stop")
    options = parser.parse_args()
    if options.record and options.only:
        parser.error("--record writes the whole reference: leave out --only")
    # Absolute, since the runs start in another folder; not resolved, since a venv's python is a link out of it.
    options.work = options.work.absolute()
    if options.original_python and Path(options.original_python).exists():
        options.original_python = str(Path(options.original_python).absolute())
    return options


def main() -> int:
    """Run both sides, print and write the table, and return the exit status."""
    options = arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    original = options.original_python or make_original(options.work / "original")
    with tempfile.TemporaryDirectory(dir=options.work) as results:
        theirs, ours, nudged = (Path(results) / name for name in ("original", "library", "nudged"))
        versions = run(original, theirs, options.only)
        if not versions.startswith(ORIGINAL.replace("==", " ")):
            raise SystemExit(f"{original} must have {ORIGINAL}, got {versions}: pip install --no-deps {ORIGINAL}")
        if options.record:
            record(theirs, versions, options.record)
            return 0
        versions_ours = run(sys.executable, ours, options.only, ROOT)
        run(original, nudged, options.only, nudge=NUDGE)
        verdicts = [judge(case, theirs, ours, nudged) for case in CASES if options.only in case.name]
        text = table(verdicts)
        print(text)
        for v in verdicts:
            if not v.passed:
                print(f"{v.case.name}: {v.problem or diagnose(v.case, theirs, ours)}", file=sys.stderr)
    failed = sum(not v.passed for v in verdicts)
    summary = (
        f"{len(verdicts) - failed} of {len(verdicts)} cases equal. Original: {versions}. Library: {versions_ours}."
    )
    print(summary)
    if not options.only:
        options.report.write_text(f"{INTRODUCTION}\n{summary}\n\n{text}")
    return 1 if failed or not verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
