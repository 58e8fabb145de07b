"""The one module that is trained and wrapped: the student with its projections."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from textbrewer.adaptors import Adaptor, normalise
from textbrewer.hooks.forward import call
from textbrewer.matching import CustomMatch, PlannedMatch, select
from textbrewer.matching.custom import recording

__all__ = ["StudentModule"]


class StudentModule(nn.Module):
    """The student, and the projections of its features to the teacher's widths.

    Args:
        student: the model to train.
        adaptors: its adaptor by task name (``""`` where there are no tasks).
        projections: by the number of the match.
        plan: the intermediate matches.
        custom: the custom matches.
        custom_modules: their modules of the student.
        learner: what is learnt beside the student, ``f(views, task)``: in the same forward pass, so that its gradients
            are synchronised too.
        tasks: numbers of the matches of each task; ``None``: all matches are of every task.
    """

    def __init__(
        self,
        student: nn.Module,
        adaptors: Mapping[str, Adaptor],
        projections: Mapping[int, nn.Module],
        plan: Sequence[PlannedMatch] = (),
        custom: Sequence[CustomMatch] = (),
        custom_modules: Sequence[nn.Module] = (),
        learner: nn.Module | None = None,
        tasks: Mapping[str, Collection[int]] | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.learner = learner
        self._tasks = tasks
        self.projections = nn.ModuleDict({str(number): module for number, module in projections.items()})
        self.custom_projections = nn.ModuleDict(
            {
                str(number): match.proj_func
                for number, match in enumerate(custom)
                if isinstance(match.proj_func, nn.Module)
            }
        )
        # What strategies remember of the training is checkpointed with the module; they are called outside of it.
        self.strategies = nn.ModuleDict(
            {str(planned.number): planned.strategy for planned in plan if planned.strategy is not None}
        )
        self._adaptors = dict(adaptors)
        self._projected = [planned for planned in plan if planned.number in projections]
        self._custom = list(custom)
        # In a tuple, so that they are not registered as sub-modules a second time.
        self._custom_modules = tuple(custom_modules)

    def forward(self, batch: Any, arguments: Mapping[str, Any], task: str = "") -> dict[str, Any]:
        """Return the student's views, projected features and captured outputs as plain dicts.

        Args:
            batch: the student's batch.
            arguments: further arguments of the model.
            task: the task of the batch.
        """
        if self._custom:
            with recording(self._custom_modules) as outputs:
                results = call(self.student, batch, arguments)
            captured = {number: self._project_custom(number, outputs) for number in range(len(self._custom))}
        else:
            results, captured = call(self.student, batch, arguments), {}
        views = normalise(self._adaptors[task](batch, results), "adaptor_S")
        own = None if self._tasks is None else self._tasks[task]
        mine = [planned for planned in self._projected if own is None or planned.number in own]
        projected = {planned.number: self._project(planned, views) for planned in mine}
        output = {"views": views, "projected": projected, "captured": captured}
        return output if self.learner is None else {**output, "learned": self.learner(views, task)}

    def _project(self, planned: PlannedMatch, views: Mapping[str, Any]) -> Any:
        match = planned.match
        feature = select(views, match.feature, match.layer_S, "student")
        module = self.projections[str(planned.number)]
        items = feature if isinstance(feature, list) else [feature]
        width = match.projection.dim_S if match.projection is not None else None
        for item in items:
            if width is not None and item.shape[-1] != width:
                raise ValueError(
                    f"proj {match.proj!r} of match {planned.name!r} must name the student's width {item.shape[-1]} as "
                    f"its second item, got {width}"
                )
        projected = [module(item) for item in items]
        return projected if isinstance(feature, list) else projected[0]

    def _project_custom(self, number: int, outputs: Mapping[int, Any]) -> Any:
        if number not in outputs:
            raise ValueError(f"module_S of custom match {number} did not run in the student's forward pass")
        function = self._custom[number].proj_func
        output: Tensor = outputs[number]
        return output if function is None else function(output)
