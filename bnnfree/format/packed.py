"""A packed model in memory: `PackedModel`, its tensors and ops. Standard library and numpy only.

check says what must hold of it, file what its bytes are. Must not import torch, export, engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bnnfree.format import schema


def storage_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of the stored array: the last of bits counts words."""
    return (*shape[:-1], -(-shape[-1] // 64)) if dtype == "bits" else shape


def storage_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; exact for sizes of any length."""
    count = 1
    for size in storage_shape(dtype, shape):
        count *= int(size)
    return count * np.dtype(schema.DTYPES[dtype].storage).itemsize


@dataclass
class Tensor:
    """One line of the tensor table; `data` is the array of a constant, bits as uint64 words."""

    name: str
    dtype: str
    place: str
    shape: tuple[int, ...]
    offset: int = 0
    data: np.ndarray | None = None

    @property
    def bytes(self) -> int:
        return storage_bytes(self.dtype, self.shape)


@dataclass
class Op:
    """One line of the op table: the op's name and its fields; a tensor field is an index, or None."""

    name: str
    fields: dict[str, int | None]

    def __getattr__(self, name: str):
        try:
            return self.__dict__["fields"][name]
        except KeyError:
            raise AttributeError(name) from None

    def reads(self) -> list[int]:
        """The activations that the op reads."""
        return [i for i in (self.input, self.other, self.factor) if i is not None]

    def writes(self) -> list[int]:
        """The activations that the op writes."""
        return [i for i in (self.real, self.bits) if i is not None]

    def constants(self) -> dict[str, int]:
        """Field -> tensor, for each constant the op uses."""
        names = ("weights", *schema.EPILOGUE_FIELDS)
        return {name: index for name in names if (index := self.fields[name]) is not None}


def make_op(name: str, **fields: Any) -> Op:
    """An op with every field that is not given at its neutral value."""
    blank: dict[str, int | None] = {f.name: 0 for f in schema.OP[1:-1]}
    blank |= dict.fromkeys(schema.TENSOR_FIELDS)
    ones = ("stride_h", "stride_w", "dilation_h", "dilation_w", "groups")
    blank |= {field: 1 for field in ones if field in schema.OPS[name].window}
    return Op(name, {**blank, **fields})


@dataclass
class PackedModel:
    """Contents of a packed file. `metadata`: FORMAT.md names the keys that the exporter writes."""

    tensors: list[Tensor]
    ops: list[Op]
    input: int
    output: int
    arena_bytes: int = 0
    classes: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    producer: str = ""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the image."""
        height, width, channels = self.tensors[self.input].shape
        return height, width, channels
