"""Checks of the arguments of `pack`, `export` and `verify`, all before any work begins. Imports numpy and format.

Every refusal is one ExportError: the argument, its value, and what is allowed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from bnnfree.errors import BnnfreeError, nearest
from bnnfree.export.errors import ExportError
from bnnfree.export.packed import Packed
from bnnfree.format import PackedModel
from bnnfree.format.schema import MAX_SIDE, MAX_VALUES
from bnnfree.format.text import join_lines, join_numbers, metadata_bytes

PRECISIONS = ("int8", "float")  # of the ends: 8 bits with a scale per output channel, or 32 bits
# The tables of bnnfree.preprocess, which needs Pillow; tests hold them together
RESIZES = ("square", "centre")
ORIENTATIONS = ("exif", "stored")
READING = ("orientation", "range")
_OF_PIXELS = "they are of pixels scaled to 0..1. Divide those of pixels from 0 to 255 by 255"
_RANGE = "[low, high], two numbers, low below high"


def refusal(what: str, value: Any, allowed: str, where: str = "export") -> ExportError:
    """`export: mean: got 128.0, expected 0 to 1.`, on one line."""
    try:
        shown = " ".join(repr(value).split())
    except Exception:  # Why: objects of a user's may raise anything
        shown = f"a {type(value).__name__}"
    return ExportError(f"{where}: {what}: got {shown[:80]}{'...' * (len(shown) > 80)}, expected {allowed}.")


def named(what: str, value: Any, allowed: Sequence[str]) -> str:
    """`value`, one of the names allowed."""
    if not isinstance(value, str) or value not in allowed:
        hint = nearest(value, allowed) if isinstance(value, str) else ""
        raise ExportError(f"{refusal(what, value, 'one of ' + ', '.join(allowed))}{hint}")
    return value


def whole(what: str, value: Any, most: int | None = None, where: str = "export") -> int:
    """`value`, a whole number above 0, numpy's too."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 1 <= value <= (most or value):
        limit = "a whole number above 0" if most is None else f"a whole number from 1 to {most:,}"
        raise refusal(what, value, limit, where)
    return int(value)


def truth(what: str, value: Any) -> bool:
    """`value`, True or False."""
    if not isinstance(value, bool | np.bool_):
        raise refusal(what, value, "True or False")
    return bool(value)


def file_name(value: Any) -> Path:
    """The path of a file to write."""
    try:
        path = Path(os.fsdecode(value)) if isinstance(value, str | os.PathLike) else None
    except Exception:  # Why: a path's own __fspath__ may raise anything
        path = None
    if path is None or not path.name or "\0" in str(path) or path.is_dir():
        raise refusal("path", value, "the name of a file to write, such as net.bnnf")
    return path


@dataclass
class Options:
    """The checked arguments of `pack`, in the forms that it works with."""

    image_size: Any
    channels: Any
    mean: Any
    std: Any
    classes: Any
    stem: str
    head: str
    resize: str | None
    reading: dict[str, Any] | None
    about: dict[str, str] | None
    metadata: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.channels = whole("channels", self.channels, MAX_SIDE)
        self.image_size = _size(self.image_size, self.channels)
        self.mean = _per_channel("mean", self.mean, self.channels)
        self.std = _per_channel("std", self.std, self.channels)
        if (self.mean < 0).any() or (self.mean > 1).any():
            raise refusal("mean", self.mean.tolist(), f"0 to 1: {_OF_PIXELS}")
        if (self.std <= 0).any() or (self.std > 1).any():
            raise refusal("std", self.std.tolist(), f"above 0 and at most 1: {_OF_PIXELS}")
        self.classes = _class_names(self.classes)
        ends = {name: named(name, getattr(self, name), PRECISIONS) for name in ("stem", "head")}
        self.metadata = {"mean": join_numbers(self.mean), "std": join_numbers(self.std), **ends}
        if self.resize is not None:
            self.metadata["resize"] = named("resize", self.resize, RESIZES)
        reading = _reading(self.reading)
        self.metadata["orientation"] = reading.get("orientation", "exif")
        if reading.get("range") is not None:
            self.metadata["range"] = join_numbers(reading["range"])
        allowed = "a dict of texts, each of one line without control characters and not empty, or None"
        if self.about is not None and not isinstance(self.about, dict):
            raise refusal("about", self.about, allowed)
        try:
            taken = self.metadata.keys() & (self.about or {}).keys()
            self.metadata |= self.about or {}
            metadata_bytes(self.metadata)
        except (BnnfreeError, TypeError, AttributeError) as error:
            raise refusal("about", self.about, f"{allowed} ({error})") from None
        if taken:
            raise refusal("about", self.about, f"other keys than {', '.join(sorted(taken))}")


