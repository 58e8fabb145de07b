"""The key of a row of the teacher's input: a hash of its content without the padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

KEY_BYTES = 16
DEFAULT_MASK = "attention_mask"
# Of an encoder's own positions, though it is named as a mask of others.
_SAME_POSITIONS = "global_attention_mask"


@dataclass(frozen=True)
class Rows:
    """The rows of a batch.

    Args:
        keys: one a row.
        kept: where the batch has a mask and padding is left out, ``(batch, length)`` bool; else ``None``.
    """

    keys: list[bytes]
    kept: Tensor | None

    @property
    def padded(self) -> bool:
        """Whether some position is padding."""
        return self.kept is not None and not bool(self.kept.all())


def entries_of(batch: Any) -> dict[str, Any]:
    """Return a batch's entries by name: of a tuple or list their numbers, of anything else ``"0"``."""
    if isinstance(batch, Mapping):
        return {str(name): value for name, value in batch.items()}
    if isinstance(batch, (tuple, list)) and not hasattr(batch, "batch_sizes"):
        return {str(number): value for number, value in enumerate(batch)}
    return {"0": batch}


def mask_of(entries: Mapping[str, Any], name: str | None) -> Tensor | None:
    """Return the entry that is zero at the padding, ``(batch, length)`` on the CPU; ``None`` without one.

    Raises:
        KeyError: if a mask is named that is not there.
    """
    if name is not None and name not in entries:
        raise KeyError(f"mask {name!r} of the teacher cache is not in the batch; it has: {', '.join(entries)}")
    mask = entries.get(DEFAULT_MASK if name is None else name)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    return torch.from_numpy(_array(mask) != 0)


def has_other_positions(entries: Mapping[str, Any], mask_name: str | None) -> bool:
    """Return whether a batch has a second sequence, a decoder's or another text's, which its mask says nothing of."""
    own = {DEFAULT_MASK if mask_name is None else mask_name, _SAME_POSITIONS}
    return any(name.startswith("decoder_") or (DEFAULT_MASK in name and name not in own) for name in entries)


def row_count(entries: Mapping[str, Any]) -> int:
    """Return the number of rows of a batch.

    Raises:
        TypeError: if it has no tensor with rows.
    """
    for value in entries.values():
        if isinstance(value, Tensor) and value.dim() > 0:
            return len(value)
    kinds = ", ".join(f"{name}: {type(value).__name__}" for name, value in entries.items())
    raise TypeError(
        f"a teacher cache needs batches of tensors with one row an example, got ({kinds}); return a dict or tuple of "
        "tensors from the dataloader (or its collate_fn), or train without teacher_cache"
    )


def rows_of(batch: Any, mask_name: str | None, keep_padding: bool) -> Rows:
    """Return the keys of a batch's rows.

    Of a batch with a second sequence nothing is left out: its padding is not where the mask says.

    Args:
        batch: the teacher's batch: a dict, tuple or list of tensors, or a tensor.
        mask_name: the entry that is zero at the padding; ``None``: ``attention_mask``, where there is one.
        keep_padding: the padding is part of the key, for outputs that depend on it.

    Raises:
        TypeError: if the batch has no rows.
        KeyError: if the mask is not there.
    """
    entries = entries_of(batch)
    count = row_count(entries)
    mask = None if keep_padding else mask_of(entries, mask_name)
    if mask is not None and (len(mask) != count or has_other_positions(entries, mask_name)):
        mask = None
    common = blake2b(digest_size=KEY_BYTES)
    by_row: list[tuple[np.ndarray[Any, Any], bool]] = []
    for name, value in sorted(entries.items()):
        if is_list_of_rows(value, count):
            common.update(f"{name}:list;".encode())
            digests = b"".join(_digest(item) for item in value)
            by_row.append((np.frombuffer(digests, np.uint8).reshape(count, KEY_BYTES), False))
        elif not isinstance(value, Tensor):
            common.update(f"{name}=".encode())
            _add_plain(common, value)
        elif value.dim() == 0 or len(value) != count:
            common.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
            common.update(_array(value).tobytes())
        else:
            positional = mask is not None and value.shape[:2] == mask.shape
            # Numbers of a row beside its tokens, which may by chance be as many.
            positional = positional and not (value.dim() == 2 and value.is_floating_point())
            width = tuple(value.shape[2 if positional else 1 :])
            common.update(f"{name}:{value.dtype}:{width};".encode())
            by_row.append((_array(value), positional))
    kept = None if mask is None else mask.numpy()
    # With positions of its own a model does not count the padding before a row.
    starts_anywhere = "position_ids" in entries
    return Rows([_key(common, by_row, row, kept, starts_anywhere) for row in range(count)], mask)


def _key(
    common: Any,
    by_row: list[tuple[np.ndarray[Any, Any], bool]],
    row: int,
    kept: np.ndarray[Any, Any] | None,
    starts_anywhere: bool,
) -> bytes:
    digest = common.copy()
    places: Any = slice(None)
    if kept is not None:
        places = np.flatnonzero(kept[row])
        # Where the kept positions lie: behind padding on the left a model without position_ids counts otherwise.
        numbers = places - places[0] if starts_anywhere and len(places) else places
        dense = len(numbers) == 0 or numbers[-1] + 1 == len(numbers)
        digest.update(b"%d;" % len(numbers) if dense else numbers.astype(np.int32).tobytes())
        if dense and numbers is places:
            places = slice(0, len(numbers))
    for values, positional in by_row:
        digest.update((values[row][places] if positional else values[row]).tobytes())
    return bytes(digest.digest())


def is_list_of_rows(value: Any, count: int) -> bool:
    """Return whether an entry is a list of one plain value a row, such as texts."""
    plain = (str, bytes, int, float, bool)
    return isinstance(value, (list, tuple)) and len(value) == count and all(isinstance(item, plain) for item in value)


def _digest(value: object) -> bytes:
    return blake2b(f"{type(value).__name__}:{value!r}".encode(), digest_size=KEY_BYTES).digest()


def _add_plain(digest: Any, value: Any) -> None:
    """Add an entry that is no tensor; the tensors and arrays within, whose ``repr`` is cut short, as their values."""
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(_array(value).tobytes())
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}:{value.shape};".encode())
        digest.update(repr(value.tolist()).encode() if value.dtype.hasobject else value.tobytes())
    elif isinstance(value, Mapping):
        for name, item in value.items():
            digest.update(f"{name!r}:".encode())
            _add_plain(digest, item)
        digest.update(b"}")
    elif isinstance(value, (tuple, list)):
        for item in value:
            _add_plain(digest, item)
        digest.update(b"]")
    else:
        digest.update(f"{value!r};".encode())


def _array(value: Tensor) -> np.ndarray[Any, Any]:
    """Return a tensor's values as an array on the CPU; those of types that NumPy has not, as their bits.

    Nothing is computed by torch, which starts threads of its own for each thread that computes with it.
    """
    value = value.detach().cpu()
    if value.dtype == torch.bfloat16:
        value = value.view(torch.int16)
    return np.ascontiguousarray(value.numpy())
