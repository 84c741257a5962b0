"""The packed file: `read`, `write`, `PackedModel`; the specification is FORMAT.md.

schema (the one table), packed (the model in memory), check (what must hold), plan (the arena), file (its bytes),
errors (one name per rule). Standard library, numpy and bnnfree.ops (geometry) only; never torch or engine.
"""

from bnnfree.format.check import check_model
from bnnfree.format.errors import (
    ChecksumError,
    ConstantError,
    FormatError,
    GraphError,
    LayoutError,
    LimitError,
    MagicError,
    OpError,
    PlanError,
    SizeError,
    TensorError,
    TextError,
    VersionError,
)
from bnnfree.format.file import from_bytes, read, seal, to_bytes, write
from bnnfree.format.packed import Op, PackedModel, Tensor, make_op
from bnnfree.format.plan import lifetimes, plan
from bnnfree.format.schema import VERSION
from bnnfree.format.shapes import window_of

__all__ = [
    "VERSION",
    "ChecksumError",
    "ConstantError",
    "FormatError",
    "GraphError",
    "LayoutError",
    "LimitError",
    "MagicError",
    "Op",
    "OpError",
    "PackedModel",
    "PlanError",
    "SizeError",
    "Tensor",
    "TensorError",
    "TextError",
    "VersionError",
    "check_model",
    "from_bytes",
    "lifetimes",
    "make_op",
    "plan",
    "read",
    "seal",
    "to_bytes",
    "window_of",
    "write",
]
