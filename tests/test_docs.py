"""The documentation's generated tables, and its scripts, which must run as printed."""

import dataclasses
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import textbrewer
from textbrewer import configurations
from textbrewer.registry import Registry

ROOT = Path(__file__).parent.parent
PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def _load_tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "_ext" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = _load_tables()

DOCSTRING = """Summary.

    Args:
        first: one line.
        second (int): two lines, the
            second: with a colon.

    Returns:
        third: not an argument.
    """


@dataclasses.dataclass
class Settings:
    """Some settings.

    Args:
        size: how big; ``None`` for :class:`Registry`'s own.
        names: which.
    """

    size: "int | None"
    names: list = dataclasses.field(default_factory=list)


def _cells(text):
    return [
        [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines()
    ]


def test_args_of_reads_the_section():
    assert tables.args_of(DOCSTRING) == {"first": "one line.", "second": "two lines, the second: with a colon."}


def test_args_of_without_a_section_is_empty():
    assert tables.args_of("Summary.\n\nReturns:\n    x: y.") == {}


def test_config_table_has_a_row_a_field():
    assert _cells(tables.config_table(Settings)) == [
        ["Field", "Type", "Default", "Meaning"],
        ["---"] * 4,
        ["`size`", "`int | None`", "required", "how big; `None` for {py:class}`Registry`'s own."],
        ["`names`", "`list`", "`[]`", "which."],
    ]


@pytest.mark.parametrize("docstring", ["Summary.\n\nArgs:\n    size: one.", DOCSTRING])
def test_config_table_wants_just_the_fields_described(docstring):
    settings = type("Other", (Settings,), {"__doc__": docstring})
    with pytest.raises(ValueError, match="must name each field"):
        tables.config_table(settings)


def test_adaptor_table_wants_just_the_keys_described():
    with pytest.raises(ValueError, match="newkey"):
        tables.adaptor_table([*textbrewer.ADAPTOR_KEYS, "newkey"])
    with pytest.raises(ValueError, match="logits_mask"):
        tables.adaptor_table([key for key in textbrewer.ADAPTOR_KEYS if key != "logits_mask"])


def test_registry_table_has_a_row_a_name():
    def doubled(x):
        """Twice ``x``.

        More.
        """
        return 2 * x

    registry = Registry("thing", {"b": doubled, "a": doubled, "plain": lambda x: x})
    assert _cells(tables.registry_table(registry))[2:] == [
        ["`b`", "", "Twice `x`."],
        ["`a`", "", "Twice `x`."],
        ["`plain`", "", ""],
    ]


@pytest.mark.parametrize(
    ("file", "registry"),
    [
        ("kd_losses.md", textbrewer.KD_LOSS_MAP),
        ("match_losses.md", textbrewer.MATCH_LOSS_MAP),
        ("projections.md", textbrewer.PROJ_MAP),
        ("weight_schedulers.md", textbrewer.WEIGHT_SCHEDULER),
        ("temperature_schedulers.md", textbrewer.TEMPERATURE_SCHEDULER),
    ],
)
def test_every_entry_of_a_registry_is_described(file, registry):
    rows = _cells(tables.all_tables()[file])[2:]
    assert [row[0] for row in rows] == [f"`{name}`" for name in registry]
    assert all(row[2] for row in rows)


@pytest.mark.parametrize("config", ["TrainingConfig", "DistillationConfig", "IntermediateMatch"])
def test_every_field_of_a_config_is_described(config):
    dataclass = getattr(configurations, config)
    rows = _cells(tables.config_table(dataclass))[2:]
    assert [row[0] for row in rows] == [f"`{item.name}`" for item in dataclasses.fields(dataclass)]
    assert all(row[3] for row in rows)


def test_module_table_has_a_row_a_file():
    package = ROOT / "textbrewer"
    rows = _cells(tables.all_tables()["modules.md"])[2:]
    assert {row[0] for row in rows} == {f"`{path.relative_to(package).as_posix()}`" for path in package.rglob("*.py")}
    assert all(row[1] for row in rows)


def test_measured_toctree_names_the_pages_that_exist(tmp_path):
    assert tables.measured_toctree(tmp_path) == ""
    (tmp_path / "parity.md").touch()
    assert tables.measured_toctree(tmp_path).splitlines()[-2:] == ["parity", "```"]


@pytest.mark.parametrize("page", PAGES)
def test_included_tables_are_generated(page):
    included = re.findall(r"\{include\} generated/(\S+)", (ROOT / "docs" / page).read_text(encoding="utf-8"))
    assert set(included) <= {*tables.all_tables(), "measured.md", "recipes.md", "recipe_cards.md"}


def _scripts(page):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.M | re.S)


def test_quickstart_script_runs_as_printed(tmp_path):
    """The script and what follows it: the student learns (half the points are of either class), its file loads."""
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(_scripts("quickstart.md"))],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    right = [float(share) for share in re.findall(r"step \d+: ([\d.]+)% right", done.stdout)]
    assert len(right) == 10
    assert right[-1] > 75


def test_configuration_scripts_run_as_printed(monkeypatch):
    """The examples on the configuration page; what they register is taken back."""
    monkeypatch.setitem(textbrewer.MATCH_LOSS_MAP, "my_l1", print)
    namespace = {"DistillationConfig": textbrewer.DistillationConfig}
    for script in _scripts("configuration.md"):
        exec(script, namespace)
    assert textbrewer.MATCH_LOSS_MAP["my_l1"] is namespace["my_l1_loss"]


def test_a_model_of_ones_own_is_pruned_as_printed(tmp_path):
    (script,) = [script for script in _scripts("compression.md") if "register_structure" in script]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"masked model: (\S+)", done.stdout)[1]) < 1e-5
    assert "loaded again: True" in done.stdout
    assert "'layers': 0.25" in done.stdout
