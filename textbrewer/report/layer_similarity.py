"""How alike the layers of teacher and student are, every one with every other: to choose layer maps by looking."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from textbrewer import checks
from textbrewer.adaptors import Adaptor, auto_arguments, normalise, resolve
from textbrewer.hooks.forward import call, device_of, evaluating, on_device

__all__ = ["LayerSimilarity", "layer_similarity", "plot_layer_similarity"]


@dataclass(frozen=True)
class LayerSimilarity:
    """Linear CKA of every hidden state of a teacher with every one of a student.

    Args:
        values: ``(teacher's states, student's states)``, from 0 to 1, in float64; not a number for a state that is the
            same at all positions. State 0 of a transformers model is its embedding.
        positions: at how many positions the states were compared.
    """

    values: Tensor
    positions: int

    @property
    def best_student(self) -> list[int]:
        """For each state of the teacher the student's that is most like it."""
        return [int(number) for number in self.values.nan_to_num(-1.0).argmax(dim=1)]

    @property
    def best_teacher(self) -> list[int]:
        """For each state of the student the teacher's that is most like it."""
        return [int(number) for number in self.values.nan_to_num(-1.0).argmax(dim=0)]


def layer_similarity(
    teacher: nn.Module,
    student: nn.Module,
    dataloader: Iterable[Any],
    adaptor_T: Adaptor | str = "auto",
    adaptor_S: Adaptor | str = "auto",
    max_rows: int | None = 1000,
) -> LayerSimilarity:
    r"""Return how alike the hidden states of all layers of teacher and student are.

    Linear centred kernel alignment of the states :math:`X` (positions, width) of a teacher's layer and :math:`Y` of a
    student's, whose widths may differ, each column less its mean:

    .. math::
        \mathrm{CKA}(X, Y) = \frac{\lVert Y^\top X \rVert_F^2}{\lVert X^\top X \rVert_F \, \lVert Y^\top Y \rVert_F}

    It does not change if the features of either are rotated, scaled alike, or shifted. The products are summed batch by
    batch, so the result is exact and no states are kept; the sums take :math:`8 L_T d_T L_S d_S` bytes for the layers
    and widths of both sides.

    Args:
        teacher: run in eval mode and without gradients, where it is; its modes are put back.
        student: likewise.
        dataloader: batches as the models take them, or dicts with the parts ``"teacher"`` and ``"student"``.
        adaptor_T: returns the teacher's ``hidden``, tensors ``(batch, length, width)`` or ``(batch, width)``, and
            ``inputs_mask`` if there is padding; ``"auto"`` for transformers models.
        adaptor_S: likewise for the student; its states must be at the same positions.
        max_rows: read no more rows than this; ``None``: all there are.

    Raises:
        ValueError: if there is no data, or the states are not at the same positions.
        KeyError: if an adaptor returns no hidden states.

    Reference:
        Kornblith et al., "Similarity of Neural Network Representations Revisited", 2019, arXiv:1905.00414, section 3.
    """
    if max_rows is not None:
        checks.integer(max_rows, "max_rows", minimum=1)
    sides = [_Side(teacher, adaptor_T, "teacher"), _Side(student, adaptor_S, "student")]
    sums, rows = _Sums(), 0
    with ExitStack() as stack, torch.no_grad(), tqdm(desc="layers compared", unit=" rows", total=max_rows) as bar:
        for side in sides:
            stack.enter_context(evaluating(side.model))
        for batch in dataloader:
            (states_T, mask_T), (states_S, mask_S) = (side.states(batch) for side in sides)
            taken = len(states_T[0]) if max_rows is None else min(len(states_T[0]), max_rows - rows)
            _check_positions(states_T[0], mask_T, states_S[0], mask_S)
            mask = mask_S if mask_T is None else mask_T
            sums.add(*(_at_positions(states, mask, taken) for states in (states_T, states_S)))
            rows += taken
            bar.update(taken)
            if rows == max_rows:
                break
        bar.total = rows
    if not sums.positions:
        raise ValueError("dataloader must yield at least one position that is no padding, got none")
    return LayerSimilarity(sums.similarity(), sums.positions)


