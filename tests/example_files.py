"""Where the examples and their data are, and how a test imports a module of theirs."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
DATA = Path(os.environ.get("TEXTBREWER_DATA", ROOT.parent / "shared" / "data"))


def data_folder(name):
    """Return the folder of a dataset; skip the test where there is none."""
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: set TEXTBREWER_DATA to a folder that holds {name}")
    return folder


def load(folder, name):
    """Import a module of an example, which finds its neighbours as when it is run."""
    spec = importlib.util.spec_from_file_location(f"example_{folder}_{name}", EXAMPLES / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(EXAMPLES / folder))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module
