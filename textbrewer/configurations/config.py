"""Reading and writing of configurations."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from textbrewer import checks

C = TypeVar("C", bound="Config")


@dataclass
class Config:
    """Reading and writing that all configurations share."""

    @classmethod
    def from_dict(cls: type[C], dict_object: Mapping[str, Any]) -> C:
        """Construct a configuration from a dict.

        Raises:
            TypeError: if it is not a dict.
            KeyError: if it has an unknown key; the message names the nearest known one.
        """
        checks.is_a(dict_object, (dict, Mapping), f"{cls.__name__}.from_dict's argument", "a dict")
        checks.known_keys(dict_object, [item.name for item in dataclasses.fields(cls)], cls.__name__)
        return cls(**dict_object)

    @classmethod
    def from_json_file(cls: type[C], json_filename: str | os.PathLike[str]) -> C:
        """Construct a configuration from a JSON file.

        Raises:
            ValueError: if the file is not JSON.
            TypeError, KeyError: as :meth:`from_dict`.
        """
        with open(json_filename, encoding="utf-8") as file:
            try:
                content = json.load(file)
            except json.JSONDecodeError as error:
                raise ValueError(f"{os.fspath(json_filename)!r} must be a JSON file: {error}") from error
        return cls.from_dict(content)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values; ``from_dict`` of them gives an equal configuration."""
        return dataclasses.asdict(self)

    def to_json_file(self, json_filename: str | os.PathLike[str]) -> None:
        """Write the settings as JSON.

        Raises:
            TypeError: if a setting is a function of your own, which JSON cannot hold; register it under a name.
        """
        text = json.dumps(self.to_dict(), indent=2)
        with open(json_filename, "w", encoding="utf-8") as file:
            file.write(text + "\n")

    def __repr__(self) -> str:
        lines = "".join(f"  {item.name} : {getattr(self, item.name)}\n" for item in dataclasses.fields(self))
        return f"{type(self).__name__}:\n{lines}"