def plot_layer_similarity(result: LayerSimilarity, path: str | Path) -> None:
    """Draw a heat map as PNG: teacher's states by rows, student's by columns; the best match of each row is framed.

    Args:
        result: of :func:`layer_similarity`.
        path: of the file to write.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'textbrewer[plot]'") from error
    values = result.values.tolist()
    rows, columns = result.values.shape
    figure = Figure(figsize=(2.6 + 0.62 * columns, 1.6 + 0.44 * rows), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    for row in range(rows):
        for column in range(columns):
            value, colour = values[row][column], "white" if values[row][column] > 0.6 else "black"
            text = "?" if value != value else f"{value:.2f}"
            best = column == result.best_student[row]
            axes.text(column, row, text, ha="center", va="center", size=9, color=colour, weight=700 if best else 400)
            if best:
                axes.add_patch(
                    Rectangle((column - 0.45, row - 0.43), 0.9, 0.86, fill=False, edgecolor="darkorange", lw=2.5)
                )
    axes.set_xticks(range(columns))
    axes.set_yticks(range(rows))
    axes.set_xlabel("hidden state of the student")
    axes.set_ylabel("hidden state of the teacher")
    axes.set_title("Similarity of layers (linear CKA)", size=11)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xticks([column - 0.5 for column in range(1, columns)], minor=True)
    axes.set_yticks([row - 0.5 for row in range(1, rows)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    bar = figure.colorbar(image, ax=axes, label="0: unlike, 1: alike")
    bar.ax.spines["outline"].set_visible(False)
    figure.supxlabel(f"framed: best of each row; {result.positions:,} positions", size=8, color="dimgray")
    figure.savefig(path, dpi=150, format="png")


class _Side:
    """A model with its adaptor."""

    def __init__(self, model: nn.Module, adaptor: Adaptor | str, who: str) -> None:
        self.model, self.who, self.name = model, who, f"adaptor_{who[0].upper()}"
        self.adaptor = resolve(adaptor, self.name)
        self.arguments, self.device = auto_arguments(self.adaptor, {"hidden"}), device_of(model)

    def states(self, batch: Any) -> tuple[list[Tensor], Tensor | None]:
        """Return the hidden states of a batch, and which of its positions are no padding, if it says so."""
        if isinstance(batch, Mapping) and {"teacher", "student"} <= batch.keys():
            batch = batch[self.who]
        batch = on_device(batch, self.device)
        views = normalise(self.adaptor(batch, call(self.model, batch, self.arguments)), self.name)
        if not len(views.get("hidden", ())):
            raise KeyError(f"{self.name} must return the hidden states under 'hidden', got {sorted(views)}")
        states = list(views["hidden"])
        for state in states:
            if state.dim() not in (2, 3) or state.shape[:-1] != states[0].shape[:-1]:
                raise ValueError(
                    f"all hidden states of the {self.who} must be (batch, length, width) or (batch, width) at the same "
                    f"positions, got {tuple(state.shape)}"
                )
        mask = views.get("inputs_mask") if states[0].dim() == 3 else None
        return states, None if mask is None else mask.bool()


def _check_positions(state_T: Tensor, mask_T: Tensor | None, state_S: Tensor, mask_S: Tensor | None) -> None:
    """Raise unless the states of both sides are at the same positions."""
    places = {tuple(state_T.shape[:-1]), *(tuple(mask.shape) for mask in (mask_T, mask_S) if mask is not None)}
    both = mask_T is not None and mask_S is not None
    if places != {tuple(state_S.shape[:-1])} or (both and not torch.equal(mask_T.cpu(), mask_S.cpu())):  # type: ignore[union-attr]
        raise ValueError(
            "the hidden states of teacher and student must be at the same positions, with the same mask, got states of "
            f"{tuple(state_T.shape)} and {tuple(state_S.shape)}"
        )


def _at_positions(states: list[Tensor], mask: Tensor | None, rows: int) -> list[Tensor]:
    """Return the states of the first rows as ``(positions, width)``, without padding."""
    if mask is None:
        return [state[:rows].flatten(0, -2) for state in states]
    kept = mask[:rows].to(states[0].device)
    return [state[:rows][kept] for state in states]


class _Sums:
    """Sums over positions: of each state, of its products with itself, and of each with every one of the other side.

    The products of one batch are computed in float32, the sums kept in float64.
    """

    def __init__(self) -> None:
        self.positions = 0
        self._first: list[list[Tensor]] = []
        self._totals: list[list[Tensor]] = []
        self._own: list[list[Tensor]] = []
        self._cross = torch.empty(0)

    def add(self, states_T: list[Tensor], states_S: list[Tensor]) -> None:
        """Add states ``(positions, width)`` of both sides."""
        if not len(states_T[0]):
            return
        sides = [[state.float() for state in states] for states in (states_T, states_S)]
        if not self._first:
            self._begin(sides)
        if [len(states) for states in sides] != [len(means) for means in self._first]:
            raise ValueError(
                f"every batch must give as many hidden states, got {len(states_T)} and {len(states_S)} after "
                f"{len(self._first[0])} and {len(self._first[1])}"
            )
        centred = []
        for states, means, totals, own in zip(sides, self._first, self._totals, self._own, strict=True):
            centred.append([state - mean for state, mean in zip(states, means, strict=True)])
            for number, state in enumerate(centred[-1]):
                totals[number] += state.double().sum(0)
                own[number] += state.T @ state
        mine, theirs = (torch.cat(states, dim=1) for states in centred)
        self._cross += mine.T @ theirs.to(mine.device)
        self.positions += len(mine)

    def _begin(self, sides: list[list[Tensor]]) -> None:
        # Less a constant the result is the same, and little is lost where means are large beside the variation.
        self._first = [[state.mean(0) for state in states] for states in sides]
        self._totals = [[mean.new_zeros(len(mean), dtype=torch.float64) for mean in means] for means in self._first]
        self._own = [[mean.new_zeros(len(mean), len(mean)).double() for mean in means] for means in self._first]
        rows, columns = (sum(len(mean) for mean in means) for means in self._first)
        self._cross = self._first[0][0].new_zeros(rows, columns, dtype=torch.float64)

    def similarity(self) -> Tensor:
        """Return CKA, ``(teacher's states, student's states)``."""
        count = self.positions
        means_T, means_S = ([total / count for total in totals] for totals in self._totals)
        norms_T, norms_S = (
            [float((product - count * mean.outer(mean)).norm()) for product, mean in zip(own, means, strict=True)]
            for own, means in zip(self._own, (means_T, means_S), strict=True)
        )
        widths_S = [len(mean) for mean in means_S]
        values = torch.full((len(means_T), len(means_S)), float("nan"), dtype=torch.float64)
        for i, row in enumerate(torch.split(self._cross, [len(mean) for mean in means_T])):
            for j, product in enumerate(torch.split(row, widths_S, dim=1)):
                alike = product - count * means_T[i].outer(means_S[j].to(product.device))
                scale = norms_T[i] * norms_S[j]
                if scale > 0:
                    values[i, j] = float(alike.square().sum()) / scale
        return values
