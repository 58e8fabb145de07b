"""How a test imports a script of ``benchmarks``, which finds its neighbours as when it is run."""

import importlib
import sys
from contextlib import contextmanager
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@contextmanager
def imported(name):
    """Import a script; while the context lasts, its neighbours can be imported too."""
    before = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path[:] = before
