"""Students that learn from the labels and from each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from textbrewer import checks
from textbrewer.adaptors import Adaptor, Views, normalise, one_each, resolve
from textbrewer.configurations import DistillationConfig, TrainingConfig
from textbrewer.distillers import first_step, terms
from textbrewer.distillers.knowledge import KnowledgeLoss, make_knowledge, refuse_without_length
from textbrewer.distillers.trainer import BasicTrainer
from textbrewer.engine import Runtime, StepPlan
from textbrewer.hooks.forward import call


class Cohort(nn.Module):
    """Several students as one module: the first of them is the one that is wanted.

    Args:
        models: the students.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)


class CohortModule(nn.Module):
    """The one module that is trained and wrapped: the cohort, whose forward pass gives the views of each student.

    Args:
        cohort: the students.
        adaptors: an adaptor a student.
    """

    def __init__(self, cohort: Cohort, adaptors: Sequence[Adaptor]) -> None:
        super().__init__()
        self.student = cohort
        self._adaptors = list(adaptors)

    def forward(self, batch: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the views of each student as plain dicts."""
        views = []
        for model, adaptor in zip(self.student.models, self._adaptors, strict=True):
            views.append(normalise(adaptor(batch, call(model, batch, arguments)), "adaptor"))
        return {"views": views}


class MutualDistiller(BasicTrainer):
    r"""Trains several students at once, on the labels and on what the others say (deep mutual learning).

    .. math:: L = \sum_i \left[\lambda\, \mathrm{CE}_i + \frac{w}{N - 1} \sum_{j \ne i} L_\mathrm{KD}(q_j, q_i)\right]

    Each student's predictions are a target for the others, through which no gradient flows. The checkpoints for
    resuming hold all students, ``gs<step>.pkl`` the first one, the callback gets the first one.

    Args:
        train_config: how to train.
        distill_config: the loss between logits, its weight :math:`w`, temperature and schedules, and the weight
            :math:`\lambda` of the labels; without intermediate matches.
        models: the students, two or more; they may differ in kind.
        adaptors: one adaptor for all, or a list of one each; ``"auto"`` for transformers models.

    Raises:
        TypeError, ValueError: if an argument cannot work; the message names it.

    Reference:
        Zhang et al., "Deep Mutual Learning", 2018, arXiv:1706.00384, sections 2.1 and 2.3 (all students updated in one
        step, as in the section on more networks, not in turn).
    """

    def __init__(
        self,
        train_config: TrainingConfig,
        distill_config: DistillationConfig,
        models: Sequence[nn.Module],
        adaptors: Adaptor | str | Sequence[Adaptor | str] = "auto",
    ) -> None:
        checks.is_a(distill_config, DistillationConfig, "distill_config", "a DistillationConfig")
        checks.is_a(models, (list, tuple, nn.ModuleList), "models", "a list of at least two students")
        if len(models) < 2 or len({id(model) for model in models}) < len(models):
            raise ValueError(f"models must be a list of at least two different students, got {len(models)}")
        for model in models:
            checks.is_a(model, nn.Module, "each of models", "a torch module")
        for name, value in (
            ("intermediate_matches", distill_config.intermediate_matches),
            ("is_caching_logits", distill_config.is_caching_logits),
            ("teacher_cache", distill_config.teacher_cache),
        ):
            if value:
                raise ValueError(f"{name} is not for mutual learning, whose students all change at every step")
        self.cohort = Cohort(list(models))
        given = one_each(adaptors, len(models), "adaptors", "student")
        self.adaptors = [resolve(item, "adaptors") for item in given]
        self.d_config = dataclasses.replace(distill_config)
        super().__init__(train_config, self.cohort, self.adaptors[0])

    @property
    def exported(self) -> nn.Module:
        """The student that ``gs<step>.pkl`` and the callback are about: the first."""
        return self.cohort.models[0]

    def _called_models(self) -> list[nn.Module]:
        return list(self.cohort.models)

    def _module(self) -> nn.Module:
        return CohortModule(self.cohort, self.adaptors)

    def _step(self, runtime: Runtime, model_args: dict[str, Any], plan: StepPlan) -> Any:
        knowledge = make_knowledge(self.d_config)
        if plan.total_steps is None:
            refuse_without_length(self.d_config, knowledge)
        return MutualStep(runtime, model_args, self.d_config, knowledge)


class MutualStep:
    """One forward pass of all students.

    Args:
        runtime: the machine.
        model_args: further arguments of the models.
        config: the weights.
        knowledge: how logits are compared.
    """

    def __init__(
        self, runtime: Runtime, model_args: dict[str, Any], config: DistillationConfig, knowledge: KnowledgeLoss
    ) -> None:
        self.runtime, self.model_args, self.config, self.knowledge = runtime, model_args, config, knowledge
        self._first = True

    def __call__(self, module: nn.Module, batch: Any, progress: float, share: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the students' losses, and the mean of its parts over the students."""
        batch = self.runtime.to_device(batch)
        with first_step.explained(batch):
            every = [Views(views) for views in module(batch, self.model_args)["views"]]
        for views in every:
            if "logits" not in views:
                raise KeyError(f"mutual learning needs 'logits' of each student, one returned only {sorted(views)}")
            if self._first:
                first_step.check_labels(views)
                first_step.check_classes(views, self.config)
                first_step.warn_without_losses(views, self.config.hard_label_weight)
        self._first = False
        now = terms.scheduled(self.config, progress, share)
        losses, values = [], {}
        for number, views in enumerate(every):
            parts = terms.hard_label_terms(views, now)
            peers = [self._as_target(other) for other in every if other is not views]
            from_peers = [terms.kd_terms(views, peer, self.knowledge, now)[0] for peer in peers]
            mean = torch.stack([term.value for term in from_peers]).mean()
            parts.append(dataclasses.replace(from_peers[0], name="mutual_loss", value=mean))
            loss, logs = terms.total(parts, now)
            losses.append(loss)
            values.update({f"{name}_{number}": value for name, value in logs.items()})
        return torch.stack(losses).sum(), values

    def _as_target(self, views: Views) -> Views:
        entries = {**views, "logits": [logits.detach() for logits in views["logits"]]}
        return Views(entries)
