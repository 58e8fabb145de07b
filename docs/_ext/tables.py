"""Writes the reference tables of the documentation from the package: registries, configurations, adaptor keys, modules.

Every build writes ``docs/generated/*.md`` anew; pages include them. What cannot be described (a field that its
docstring leaves out, a name that is no field) stops the build, so the tables cannot fall behind the code.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ADAPTOR_KEY_MEANINGS = {
    "logits": "what the KD loss compares: a tensor `(batch, classes)` or `(batch, length, classes)`, or a list of "
    "them, one a prediction head",
    "logits_mask": "1 where a position of 3-D `logits` counts, 0 where not: a tensor `(batch, length)`, or a list of "
    "them, one a head",
    "losses": "the student's own losses on the labels, weighted by `hard_label_weight`: a tensor or a list of tensors",
    "inputs_mask": "1 for tokens, 0 for padding, `(batch, length)`: the positions that match losses read",
    "labels": "true classes, for `probability_shift`: a tensor, or a list of them, one a head",
    "hidden": "hidden states, one tensor `(batch, length, width)` a layer; entry 0 is whatever you put first "
    "(for transformers models: the embeddings)",
    "attention": "attention maps or scores, one tensor `(batch, heads, length, length)` a layer",
    "query": "queries of self-attention, as projected: one tensor `(batch, heads, length, head width)` a layer; "
    'this and the next three come by themselves with `adaptor="auto"`, for the layers that matches name',
    "key": "keys, likewise, before any rotation; those that several heads share are repeated",
    "value": "values, likewise",
    "scores": "scaled products of queries and keys, before mask and softmax, `(batch, heads, length, length)` a layer; "
    "with rotation (Llama) and position bias (T5), see [attention scores](matching.md#attention-scores)",
}
"""What each key of an adaptor's dict holds; the names themselves come from ``ADAPTOR_KEYS``."""

PUBLIC_MODULES = ("losses", "schedulers", "projections", "matching")
"""Where the functions of the registries are documented in the API reference."""

MEASURED_PAGES = ("quickstart_results", "experiments", "compression_results", "parity", "was-wrong", "benchmarks")
"""Pages that benchmarks write; a checkout without them builds all the same."""

_ROLE = re.compile(r":(?:py:)?(class|func|meth|mod|data|attr|math):`([^`]+)`")
_ITEM = re.compile(r"\*{0,2}(\w+)(?: \([^)]*\))?:\s*(.*)")


def args_of(docstring: str) -> dict[str, str]:
    """Return the descriptions in a Google docstring's ``Args:`` section, by argument."""
    lines = iter(inspect.cleandoc(docstring).splitlines())
    if not any(line.strip() == "Args:" for line in lines):
        return {}
    found: dict[str, list[str]] = {}
    indent: int | None = None
    name = ""
    for line in lines:
        if not line.strip():
            continue
        depth = len(line) - len(line.lstrip())
        if depth == 0:
            break
        indent = depth if indent is None else indent
        item = _ITEM.fullmatch(line.strip()) if depth == indent else None
        if item:
            name = item.group(1)
            found[name] = [item.group(2)]
        else:
            found[name].append(line.strip())
    return {name: " ".join(parts).strip() for name, parts in found.items()}


def first_line(documented: object) -> str:
    """Return the first line of an object's docstring; empty if it has none."""
    return (inspect.getdoc(documented) or "").split("\n")[0]


def to_myst(text: str) -> str:
    """Return reStructuredText of a docstring as it reads in a MyST page."""
    roles = _ROLE.sub(lambda match: f"{{{'' if match[1] == 'math' else 'py:'}{match[1]}}}`{match[2]}`", text)
    return re.sub(r"``([^`]+)``", r"`\1`", roles)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def config_table(config: type[Any]) -> str:
    """Return a table of a configuration dataclass: field, type, default, meaning.

    Raises:
        ValueError: if the docstring's ``Args:`` section does not name just the fields.
    """
    meanings = args_of(config.__doc__ or "")
    fields = dataclasses.fields(config)
    odd = {item.name for item in fields} ^ set(meanings)
    if odd:
        raise ValueError(f"the Args section of {config.__name__} must name each field and nothing else: {sorted(odd)}")
    rows = [(f"`{item.name}`", f"`{_type(item)}`", _default(item), to_myst(meanings[item.name])) for item in fields]
    return table(("Field", "Type", "Default", "Meaning"), rows)


def _type(item: dataclasses.Field[Any]) -> str:
    return item.type if isinstance(item.type, str) else inspect.formatannotation(item.type)


