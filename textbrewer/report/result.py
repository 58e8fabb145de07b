"""What a report holds: each model's measurements, and the ways to write them down."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from textbrewer.names import suggestion
from textbrewer.report import plots, table, webpage
from textbrewer.report.files import write
from textbrewer.report.latency import Timing
from textbrewer.report.weights import Zeros

__all__ = ["ModelReport", "Report"]

_FORMAT = 1


@dataclass(frozen=True)
class ModelReport:
    """Measurements of one model; ``None`` for what could not be measured.

    Args:
        name: of the model.
        kind: its class.
        parameters: in all; a shared tensor counts once.
        components: parameters by component.
        zeros: how many parameters are zero.
        matrices: zeros of each parameter of two or more dimensions.
        file_bytes: on disk.
        file_format: of what the bytes are: ``"safetensors"``, ``"torch.save"``, or the given file's name.
        flops: of one batch.
        peak_memory: bytes of one forward pass at most, beyond weights and inputs.
        timings: one for each batch size.
        scores: by name; empty without a score function.
        device: where it ran.
    """

    name: str
    kind: str
    parameters: int | None
    components: dict[str, int] | None
    zeros: int | None
    matrices: list[Zeros]
    file_bytes: int | None
    file_format: str | None
    flops: int | None
    peak_memory: int | None
    timings: list[Timing]
    scores: dict[str, float]
    device: str

    @property
    def sparsity(self) -> float | None:
        """Zero parameters as a share of all, from 0 to 1."""
        return None if not self.parameters or self.zeros is None else self.zeros / self.parameters

    @property
    def score(self) -> float | None:
        """The first score."""
        return next(iter(self.scores.values()), None)


@dataclass(frozen=True)
class Report:
    """Models beside each other; made by :func:`textbrewer.report.report`.

    Args:
        models: in the order given.
        baseline: name of the model that the others are compared with.
        batch: what one batch of the data is; FLOPs and memory are of it.
        threads: of torch on the CPU.
        rounds: how often each model was timed for each batch size.
        warmup: rounds before, that were not timed.
        environment: versions and machine.
    """

    models: list[ModelReport]
    baseline: str
    batch: str
    threads: int
    rounds: int
    warmup: int
    environment: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> ModelReport:
        for model in self.models:
            if model.name == name:
                return model
        raise KeyError(f"unknown model {name!r}; {suggestion(name, [model.name for model in self.models])}")

    def __str__(self) -> str:
        return self.to_text()

    def smaller(self, name: str) -> float | None:
        """Return how many times smaller than the baseline's a model's file is."""
        return _ratio(self[self.baseline].file_bytes, self[name].file_bytes)

    def faster(self, name: str, place: int = 0) -> float | None:
        """Return how many times faster than the baseline a model is, by medians, at one of the batch sizes.

        Rows are compared by batches, which are the same for all models.
        """
        return _ratio(self[self.baseline].timings[place].ms[1], self[name].timings[place].ms[1])

    def to_text(self) -> str:
        """Return the tables for a terminal."""
        return table.text(self)

    def to_markdown(self) -> str:
        """Return the tables as Markdown."""
        return table.markdown(self)

    def to_html(self) -> str:
        """Return the page that :meth:`save_html` writes."""
        return webpage.page(self)

    def to_json(self) -> str:
        """Return everything as JSON; :meth:`load` reads it."""
        content = {"format": _FORMAT, "library": "textbrewer", **asdict(self)}
        return json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"

    def save_json(self, path: str | Path) -> None:
        """Write :meth:`to_json`."""
        write(path, self.to_json())

    def save_html(self, path: str | Path) -> None:
        """Write one page that shows everything: tables, pictures, environment. It needs nothing but itself."""
        write(path, self.to_html())

    def plot(self, path: str | Path) -> None:
        """Draw score against latency and against size, as PNG; latency against size if there is no score.

        Raises:
            ImportError: without matplotlib.
            ValueError: if fewer than one model has the values of a picture.
        """
        write(path, plots.png(self))

    def save(self, path: str | Path) -> None:
        """Write the file that the suffix names: ``.html``, ``.json``, ``.md``, ``.txt`` or ``.png``.

        Without a suffix it is a folder, and gets ``report.html``, ``report.json``, ``report.md`` and, if matplotlib is
        installed, ``report.png``.
        """
        path = Path(path)
        kind = check_path(path)
        if kind == ".html":
            self.save_html(path)
        elif kind == ".json":
            self.save_json(path)
        elif kind == ".md":
            write(path, self.to_markdown() + "\n")
        elif kind == ".txt":
            write(path, self.to_text() + "\n")
        elif kind == ".png":
            self.plot(path)
        else:
            for suffix in (".html", ".json", ".md", *((".png",) if plots.is_possible() else ())):
                self.save(path / f"report{suffix}")

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a report that :meth:`save_json` wrote.

        Raises:
            ValueError: if the file is no such report.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"path must be a report saved with save_json, got {str(path)!r}: {error}") from error
        if not isinstance(found, Mapping) or found.get("library") != "textbrewer" or "models" not in found:
            raise ValueError(f"path must be a report saved with save_json, got {str(path)!r}")
        if found.get("format") != _FORMAT:
            raise ValueError(
                f"the report's format must be {_FORMAT}, got {found.get('format')!r} in {str(path)!r}; "
                "read it with the version of textbrewer that wrote it"
            )
        models = [_model(item) for item in found["models"]]
        return cls(**{key: found[key] for key in found.keys() - {"format", "library", "models"}}, models=models)


def check_path(path: Path) -> str:
    """Return a path's suffix in small letters, empty for a folder.

    Raises:
        ValueError: if it names no kind of file that a report can be.
        ImportError: for a picture without matplotlib.
    """
    kind, known = path.suffix.lower(), (".html", ".json", ".md", ".txt", ".png")
    if kind and kind not in known and not path.is_dir():
        raise ValueError(f"path must end in one of {', '.join(known)}, or be a folder, got {str(path)!r}")
    if kind == ".png":
        plots.require()
    return "" if path.is_dir() else kind


def _ratio(baseline: float | None, value: float | None) -> float | None:
    return baseline / value if baseline and value else None


def _finite(value: Any) -> Any:
    """Return the value with None for numbers that JSON does not know."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return value


def _model(item: Mapping[str, Any]) -> ModelReport:
    timings = [
        Timing(**{**timing, **{key: tuple(timing[key]) for key in ("ms", "rows_per_second")}})
        for timing in item["timings"]
    ]
    scores = {name: math.nan if score is None else score for name, score in item["scores"].items()}
    matrices = [Zeros(**matrix) for matrix in item["matrices"]]
    return ModelReport(**{**item, "timings": timings, "matrices": matrices, "scores": scores})
