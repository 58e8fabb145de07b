"""What the teachers say of one batch, each when it is asked: run, looked up, or remembered."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from textbrewer.adaptors import Views
from textbrewer.matching import PlannedMatch

__all__ = ["Said", "Unheard", "heard"]


class Unheard(Views):
    """In place of the views of a teacher that was not asked."""

    def __init__(self) -> None:
        super().__init__({})


class Said:
    """The teachers' side of one batch.

    Args:
        count: how many teachers there are.
        view: returns what one says; nothing of it is kept here.
        part: returns what one says of some of the rows; ``None``: a teacher can be asked of all rows only.
    """

    def __init__(
        self,
        count: int,
        view: Callable[[int], Views],
        part: Callable[[int, Sequence[int]], Views] | None = None,
    ) -> None:
        self.count, self.view, self.part = count, view, part

    def __len__(self) -> int:
        """Return how many teachers there are."""
        return self.count

    def __call__(self, number: int) -> Views:
        """Return what one teacher says of the batch."""
        return self.view(number)

    def all(self) -> list[Views]:
        """Return what each teacher says."""
        return [self.view(number) for number in range(self.count)]

    def features(self) -> list[Views]:
        """Return what each teacher says beside its logits, which are let go before the next teacher is asked."""
        views = []
        for number in range(self.count):
            views.append(self.view(number))
            views[-1].pop("logits", None)
        return views


def heard(plan: Sequence[PlannedMatch], results_T: Sequence[Views]) -> list[PlannedMatch]:
    """Return the matches whose teacher was asked."""
    return [planned for planned in plan if not isinstance(results_T[planned.match.teacher], Unheard)]
