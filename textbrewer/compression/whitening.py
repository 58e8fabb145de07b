"""The inputs of linear maps on some data, and the directions of a map's outputs that matter for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from textbrewer import checks
from textbrewer.adaptors import Adaptor, auto_adaptor, normalise, resolve
from textbrewer.hooks import first_tensor
from textbrewer.hooks.forward import call, device_of, evaluating, is_encoder_decoder, on_device

__all__ = ["factors", "output_directions", "second_moments", "working_device"]

_IGNORED = -100
# Inside a decoder, the projections of these attentions that read the encoder's states.
_CROSS_ATTENTIONS = {"crossattention", "encoder_attn", "EncDecAttention"}
_OF_ENCODER = {"k", "v", "key", "value", "k_proj", "v_proj"}


def working_device(tensor: Tensor) -> torch.device:
    """Return where to compute in float64 what a tensor is about: on its device if that can, else on the CPU."""
    return tensor.device if tensor.device.type in ("cpu", "cuda") else torch.device("cpu")


def second_moments(
    model: nn.Module,
    maps: Mapping[str, nn.Module],
    dataloader: Iterable[Any],
    adaptor: Adaptor | str = "auto",
) -> dict[str, Tensor]:
    r"""Return the second moments of the inputs of linear maps on some data.

    .. math::
        C = \frac1P \sum_p x_p x_p^\top

    over all positions :math:`p` that are no padding, in all calls of the map; summed batch by batch in float64, which
    takes :math:`8 n^2` bytes for each map of :math:`n` inputs.

    Args:
        model: run in eval mode and without gradients, where it is; its modes are put back.
        maps: the linear maps inside it, by name.
        dataloader: batches as the model takes them; each is read once.
        adaptor: ``"auto"``: the batch's ``attention_mask`` says what is padding (inside a decoder its
            ``decoder_attention_mask``, or ``labels`` of -100), and all positions count where there is none. An adaptor
            of one's own returns ``inputs_mask``, for which each batch is run twice. A mask is applied to inputs at as
            many positions ``(batch, length)``.

    Returns:
        For each map that the data reached, ``(inputs, inputs)`` in float64.

    Raises:
        TypeError: if ``dataloader`` cannot be iterated.
        ValueError: if it yields nothing, or inputs are not finite.
    """
    checks.is_a(dataloader, Iterable, "dataloader", "an iterable of batches such as a DataLoader")
    chosen, device = resolve(adaptor, "adaptor"), device_of(model)
    sums = {name: _Sum() for name in maps}
    two_sided = is_encoder_decoder(model)
    batches = 0
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(evaluating(model))
        for batch in tqdm(dataloader, desc="inputs", leave=False, dynamic_ncols=True):
            batch = on_device(batch, device)
            own = None if chosen is auto_adaptor else _own_mask(chosen, batch, call(model, batch, {}))
            with ExitStack() as listening:
                for name, module in maps.items():
                    masks = _masks(batch, two_sided, name) if chosen is auto_adaptor else [own]
                    hook = _listener(sums[name], [mask for mask in masks if mask is not None])
                    handle = module.register_forward_pre_hook(hook)
                    listening.callback(handle.remove)
                call(model, batch, {})
            batches += 1
    if not batches:
        raise ValueError("dataloader must yield at least one batch, got none")
    moments = {name: total.mean() for name, total in sums.items() if total.positions}
    for name, moment in moments.items():
        if not bool(moment.isfinite().all()):
            raise ValueError(f"the inputs of {name!r} must be finite, got NaN or infinity on this data")
    return moments


class _Sum:
    """A sum of products over positions."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.positions = 0

    def add(self, states: Tensor) -> None:
        """Add inputs ``(positions, width)``."""
        states = states.to(working_device(states)).double()
        product = states.T @ states
        self.total = product if self.total is None else self.total.add_(product)
        self.positions += len(states)

    def mean(self) -> Tensor:
        """Return the mean of the products, ``(width, width)``."""
        if self.total is None:
            raise ValueError("a mean needs at least one position, got none")
        return self.total / self.positions


