"""Booleans by name, true for what stays: to be looked at, saved and loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from textbrewer import checks
from textbrewer.files import replaced

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["NamedMasks"]


class NamedMasks(Mapping[str, Tensor]):
    """Tensors of booleans by name; subclasses say of what, and what is wrong with one.

    Args:
        masks: the booleans; copied to the CPU.

    Raises:
        TypeError: if one is no tensor of booleans.
        ValueError: if the subclass refuses one.
    """

    file_format: ClassVar[str]
    """What a file of them says that it is."""
    by: ClassVar[str]
    """What the names are, for messages."""

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        checks.is_a(masks, Mapping, "masks", f"a dict of tensors of booleans by {self.by}")
        for name, mask in masks.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(f"the mask of {name!r} must be a tensor of booleans, true for what stays, got {kind}")
            self._check_one(name, mask)
        self._masks = {name: mask.detach().cpu().clone().contiguous() for name, mask in masks.items()}

    def _check_one(self, name: str, mask: Tensor) -> None:
        """Raise ValueError for a mask that cannot be."""

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        lines = [f"  {name}: {int(mask.sum())} of {mask.numel()}" for name, mask in self._masks.items()]
        return "\n".join([f"{type(self).__name__}(", *lines, ")"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the masks to a safetensors file, a byte an item, under a temporary name until it is whole."""
        with replaced(Path(path)) as temporary:
            save_file(self._masks, temporary, metadata={"format": self.file_format})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Return the masks in a file.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it holds no masks of this kind.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file of masks at {os.fspath(path)!r}")
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("format") != cls.file_format:
                    raise ValueError("it does not say that it is one")
                return cls({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  # no mapping
        except (SafetensorError, ValueError, TypeError) as error:
            raise ValueError(f"{os.fspath(path)!r} must be a file that {cls.__name__}.save wrote: {error}") from error
