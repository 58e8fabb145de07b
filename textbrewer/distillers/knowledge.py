"""How logits are compared: the loss with its temperature, its schedule, and what else it reads."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from textbrewer.configurations import DistillationConfig
from textbrewer.losses.masking import denominator_of
from textbrewer.losses.transforms import LOGIT_TRANSFORMS
from textbrewer.registry import KD_LOSS_MAP, name_of


@dataclass(frozen=True)
class KnowledgeLoss:
    """How logits are compared.

    Args:
        loss: a function of ``KD_LOSS_MAP``.
        temperature: the base temperature.
        scheduler: a temperature schedule, or ``None``.
        probability_shift: whether the teacher's largest logit is swapped to the true label.
        transform: applied to both sides' logits first, or ``None``.
    """

    loss: Callable[..., Tensor]
    temperature: float
    scheduler: Callable[..., Any] | None = None
    probability_shift: bool = False
    transform: Callable[..., Tensor] | None = None

    @cached_property
    def takes_mask(self) -> bool:
        """Whether loss and schedule can be given a mask; if not, masked positions are selected beforehand."""
        return all(accepts(item, "mask") for item in (self.loss, self.scheduler, self.transform) if item is not None)

    @cached_property
    def takes_labels(self) -> bool:
        """Whether the loss reads the true classes."""
        return accepts(self.loss, "labels")

    @cached_property
    def why_labels(self) -> str:
        """What needs the true classes; empty: nothing does."""
        if self.probability_shift:
            return "probability_shift=True"
        return "the KD loss" if self.takes_labels else ""

    @cached_property
    def has_parts(self) -> bool:
        """Whether the loss of a batch is the mean of those of its parts, each weighed by what it averages over.

        Not if the loss compares rows, or reads labels and does not tell what it averages over, or the temperature
        depends on the other positions of the batch, as those of ``"flsw"`` and ``"cwsm"`` do.
        """
        unit = denominator_of(self.loss)
        if unit == "batch" or (unit is None and self.takes_labels):
            return False
        return self.scheduler is None or accepts(self.scheduler, "progress")

    def __call__(
        self,
        logits_S: Tensor,
        logits_T: Tensor,
        mask: Tensor | None,
        labels: Tensor | None = None,
        progress: float = 0.0,
    ) -> Tensor:
        """Return the loss of one head.

        Args:
            logits_S: the student's logits, ``(batch, classes)`` or ``(batch, length, classes)``.
            logits_T: the teacher's, the same shape.
            mask: the shape of the logits without their classes.
            labels: the true classes, the same shape as the mask, for a loss that reads them.
            progress: how much of the run is done, 0 to 1.
        """
        keywords: dict[str, Any] = {} if mask is None else {"mask": mask}
        temperature: Any = self.temperature
        if self.transform is not None:
            logits_S, logits_T = self.transform(logits_S, **keywords), self.transform(logits_T, **keywords)
        if self.scheduler is not None:
            more = {"progress": progress} if accepts(self.scheduler, "progress") else {}
            temperature = self.scheduler(logits_S, logits_T, temperature, **keywords, **more)
        if self.takes_labels:
            keywords["labels"] = labels
        if accepts(self.loss, "progress"):
            keywords["progress"] = progress
        return self.loss(logits_S, logits_T, temperature, **keywords)


@functools.lru_cache(maxsize=256)
def accepts(function: Callable[..., Any], name: str) -> bool:
    """Return whether a function has a parameter of this name."""
    try:
        return name in inspect.signature(function).parameters
    except ValueError:
        return False


def make_knowledge(config: DistillationConfig) -> KnowledgeLoss:
    """Return how a configuration wants logits to be compared."""
    transform = None if config.logit_transform in (None, "none") else LOGIT_TRANSFORMS[config.logit_transform]
    loss = KD_LOSS_MAP.bound(config.kd_loss_type)
    scheduler = config.make_temperature_scheduler()
    return KnowledgeLoss(loss, config.temperature, scheduler, config.probability_shift, transform)


def refuse_without_length(config: DistillationConfig, knowledge: KnowledgeLoss) -> None:
    """Raise for a configuration that reads the progress of a run whose length is not known.

    Args:
        config: what is scheduled.
        knowledge: how its logits are compared.

    Raises:
        ValueError: if a weight, the temperature or the loss depends on how much of the run is done.
    """
    specs = (config.kd_loss_weight_scheduler, config.hard_label_weight_scheduler)
    names = {f"the weight scheduler {str(name_of(spec))!r}" for spec in specs if spec not in (None, "none")}
    if knowledge.scheduler is not None and accepts(knowledge.scheduler, "progress"):
        names.add(f"the temperature scheduler {str(name_of(config.temperature_scheduler))!r}")
    if accepts(knowledge.loss, "progress"):
        names.add(f"kd_loss_type={str(name_of(config.kd_loss_type))!r}")
    if names:
        raise ValueError(f"{min(names)} must know the run's length, but the dataloader has none: give num_steps")