def _listener(total: _Sum, masks: list[Tensor]) -> Callable[[nn.Module, Any], None]:
    def listen(module: nn.Module, inputs: Any) -> None:
        states = first_tensor(inputs)
        flat = states.flatten(0, -2) if states.dim() > 1 else states.unsqueeze(0)
        for mask in masks:
            # Some models flatten batch and length into one dimension on the way.
            if mask.shape == states.shape[:-1] or (states.dim() == 2 and len(states) == mask.numel()):
                flat = flat[mask.flatten()]
                break
        if len(flat):
            total.add(flat)

    return listen


def _own_mask(adaptor: Adaptor, batch: Any, outputs: Any) -> Tensor | None:
    mask = normalise(adaptor(batch, outputs)).get("inputs_mask")
    return None if mask is None else mask.bool()


def _masks(batch: Any, two_sided: bool, name: str) -> list[Tensor | None]:
    """Return the masks that a batch has for a module; the first one of the right shape counts."""
    if not isinstance(batch, Mapping):
        return []
    parts = name.split(".")
    reads_encoder = not _CROSS_ATTENTIONS.isdisjoint(parts) and parts[-1] in _OF_ENCODER
    if two_sided and "decoder" in parts and not reads_encoder:
        mask, labels = batch.get("decoder_attention_mask"), batch.get("labels")
        if mask is None and labels is not None:
            mask = labels != _IGNORED
    else:
        mask = batch.get("attention_mask")
    return [None if mask is None else mask.bool()]


def output_directions(
    matrix: Tensor, moment: Tensor | None = None, damping: float = 0.0, name: str = "the map"
) -> tuple[Tensor, Tensor]:
    r"""Return the directions of a linear map's outputs, the one with most energy first.

    With the Cholesky factor of the damped moments, :math:`L L^\top = C + \epsilon \bar c I` where :math:`\bar c` is the
    mean of the diagonal of :math:`C`, they are the left singular vectors of :math:`W L`; without moments those of
    :math:`W`. The damping ranks directions that the data does not reach by their weights, and lets :math:`C` be
    singular.

    Args:
        matrix: :math:`W`, ``(outputs, inputs)``.
        moment: :math:`C`, ``(inputs, inputs)``.
        damping: :math:`\epsilon`.
        name: of the map, for messages.

    Returns:
        Orthonormal columns ``(outputs, min(outputs, inputs))``, and the energy of each: the squared singular values.

    Raises:
        ValueError: if the matrix is not finite, or :math:`C` is singular and not damped.
    """
    if not bool(matrix.isfinite().all()):
        raise ValueError(f"the weight of {name!r} must be finite, got NaN or infinity")
    whitened = matrix.double()
    if moment is not None:
        whitened = whitened @ _root(moment, damping, name)
    directions, values, _ = torch.linalg.svd(whitened, full_matrices=False)
    return directions, values.square()


def _root(moment: Tensor, damping: float, name: str) -> Tensor:
    """Return the Cholesky factor of the damped moments; of moments that are zero, the identity's."""
    mean = moment.diagonal().mean()
    if not bool(mean > 0):
        return torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    damped = moment + damping * mean * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise ValueError(
            f"the second moments of the inputs of {name!r} must not be singular with damping={damping!r}; "
            "use a larger damping such as 1e-6, or more data"
        )
    return root


def factors(matrix: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return ``up`` and ``down`` whose product is a matrix seen along some directions of its outputs.

    .. math::
        \hat W = U_k U_k^\top W = \mathrm{SVD}_k(W L) L^{-1}

    if :math:`U_k` are the first left singular vectors of :math:`W L`, whatever the (invertible) :math:`L`, as the
    truncated SVD is :math:`U_k U_k^\top W L`. So nothing need be solved or inverted, and rounding does not grow with
    the condition of :math:`L`. Each direction's scale is shared out evenly between the two factors.

    Args:
        matrix: :math:`W`, ``(outputs, inputs)``.
        directions: :math:`U_k`, ``(outputs, k)``, orthonormal columns.

    Returns:
        ``(outputs, k)`` and ``(k, inputs)`` in float64.
    """
    down = directions.T @ matrix.double()
    norms = down.norm(dim=1)
    scales = torch.where(norms > 0, norms, torch.ones_like(norms)).sqrt()
    return directions * scales, down / scales[:, None]
