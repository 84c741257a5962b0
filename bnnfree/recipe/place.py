"""Origin of the keys of a recipe, for its errors: the file, or the override that was typed. Standard library only."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Place:
    """Origin of a recipe: its file, or what errors call it, and overrides, key -> key=value."""

    file: str
    overrides: Mapping[str, str] = field(default_factory=dict)

    def typed(self, key: str) -> str | None:
        """The override that set `key`, or a part or the whole of it; None where the file did."""
        hits = (o for o in self.overrides if f"{o}.".startswith(f"{key}.") or f"{key}.".startswith(f"{o}."))
        return next((self.overrides[each] for each in hits), None)

    def of(self, key: str) -> str:
        """The place to look at for an error of `key`."""
        text = self.typed(key)
        return self.file if text is None else f"override {shown(text)}"

    def of_all(self, message: str) -> str:
        """The place to look at for an error of several keys, which the message names."""
        named = [text for key, text in self.overrides.items() if key in message]
        return f"{self.file} with {' '.join(shown(text) for text in named)}" if named else self.file


def shown(value: Any) -> str:
    """A value as errors show it: one line, cut to size."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    short.maxlevel = 3
    return " ".join(short.repr(value).split())
