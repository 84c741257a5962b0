"""The result of an export, beside where it came from. Imports torch, bnnfree.format and its own room."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from bnnfree.export.trace import Traced
from bnnfree.export.value import Value
from bnnfree.format import PackedModel


@dataclass(frozen=True)
class Packed:
    """A packed model beside the torch network it came from.

    module: a copy of the network in eval mode with the int8 ends put in: what `model` must equal.
    meaning: name of an activation -> (node of module's graph, what the activation stands for: scale * it + shift).
    slow: what leaves the fast kernels: the layer, why, and what to do, a line each.
    """

    model: PackedModel
    traced: Traced
    meaning: dict[str, tuple[Any, Value]]
    slow: list[str]

    @property
    def module(self) -> nn.Module:
        return self.traced.module
