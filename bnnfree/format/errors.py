"""The named errors of a packed file, one per kind of damage. Standard library and bnnfree.errors only."""

from __future__ import annotations

from bnnfree.errors import BnnfreeError
from bnnfree.format.schema import ERRORS


class FormatError(BnnfreeError):
    """A file that is not a packed model, or a damaged one; a subclass says which rule it breaks (schema.ERRORS)."""


class MagicError(FormatError):
    __doc__ = ERRORS["MagicError"]


class VersionError(FormatError):
    __doc__ = ERRORS["VersionError"]


class SizeError(FormatError):
    __doc__ = ERRORS["SizeError"]


class ChecksumError(FormatError):
    __doc__ = ERRORS["ChecksumError"]


class LimitError(FormatError):
    __doc__ = ERRORS["LimitError"]


class LayoutError(FormatError):
    __doc__ = ERRORS["LayoutError"]


class TextError(FormatError):
    __doc__ = ERRORS["TextError"]


class TensorError(FormatError):
    __doc__ = ERRORS["TensorError"]


class ConstantError(FormatError):
    __doc__ = ERRORS["ConstantError"]


class OpError(FormatError):
    __doc__ = ERRORS["OpError"]


class GraphError(FormatError):
    __doc__ = ERRORS["GraphError"]


class PlanError(FormatError):
    __doc__ = ERRORS["PlanError"]
