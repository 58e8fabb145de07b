"""What :func:`~textbrewer.compression.export` says that it did."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from textbrewer.compression.exporting.checking import Check

__all__ = ["ExportReport"]


@dataclass(frozen=True)
class ExportReport:
    """An export that was found to agree with the model.

    Args:
        path: the file.
        files: bytes of each file written that the model is run from, by name.
        kind: name of the format.
        quantize: what it was quantised to.
        mode: how, of int8.
        inputs: shapes of the inputs, with names for the axes that may have any size.
        check: figures of the comparison.
        parameter_bytes: of the torch model.
    """

    path: Path
    files: dict[str, int]
    kind: str
    quantize: str | None
    mode: str | None
    inputs: dict[str, tuple[int | str, ...]]
    check: Check
    parameter_bytes: int

    @property
    def bytes(self) -> int:
        """Size of the files together."""
        return sum(self.files.values())

    @property
    def difference(self) -> float:
        """The largest difference of any output."""
        return self.check.difference

    @property
    def agreement(self) -> float | None:
        """Share of the decisions that are the model's, ``None`` if it has no logits."""
        return self.check.agreement

    def __str__(self) -> str:
        kind = self.kind if self.quantize is None else f"{self.kind}, {self.quantize}"
        kind += "" if self.mode is None else f" {self.mode}"
        shapes = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in self.inputs.items())
        sizes = f"{self.bytes / 1e6:.3g} MB, of {self.parameter_bytes / 1e6:.3g} MB of parameters"
        return "\n".join(
            [
                f"{self.path} ({kind}): {sizes}",
                f"inputs: {shapes}",
                f"checked on {self.check.rows} rows: {self.check}",
            ]
        )
