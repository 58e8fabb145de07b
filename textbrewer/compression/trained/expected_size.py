"""How many parameters a model has when each unit and layer stays with some probability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from textbrewer.compression.sites import Layout, Site

__all__ = ["ExpectedSize"]


class ExpectedSize:
    r"""The expected share of the parameters inside a model's stacks of layers that is gone.

    .. math::
        s = 1 - \frac1N \sum_l p_l \Big( n_l + \sum_{i} c_{il} \sum_{u \in i} p_u \Big)

    with :math:`N` parameters in all layers, :math:`p_l` and :math:`p_u` the probabilities that a layer and a unit stay,
    :math:`c_{il}` the parameters of one unit of site :math:`i` in layer :math:`l`, and :math:`n_l` those of a layer
    that belong to no unit. It is what :meth:`Masked.sparsity() <textbrewer.compression.Masked.sparsity>` calls
    ``"stack_parameters"`` once each probability is 0 or 1.

    Args:
        model: the model.
        layout: its sites.
        sites: those whose units may go.

    Reference:
        Xia et al., "Structured Pruning Learns Compact and Accurate Models", 2022, arXiv:2204.00408, equation 2.
    """

    def __init__(self, model: nn.Module, layout: Layout, sites: Sequence[Site]) -> None:
        self.sites = [site for site in sites if site.inner is not None]
        self.stacks = [(stack.path, len(stack.blocks)) for stack in layout.stacks]
        # What outlives its layer, a table that the first one has for all, is of one more layer, which always stays.
        self._places = {f"{path}.{number}.": place for place, (path, number) in enumerate(self._layers())}
        parameters = dict(model.named_parameters())
        tables = tuple(f".{table}.weight" for site in layout.sites for table in site.tables)
        sizes = torch.zeros(len(self._places) + 1, dtype=torch.float64)
        costs = torch.zeros(len(self.sites), len(sizes), dtype=torch.float64)
        for name, parameter in parameters.items():
            place = self._place(name, tables)
            if place is not None:
                sizes[place] += parameter.numel()
        for row, site in enumerate(self.sites):
            for name, _ in site.inner.axes if site.inner is not None else ():
                place = self._place(name, tables)
                if place is not None and name in parameters:
                    costs[row, place] += parameters[name].numel() / site.units
        self.total = float(sizes.sum())
        units = torch.tensor([float(site.units) for site in self.sites], dtype=torch.float64)
        self._costs = (costs / self.total).float()
        self._rest = ((sizes - units @ costs) / self.total).float()

    def __call__(self, kept: Mapping[str, Tensor]) -> Tensor:
        """Return the expected share, a scalar with gradients.

        Args:
            kept: the probabilities that units stay, ``(units,)`` by site; also those of layers, by the name of their
                list, which stay for certain where they are not there.
        """
        device = next(iter(kept.values())).device
        units = [kept[site.name].sum() for site in self.sites]
        sums = torch.stack(units) if units else torch.zeros(0, device=device)
        layers = [kept.get(path, torch.ones(size, device=device)) for path, size in self.stacks]
        layer = torch.cat([*layers, torch.ones(1, device=device)])
        return 1 - layer @ (self._rest.to(device) + sums @ self._costs.to(device))

    def costs(self, layers: Mapping[str, Tensor]) -> dict[str, float]:
        """Return what share of the parameters one unit of each site is, in the layers that stay.

        Args:
            layers: which do, by the name of their list; others all.
        """
        stays = [(layers[path] > 0).float().cpu() if path in layers else torch.ones(size) for path, size in self.stacks]
        units = self._costs @ torch.cat([*stays, torch.ones(1)])
        return {site.name: float(cost) for site, cost in zip(self.sites, units, strict=True)}

    def _layers(self) -> list[tuple[str, int]]:
        return [(path, number) for path, size in self.stacks for number in range(size)]

    def _place(self, name: str, tables: tuple[str, ...]) -> int | None:
        """Return the number of the layer that a parameter is in, ``None`` for one that is in none."""
        if tables and name.endswith(tables):
            return len(self._places)
        for prefix, place in self._places.items():
            if name.startswith(prefix):
                return place
        return None
