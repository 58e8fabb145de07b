"""How important a model's units are on some data: by their activations, or by how the loss depends on them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from textbrewer import adaptors
from textbrewer.adaptors import Adaptor
from textbrewer.compression.gates import close, layer_input, open_gates
from textbrewer.compression.hidden_gates import open_reading
from textbrewer.compression.sites import HIDDEN, Site
from textbrewer.hooks import first_tensor
from textbrewer.hooks.forward import call, device_of, evaluating, is_encoder_decoder, on_device, real_positions
from textbrewer.layouts.residual import Residual

__all__ = ["DATA_SCORES", "activity_scores", "batches_on", "loss_of", "taylor_scores"]

Scores = dict[str, Tensor]


def taylor_scores(
    model: nn.Module, sites: Sequence[Site], dataloader: Iterable[Any], adaptor: Adaptor | str = "auto"
) -> Scores:
    r"""Return how much the loss would change without a unit, to first order, ``(units,)`` by site.

    .. math::
        s_u = \sum_b \Big( \frac{\partial L_b}{\partial z_u} z_u \Big)^2, \qquad z_u = 1

    over batches :math:`b`, with :math:`z_u` a factor on what the unit gives: for a feed-forward unit, a head and a
    hidden feature the sum of :math:`g_w w` over the weights that read it (a hidden feature is read by all linear maps
    that the residual stream goes into), so that their first-order terms may cancel before they are squared. Units that
    several layers must share have one factor for all of them.

    Args:
        model: run in eval mode; its modes are put back, and its gradients are left alone.
        sites: what to score.
        dataloader: batches as the model takes them, with labels.
        adaptor: its ``losses`` are what counts, the sum of their means.

    Raises:
        ValueError: if the adaptor returns no losses, or the dataloader yields nothing.

    Reference:
        Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019, arXiv:1906.10771, equation 8;
        Michel et al., "Are Sixteen Heads Really Better than One?", 2019, arXiv:1905.10650, section 4.1.
    """
    read = adaptors.resolve(adaptor, "adaptor")
    factors = {site.name: torch.ones(site.units, requires_grad=True) for site in sites}
    scores = {site.name: torch.zeros(site.units, dtype=torch.float64) for site in sites}
    handles = open_gates(model, [site for site in sites if site.kind != HIDDEN], factors)
    for site in sites:
        if isinstance(site.inner, Residual):
            handles += open_reading(model, site.inner, factors[site.name])
    try:
        with evaluating(model), torch.enable_grad():
            for batch in batches_on(dataloader, device_of(model)):
                loss = loss_of(read(batch, call(model, batch, {})))
                gradients = torch.autograd.grad(loss, list(factors.values()), allow_unused=True)
                for name, gradient in zip(factors, gradients, strict=True):
                    if gradient is not None:
                        scores[name] += gradient.double().square().cpu()
    finally:
        close(handles)
    return scores


def activity_scores(
    model: nn.Module, sites: Sequence[Site], dataloader: Iterable[Any], measure: Callable[[Tensor], Tensor]
) -> Scores:
    r"""Return the mean of a measure of each unit's activations over all real positions, ``(units,)`` by site.

    A head's or unit's activations are what it gives to the module that reads it, a layer's what it changes of the
    hidden states, a hidden feature's its place in the hidden states that layers return; the mean is over positions that
    are no padding, and over a head's features.

    Args:
        model: run in eval mode and without gradients; its modes are put back.
        sites: what to score.
        dataloader: batches as the model takes them.
        measure: a function of activations, element by element.

    Raises:
        ValueError: if the dataloader yields nothing.
    """
    meters = [_Meter(site, model, measure) for site in sites]
    with ExitStack() as open_contexts, torch.no_grad():
        open_contexts.enter_context(evaluating(model))
        for meter in meters:
            meter.attach(model, open_contexts)
        for batch in batches_on(dataloader, device_of(model)):
            for meter in meters:
                meter.batch = batch
            call(model, batch, {})
    return {meter.site.name: meter.sums / meter.counts.clamp(min=1) for meter in meters}


def mean_activation(
    model: nn.Module, sites: Sequence[Site], dataloader: Iterable[Any], adaptor: Adaptor | str = "auto"
) -> Scores:
    r"""Return the mean magnitude of each unit's activations, :math:`\frac1P \sum_p |h_{p,u}|`, ``(units,)`` by site.

    Reference:
        Molchanov et al., "Pruning Convolutional Neural Networks", 2017, arXiv:1611.06440, section 2.2 ("activation").
    """
    return activity_scores(model, sites, dataloader, torch.abs)


def nonzero_share(
    model: nn.Module, sites: Sequence[Site], dataloader: Iterable[Any], adaptor: Adaptor | str = "auto"
) -> Scores:
    """Return the share of each unit's activations that are not zero: 1 minus APoZ, their average percentage of zeros.

    It tells units apart behind a ReLU; a GELU's activations are hardly ever zero.

    Raises:
        ValueError: if layers or hidden features are to be scored, whose activations are never zero.

    Reference:
        Hu et al., "Network Trimming", 2016, arXiv:1607.03250, equation 1.
    """
    if any(site.kind == "layers" for site in sites):
        raise ValueError('score must not be "apoz" for whole layers, whose outputs are never zero; use "taylor"')
    if any(site.kind == HIDDEN for site in sites):
        raise ValueError('score must not be "apoz" for hidden features, which are hardly ever zero; use "taylor"')
    return activity_scores(model, sites, dataloader, lambda values: (values != 0).to(values.dtype))


DATA_SCORES: dict[str, Callable[..., Scores]] = {
    "taylor": taylor_scores,
    "mean_activation": mean_activation,
    "apoz": nonzero_share,
}
"""Scores on data: ``f(model, sites, dataloader, adaptor) -> {site: (units,)}``."""


class _Meter:
    """Sums a measure of one site's activations."""

    def __init__(self, site: Site, model: nn.Module, measure: Callable[[Tensor], Tensor]) -> None:
        self.site, self.measure = site, measure
        self.batch: Any = None
        self.sums = torch.zeros(site.units, dtype=torch.float64)
        self.counts = torch.zeros(site.units, dtype=torch.float64)
        self.two_sided = is_encoder_decoder(model)
        self.decoder = self.two_sided and "decoder" in site.stack.split(".")

    def attach(self, model: nn.Module, open_contexts: ExitStack) -> None:
        """Listen until the contexts are closed."""
        if isinstance(self.site.inner, Residual):
            for name in self.site.inner.layers:
                handle = model.get_submodule(name).register_forward_hook(self._returned(name))
                open_contexts.callback(handle.remove)
            return
        if self.site.inner is not None:
            for name in self.site.inner.readers:
                handle = model.get_submodule(name).register_forward_pre_hook(self._heard)
                open_contexts.callback(handle.remove)
            return
        for number in range(self.site.units):
            layer = model.get_submodule(f"{self.site.stack}.{number}")
            handle = layer.register_forward_hook(self._listener(number), with_kwargs=True)
            open_contexts.callback(handle.remove)

    def _heard(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._add(self._real(first_tensor(inputs)))

    def _returned(self, name: str) -> Callable[..., None]:
        decoder = self.two_sided and "decoder" in name.split(".")

        def listen(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            self.decoder = decoder
            self._add(self._real(first_tensor(output)))

        return listen

    def _add(self, values: Tensor) -> None:
        """Add activations, ``(positions, features)``."""
        by_unit = self.measure(values.double()).reshape(len(values), self.site.units, -1)
        self.sums += by_unit.mean(2).sum(0).cpu()
        self.counts += len(values)

    def _listener(self, number: int) -> Callable[..., None]:
        def listen(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            values = self._real(first_tensor(output) - layer_input(inputs, named))
            self.sums[number] += self.measure(values.double()).mean(1).sum().cpu()
            self.counts[number] += len(values)

        return listen

    def _real(self, states: Tensor) -> Tensor:
        """Return the states of real positions, ``(positions, features)``."""
        mask = real_positions(self.batch, self.decoder, states.shape[:-1])
        return states.flatten(0, -2) if mask is None else states[mask]


def check_data(score: str | Mapping[str, Tensor], needing: Collection[str], dataloader: Any, remedy: str) -> None:
    """Raise ValueError unless data is given where a score needs it, and only there.

    Args:
        score: a name, or scores that the user worked out.
        needing: the names of those that need data.
        dataloader: what was given.
        remedy: how to pass it, for the message.
    """
    needs = isinstance(score, str) and score in needing
    if needs and dataloader is None:
        raise ValueError(f"score={score!r} needs data: pass {remedy}")
    if not needs and dataloader is not None:
        raise ValueError(f"dataloader must be None for score={score!r}, which does not read it; leave it out")


def batches_on(dataloader: Iterable[Any], device: torch.device) -> Iterable[Any]:
    """Yield the batches on a device.

    Raises:
        ValueError: if there are none.
    """
    number = 0
    for batch in tqdm(dataloader, desc="importance", leave=False, dynamic_ncols=True):
        yield on_device(batch, device)
        number += 1
    if not number:
        raise ValueError("dataloader must yield at least one batch to find out what matters, got none")


def loss_of(results: Any) -> Tensor:
    """Return the sum of the means of the losses that an adaptor gave.

    Raises:
        ValueError: if it gave none.
    """
    losses = adaptors.normalise(results).get("losses")
    if not losses:
        raise ValueError(
            'adaptor must return the model\'s "losses" for score="taylor", got none; with adaptor="auto", batches must '
            'have "labels"'
        )
    return torch.stack([loss.mean() for loss in losses]).sum()
