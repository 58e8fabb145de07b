"""The import levels and size limits that keep the package readable, checked on its source."""

import ast
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

PACKAGE = Path(__file__).parent.parent / "textbrewer"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# A module imports only from lower levels; `__init__` is the package's own.
LEVELS = (
    {"names"},
    {"registry", "checks", "files"},
    {
        *("losses", "schedulers", "projections", "adaptors", "hooks", "layouts"),
        *("callbacks", "collators", "data_utils", "utils"),
    },
    {"configurations", "presets"},
    {"matching", "students", "teacher_cache", "engine", "compression", "report"},
    {"distillers", "recipes"},
    {"stage_training"},
    {"api"},
    {"cli", "__init__"},
)
LEVEL_OF = {part: level - 1 for level, parts in enumerate(LEVELS) for part in parts}
# `names` lies below the lowest level, so that the two modules of that level can share it.

MAY_IMPORT_ACCELERATE = ("engine/",)
LONGEST_FILE = 300
LONGEST_FUNCTION = 50


def imported_modules(tree: ast.Module, file: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the absolute dotted name of every import, wherever it stands; one name for each alias."""
    package = ["textbrewer", *Path(file).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def part_of(file: str) -> str:
    """Return the module or sub-package of ``textbrewer`` that a file belongs to."""
    return Path(file).parts[0].removesuffix(".py")


def level_violations(tree: ast.Module, file: str) -> Iterator[str]:
    part = part_of(file)
    if part not in LEVEL_OF:
        yield f"{file}: {part!r} has no import level; give it one here and in docs/architecture.md"
        return
    for line, module in imported_modules(tree, file):
        root, _, inner = module.partition(".")
        if root != "textbrewer":
            continue
        # A name that is no module comes from the package's own __init__, the highest level.
        other = inner.split(".")[0] if inner.split(".")[0] in LEVEL_OF else "__init__"
        if other == part or LEVEL_OF[other] < LEVEL_OF[part]:
            continue
        yield f"{file}:{line}: {part} (level {LEVEL_OF[part]}) imports {other} (level {LEVEL_OF[other]})"


def accelerate_violations(tree: ast.Module, file: str) -> Iterator[str]:
    if file.startswith(MAY_IMPORT_ACCELERATE):
        return
    for line, module in imported_modules(tree, file):
        if module.split(".")[0] == "accelerate":
            yield f"{file}:{line}: imports accelerate; only engine may"


def statement_violations(tree: ast.Module, file: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            yield f"{file}:{node.lineno}: assert in the package; raise ValueError, TypeError or KeyError"
        elif isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            yield f"{file}:{node.lineno}: star import"


def size_violations(tree: ast.Module, file: str, source: str) -> Iterator[str]:
    lines = len(source.splitlines())
    if lines > LONGEST_FILE:
        yield f"{file}: {lines} lines, more than {LONGEST_FILE}"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = function_length(node)
            if length > LONGEST_FUNCTION:
                yield f"{file}:{node.lineno}: {node.name} has {length} lines of code, more than {LONGEST_FUNCTION}"


def function_length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines from ``def`` to the end, without the docstring."""
    length = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if ast.get_docstring(node) is not None:
        length -= (first.end_lineno or first.lineno) - first.lineno + 1
    return length


def violations(source: str, file: str) -> list[str]:
    """Return what is wrong with one file of the package, ``file`` being its path inside ``textbrewer/``."""
    tree = ast.parse(source)
    found = [
        *level_violations(tree, file),
        *accelerate_violations(tree, file),
        *statement_violations(tree, file),
        *size_violations(tree, file, source),
    ]
    return list(dict.fromkeys(found))  # an import of several names breaks a rule once


@pytest.mark.parametrize("file", FILES)
def test_file_keeps_the_rules(file):
    found = violations((PACKAGE / file).read_text(encoding="utf-8"), file)
    assert not found, "\n".join(["", *found])


def test_the_package_was_found():
    assert {"registry.py", "presets.py", "__init__.py", "losses/__init__.py"} <= set(FILES)


# The checker itself, on made-up sources: each breaks one rule, or looks as if it did.


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("losses/hidden.py", "from textbrewer.presets import FEATURES", "losses (level 1) imports presets (level 2)"),
        ("losses/hidden.py", "from textbrewer import hooks", "losses (level 1) imports hooks (level 1)"),
        ("engine/loop.py", "import textbrewer.matching.plan as plan", "engine (level 3) imports matching (level 3)"),
        ("engine/loop.py", "from ..distillers import base", "engine (level 3) imports distillers (level 4)"),
        ("recipes/pkd.py", "from ..distillers.general import GeneralDistiller", "recipes (level 4) imports distillers"),
        ("losses/hidden.py", "from ..hooks import a, b", "losses (level 1) imports hooks (level 1)"),
        ("hooks.py", "from . import api", "hooks (level 1) imports api (level 6)"),
        ("hooks.py", "from .api import distill", "hooks (level 1) imports api (level 6)"),
        ("api.py", "from textbrewer import KD_LOSS_MAP", "api (level 6) imports __init__ (level 7)"),
        ("checks.py", "def f():\n    import textbrewer.utils", "checks.py:2: checks (level 0) imports utils (level 1)"),
        (
            "presets.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from textbrewer.engine import run",
            "presets.py:3: presets (level 2) imports engine (level 3)",
        ),
        ("misc.py", "x = 1", "'misc' has no import level"),
        ("matching/plan.py", "from accelerate.utils import set_seed", "imports accelerate"),
        ("distillers/student.py", "import accelerate", "imports accelerate"),
        ("utils.py", "from math import *", "star import"),
        ("utils.py", "def f(x):\n    assert x", "assert in the package"),
        ("utils.py", "x = 1\n" * 301, "301 lines"),
        ("utils.py", "def f():\n" + "    x = 1\n" * 50, "f has 51 lines of code"),
        ("utils.py", "class A:\n    async def g(self):\n" + "        x = 1\n" * 50, "g has 51 lines of code"),
    ],
)
def test_checker_reports(file, source, expected):
    found = violations(source, file)
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("checks.py", "from textbrewer.names import suggestion"),
        (
            "losses/hidden.py",
            "from textbrewer.losses import masking\nfrom . import logits\nfrom ..registry import KD_LOSS_MAP",
        ),
        ("losses/__init__.py", "from textbrewer.losses.hidden import cos_loss"),
        ("engine/loop.py", "import accelerate\nfrom textbrewer import configurations, checks"),
        ("engine/loop.py", "from accelerate import Accelerator"),
        ("__init__.py", "from textbrewer.engine import run\nfrom .api import distill"),
        ("utils.py", "import textbrewer_extras\nfrom accelerated import x"),
        ("utils.py", "x = 1\n" * 300),
        ("utils.py", "def f():\n" + "    x = 1\n" * 49),
        ("utils.py", 'def f():\n    """' + "x\n" * 100 + '    """\n' + "    x = 1\n" * 49),
        ("utils.py", '"""assert this; from x import *"""'),
    ],
)
def test_checker_accepts(file, source):
    assert violations(source, file) == []


def test_imports_are_read_as_absolute_names():
    source = dedent(
        """
        import os.path, textbrewer.utils
        from .logits import kd_ce_loss
        from .. import checks
        from ..engine.loop import run as go
        """
    )
    names = [name for _, name in imported_modules(ast.parse(source), "losses/hidden.py")]
    assert names == [
        "os.path",
        "textbrewer.utils",
        "textbrewer.losses.logits.kd_ce_loss",
        "textbrewer.checks",
        "textbrewer.engine.loop.run",
    ]