def _size(value: Any, channels: int) -> tuple[int, int]:
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    try:
        height, width = (whole("image_size", side, MAX_SIDE) for side in sizes)
    except (BnnfreeError, ValueError):  # ValueError: another number of sides
        raise refusal("image_size", value, f"(height, width) in pixels, each up to {MAX_SIDE:,}") from None
    if height * width * channels > MAX_VALUES:
        raise refusal("image_size", value, f"at most {MAX_VALUES:,} values an image, with its {channels} channels")
    return height, width


def _per_channel(what: str, value: Any, channels: int) -> np.ndarray:
    """One number per channel, float64 [C]."""
    try:
        array = np.asarray(value)
    except Exception:  # Why: lists of uneven parts, tensors of a device or with a history raise errors of many types
        array = np.asarray(None)
    if array.dtype.kind not in "iuf" or array.shape not in ((), (channels,)) or not np.isfinite(array).all():
        raise refusal(what, value, f"one number, or one per channel ({channels})")
    return np.broadcast_to(array.astype(np.float64), (channels,)).copy()


def _class_names(value: Any) -> list[str]:
    """The names as texts that a file can hold."""
    if value is None:
        return []
    if isinstance(value, str | bytes | bytearray) or not isinstance(value, Sequence | np.ndarray):
        raise refusal("classes", value, "a list of names, or None")
    for name in value:
        if isinstance(name, bool | np.bool_) or not isinstance(name, str | int | np.integer):
            raise refusal("classes", name, "names that are texts or whole numbers")
        try:
            join_lines([str(name)], "class name")
        except BnnfreeError as error:
            allowed = "a class name that a file can hold: one line of UTF-8 without control characters, not empty"
            raise refusal("classes", name, f"{allowed} ({str(error).rstrip('.')})") from None
    return [str(name) for name in value]


def _reading(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise refusal("reading", value, f"a dict with {' and '.join(READING)}, or None")
    for key in value:
        named("reading", key, READING)
    if "orientation" in value:
        named("reading: orientation", value["orientation"], ORIENTATIONS)
    limits = value.get("range")
    pair = isinstance(limits, list | tuple) and len(limits) == 2 and all(type(v) in (int, float) for v in limits)
    if limits is not None and not (pair and limits[0] < limits[1] and _finite(limits[1], limits[0])):
        raise refusal("reading: range", limits, _RANGE)
    return value


def _finite(high: float, low: float) -> bool:
    try:
        return isfinite(float(high) - float(low))
    except OverflowError:  # a whole number beyond what floats hold
        return False


def check_verify(packed: Any, model: Any, images: Any, agreement: Any, layer_images: Any, batch_size: Any) -> None:
    """Errors: ExportError for arguments of `verify` that it cannot work with."""
    where = "verify"
    if not isinstance(packed, Packed):
        raise refusal("packed", packed, "a Packed, as bnnfree.export.pack gives it", where)
    if not isinstance(model, PackedModel):
        raise refusal("model", model, "a PackedModel, as bnnfree.format.read gives it", where)
    form = f"uint8 [N, {', '.join(map(str, model.image_shape))}], at least one image"
    if not isinstance(images, np.ndarray):
        raise refusal("images", images, form, where)
    if images.dtype != np.uint8 or images.shape[1:] != tuple(model.image_shape) or not len(images):
        raise ExportError(f"verify: images: got {images.dtype} {list(images.shape)}, expected {form}.")
    number = isinstance(agreement, int | float | np.number) and not isinstance(agreement, bool)
    if not number or not 0 <= agreement <= 1:
        raise refusal("agreement", agreement, "a share from 0 to 1", where)
    whole("layer_images", layer_images, where=where)
    whole("batch_size", batch_size, where=where)
