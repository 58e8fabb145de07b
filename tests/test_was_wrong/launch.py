"""Starts ``ranks.py`` in two processes."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TIMEOUT = 120


@functools.cache
def outcomes():
    """What the two processes found: for each check the results of both. They are started once for all tests."""
    root = Path(__file__).resolve().parents[len(__package__.split("."))]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", f"{__package__}.ranks", folder]
        ranks = [
            subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True)
            for rank in range(2)
        ]
        try:
            errors = [rank.communicate(timeout=TIMEOUT)[1] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        files = [Path(folder, f"{rank}.json") for rank in range(2)]
        assert all(file.exists() for file in files), "\n".join(errors)
        first, second = (json.loads(file.read_text()) for file in files)
    return {name: [first[name], second[name]] for name in first}


def outcome(name):
    """What the two processes found in one check; an error's text, where one was raised."""
    return outcomes()[name]
