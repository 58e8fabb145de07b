"""Whether an exported file says what the model says: outputs compared on real rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["AGREEMENTS", "TOLERANCES", "Check", "Figures", "compare"]

TOLERANCES = {None: 1e-4, "bf16": 0.05, "int8": 0.15}
"""How far an output may be off: of a float32 file any number of it, as a share of the largest where that is beyond 1;
of a quantised one the root mean square of the differences, as a share of that of the output."""
AGREEMENTS = {None: 0.0, "bf16": 0.9, "int8": 0.9}
"""Share of the decisions that must stay."""


@dataclass
class Figures:
    """How far an output of the file is from the model's.

    Args:
        difference: the largest, of any number of it.
        largest: absolute value of the model's output.
        decisions: rows or positions of which the largest logit was looked at.
        agreeing: those of which it is the same one.
        squared_difference: sum of the squared differences.
        squared: sum of the squares of the model's output.
    """

    difference: float = 0.0
    largest: float = 0.0
    decisions: int = 0
    agreeing: int = 0
    squared_difference: float = 0.0
    squared: float = 0.0

    @property
    def relative_difference(self) -> float:
        """Root mean square of the differences, as a share of the output's."""
        if self.squared_difference == 0.0:
            return 0.0
        return math.sqrt(self.squared_difference / self.squared) if self.squared else math.inf

    @property
    def agreement(self) -> float | None:
        """Share of the decisions that are the same, ``None`` if the output holds none."""
        return self.agreeing / self.decisions if self.decisions else None


@dataclass
class Check:
    """What came out of a comparison.

    Args:
        outputs: figures of each output.
        rows: how many rows were run.
        shapes: of the first input, each that was run.
    """

    outputs: dict[str, Figures] = field(default_factory=dict)
    rows: int = 0
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def difference(self) -> float:
        """The largest of all outputs."""
        return max(figures.difference for figures in self.outputs.values())

    @property
    def agreement(self) -> float | None:
        """The smallest share of equal decisions of all outputs with logits."""
        shares = [figures.agreement for figures in self.outputs.values() if figures.agreement is not None]
        return min(shares, default=None)

    def summary(self) -> dict[str, Any]:
        """Return the figures as JSON has them."""
        found = {
            name: {
                "difference": figures.difference,
                "largest": figures.largest,
                "relative_difference": figures.relative_difference,
                "decisions": figures.decisions,
                "agreeing": figures.agreeing,
                "agreement": figures.agreement,
            }
            for name, figures in self.outputs.items()
        }
        return {"rows": self.rows, "shapes": [list(shape) for shape in self.shapes], "outputs": found}

    def __str__(self) -> str:
        lines = []
        for name, figures in self.outputs.items():
            line = (
                f"{name}: off by at most {figures.difference:.2g} (its largest value is {figures.largest:.3g}), in the "
                f"root mean square by {figures.relative_difference:.2g} of it"
            )
            if figures.decisions:
                line += f", {figures.agreeing} of {figures.decisions} decisions the same"
            lines.append(line)
        return "; ".join(lines)

    def failures(self, tolerance: float, agreement: float, quantized: bool = False) -> list[str]:
        """Return what is not within the bounds.

        Of a quantised file not the largest difference counts, which is that of the row that happens to be nearest to
        a decision, and grows with the number of rows.
        """
        found = []
        for name, figures in self.outputs.items():
            bound = tolerance * max(1.0, figures.largest)
            if quantized and not figures.relative_difference <= tolerance:
                found.append(
                    f"{name!r} is off by {figures.relative_difference:.3g} of its root mean square, more than "
                    f"{tolerance:.3g}"
                )
            elif not quantized and not figures.difference <= bound:
                found.append(f"{name!r} is off by {figures.difference:.3g}, more than {bound:.3g}")
            if figures.agreement is not None and figures.agreement < agreement:
                found.append(
                    f"{name!r} decides {figures.agreeing} of {figures.decisions} rows or positions alike, less than "
                    f"{agreement:.0%}"
                )
        return found


def compare(
    model: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    file: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    batches: Iterable[Mapping[str, Tensor]],
) -> Check:
    """Run both on the same batches; positions of padding do not count.

    Raises:
        ValueError: if the model's outputs are not finite, or the file's have another shape, or it cannot run a batch.
    """
    check = Check()
    for batch in batches:
        expected = model(batch)
        shape = tuple(next(iter(batch.values())).shape)
        try:
            found = file(batch)
        except Exception as error:
            raise ValueError(f"the file cannot run a batch of {shape}: {type(error).__name__}: {error}") from error
        check.rows += shape[0] if shape else 1
        check.shapes.append(shape)
        for name, tensor in expected.items():
            figures = check.outputs.setdefault(name, Figures())
            if found[name].shape != tensor.shape:
                raise ValueError(
                    f"{name!r} of the file must have the model's shape {tuple(tensor.shape)}, got "
                    f"{tuple(found[name].shape)} for a batch of {shape}"
                )
            _add(figures, name, tensor, found[name], _mask(name, tensor, batch))
    return check


def _add(figures: Figures, name: str, expected: Tensor, found: Tensor, mask: Tensor | None) -> None:
    """Add a batch's outputs to the figures."""
    one, other = expected.double(), found.double()
    if mask is not None:
        outside = ~mask if one.dim() == 2 else ~mask[..., None]
        one, other = (values.masked_fill(outside, 0.0) for values in (one, other))
    if one.numel() == 0:
        return
    if not bool(one.isfinite().all()):
        raise ValueError(f"{name!r} of the model must be finite on the data, to be compared, and is not")
    off = (one - other).abs()
    figures.difference = max(figures.difference, float("inf") if bool(off.isnan().any()) else float(off.max()))
    figures.largest = max(figures.largest, float(one.abs().max()))
    figures.squared_difference += float(off.square().sum())
    figures.squared += float(one.square().sum())
    if "logits" in name and one.dim() >= 2 and one.shape[-1] > 1:
        if mask is not None and one.dim() == 2:  # a choice among the positions themselves
            one, other = (values.masked_fill(~mask, -torch.inf) for values in (one, other))
        same = one.argmax(-1) == other.argmax(-1)
        if mask is not None and one.dim() == 3:
            same = same[mask]
        figures.decisions += same.numel()
        figures.agreeing += int(same.sum())


def _mask(name: str, output: Tensor, batch: Mapping[str, Tensor]) -> Tensor | None:
    """Return which positions of an output are no padding, ``None`` where the batch does not say."""
    decodes = any(key.startswith("decoder_") for key in batch) and not name.startswith("encoder_")
    mask = batch.get("decoder_attention_mask" if decodes else "attention_mask")
    by_position = output.dim() == 3 or (output.dim() == 2 and name.startswith(("start_", "end_")))
    if mask is None or not by_position or output.shape[:2] != mask.shape:
        return None
    return mask.bool()