def _default(item: dataclasses.Field[Any]) -> str:
    if item.default_factory is not dataclasses.MISSING:
        return f"`{item.default_factory()!r}`"
    return "required" if item.default is dataclasses.MISSING else f"`{item.default!r}`"


def registry_table(registry: Mapping[str, Callable[..., Any]]) -> str:
    """Return a table of a registry: name, function, its docstring's first line; one row a name."""
    rows = [(f"`{name}`", _link(entry), to_myst(first_line(entry))) for name, entry in registry.items()]
    return table(("Name", "Function", "What it is"), rows)


def _link(entry: Callable[..., Any]) -> str:
    """Return a link to a function's documentation, with its arguments; empty for functions made by others."""
    name = getattr(entry, "__name__", "")
    for module in PUBLIC_MODULES:
        path = f"textbrewer.{module}"
        if getattr(importlib.import_module(path), name, None) is entry:
            arguments = ", ".join(inspect.signature(entry).parameters)
            return f"{{py:func}}`{name}({arguments}) <{path}.{name}>`"
    return ""


def adaptor_table(keys: Sequence[str]) -> str:
    """Return a table of the keys that an adaptor may return.

    Raises:
        ValueError: if the meanings written down here are not those of just these keys.
    """
    odd = set(keys) ^ set(ADAPTOR_KEY_MEANINGS)
    if odd:
        raise ValueError(f"ADAPTOR_KEY_MEANINGS must describe each adaptor key and nothing else: {sorted(odd)}")
    return table(("Key", "What it holds"), [(f"`{key}`", ADAPTOR_KEY_MEANINGS[key]) for key in keys])


def module_table(package: Path) -> str:
    """Return a table of a package's files: path, first line of the docstring; read without importing them."""
    rows = []
    for path in sorted(package.rglob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        rows.append((f"`{path.relative_to(package).as_posix()}`", to_myst(docstring.split("\n")[0])))
    return table(("File", "What is inside"), rows)


def measured_toctree(folder: Path) -> str:
    """Return a table of contents of the measured pages that exist in ``folder``; empty without any."""
    pages = [page for page in MEASURED_PAGES if (folder / f"{page}.md").exists()]
    if not pages:
        return ""
    return "\n".join(["```{toctree}", ":maxdepth: 1", ":caption: Measured", "", *pages, "```", ""])


def all_tables() -> dict[str, str]:
    """Return the text of every generated file, by its name."""
    textbrewer = importlib.import_module("textbrewer")
    configurations = importlib.import_module("textbrewer.configurations")
    return {
        "training_config.md": config_table(configurations.TrainingConfig),
        "distillation_config.md": config_table(configurations.DistillationConfig),
        "intermediate_match.md": config_table(configurations.IntermediateMatch),
        "kd_losses.md": registry_table(textbrewer.KD_LOSS_MAP),
        "match_losses.md": registry_table(textbrewer.MATCH_LOSS_MAP),
        "projections.md": registry_table(textbrewer.PROJ_MAP),
        "weight_schedulers.md": registry_table(textbrewer.WEIGHT_SCHEDULER),
        "temperature_schedulers.md": registry_table(textbrewer.TEMPERATURE_SCHEDULER),
        "adaptor_keys.md": adaptor_table(textbrewer.ADAPTOR_KEYS),
        "strategies.md": registry_table(textbrewer.matching.STRATEGIES),
        "layer_maps.md": registry_table(textbrewer.matching.LAYER_MAPS),
        "targets.md": registry_table(importlib.import_module("textbrewer.distillers.targets").TARGETS),
        "logit_transforms.md": registry_table(textbrewer.losses.LOGIT_TRANSFORMS),
        "modules.md": module_table(Path(textbrewer.__file__).parent),
    }


def write_tables(app: Any) -> None:
    """Write the generated files; the pages that include them are read after this."""
    folder = Path(app.srcdir) / "generated"
    folder.mkdir(exist_ok=True)
    from cards import all_cards, overview  # reads this module

    recipes = importlib.import_module("textbrewer.recipes").RECIPES
    results = Path(app.srcdir).parent / "benchmarks" / "results" / "recipes"
    texts = {
        **all_tables(),
        "measured.md": measured_toctree(Path(app.srcdir)),
        "recipe_cards.md": all_cards(recipes, results),
        "recipes.md": overview(recipes),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def setup(app: Any) -> dict[str, Any]:
    """Connect to Sphinx."""
    app.connect("builder-inited", write_tables)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
