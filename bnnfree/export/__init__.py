"""The one bridge from torch to packed files: `export`. Imports torch, bnnfree.nn, ops, format, engine; never train.

twin (the copy that is exported), trace (torch.fx), mutation (in-place changes taken out), quantize (int8 ends),
build, lower and its rules (ops, with everything affine folded), verify and check (is it the same?), onnx (the same
graph for other tools).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bnnfree.errors import BnnfreeError, lacking

try:
    import torch  # noqa: F401
except ModuleNotFoundError as _error:
    raise lacking(_error, "bnnfree.export") from None

from torch import nn

import bnnfree
from bnnfree.export.check import check_packed
from bnnfree.export.errors import ExportError
from bnnfree.export.lower import Lowering
from bnnfree.export.packed import Packed
from bnnfree.export.quantize import quantize_ends
from bnnfree.export.trace import trace
from bnnfree.export.twin import plain_mode
from bnnfree.format import PackedModel, to_bytes, write
from bnnfree.format.text import join_lines

__all__ = ["ExportError", "Packed", "check_packed", "export", "pack", "pack_network", "packed_bytes"]


@plain_mode()
def pack(
    module: nn.Module,
    *,
    image_size: tuple[int, int],
    channels: int = 3,
    mean: Sequence[float] | float = 0.0,
    std: Sequence[float] | float = 1.0,
    classes: Sequence[str] | None = None,
    stem: str = "int8",
    head: str = "int8",
    resize: str | None = None,
    reading: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
) -> Packed:
    """The packed model of `module`, in memory; arguments as `export`."""
    height, width = _size(image_size)
    channels = _whole(channels, f"export: channels: got {channels!r}, expected a whole number above 0.")
    means, deviations = _per_channel(mean, channels, "mean"), _per_channel(std, channels, "std")
    if (means < 0).any() or (means > 1).any():
        raise BnnfreeError(f"export: mean: got {means.tolist()}, expected 0 to 1: {_OF_PIXELS}")
    if (deviations <= 0).any() or (deviations > 1).any():
        raise BnnfreeError(f"export: std: got {deviations.tolist()}, expected above 0 and at most 1: {_OF_PIXELS}")
    names = _class_names(classes)
    traced = trace(module, (height, width), channels)
    quantize_ends(traced, deviations.tolist(), stem, head)
    lowering = Lowering(traced, means, deviations)
    model = lowering.model()
    outputs = model.tensors[model.output].shape[-1]
    if names and len(names) != outputs:
        raise BnnfreeError(f"export: classes: got {len(names)} names for {outputs} outputs of the network.")
    model.classes = names
    model.producer = f"bnnfree {bnnfree.__version__}"
    model.metadata = {"mean": means.tolist(), "std": deviations.tolist(), "stem": stem, "head": head}
    model.metadata |= {"resize": resize} if resize else {}
    model.metadata |= {"orientation": "exif", **(reading or {})}
    model.metadata |= {"recipe": recipe} if recipe else {}
    number = lowering.builder.number
    meaning = {
        model.tensors[number[old]].name: found for old, found in lowering.meaning.items() if old in number and old
    }
    return Packed(model, traced, meaning, lowering.slow)


class Network(Protocol):
    """Argument of `pack_network`: a network with its data, as bnnfree.train.open_source gives it."""

    model: nn.Module
    recipe: Any  # has model_dump(); None: a network of its own
    data: dict[str, Any]  # classes, channels, image_size, mean, std

    @property
    def resize(self) -> str | None: ...

    @property
    def reading(self) -> dict[str, Any] | None: ...


def pack_network(network: Network, *, stem: str = "int8", head: str = "int8") -> Packed:
    """`pack` of a network that knows its own data and recipe."""
    data = network.data
    height, width = data["image_size"]
    return pack(
        network.model,
        image_size=(height, width),
        channels=data["channels"],
        mean=data["mean"],
        std=data["std"],
        classes=data["classes"],
        stem=stem,
        head=head,
        resize=network.resize,
        reading=network.reading,
        recipe=None if network.recipe is None else network.recipe.model_dump(),
    )


def export(
    module: nn.Module,
    path: str | Path,
    *,
    image_size: tuple[int, int],
    channels: int = 3,
    mean: Sequence[float] | float = 0.0,
    std: Sequence[float] | float = 1.0,
    classes: Sequence[str] | None = None,
    stem: str = "int8",
    head: str = "int8",
    resize: str | None = None,
    reading: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
    check: bool = True,
) -> Packed:
    """Write `module` as a bit-packed file that bnnfree.engine runs without torch.

    module      made of bnnfree layers and the usual torch ones; it is copied, and exported as in eval mode
    image_size  (height, width); channels=3
    mean, std   of pixels scaled to 0..1, per channel, as in training: the network was given (pixel/255 - mean) / std
    classes     their names
    stem, head  "int8" (default) or "float": weights of the first and of the last layer
    resize      how image files become that size: a name of bnnfree.preprocess.RESIZES; recipe: any JSON
    reading     how else image files are read: {"orientation": "exif" (default) or "stored", "range": [low, high] of
                files of more than 8 bits}, see bnnfree.preprocess.Reading
    check       run network and packed model on random images and write nothing where they differ

    Returns the packed model with what its activations stand for. Errors: ExportError names the layer that has no
    engine op, the reason and the remedy; then nothing is written. That the network computes what its traced graph
    computes is tried in any case.
    Example: export(net, "net.bnnf", image_size=(32, 32), mean=0.5, std=0.25, classes=["cat", "dog"])
    """
    packed = pack(
        module,
        image_size=image_size,
        channels=channels,
        mean=mean,
        std=std,
        classes=classes,
        stem=stem,
        head=head,
        resize=resize,
        reading=reading,
        recipe=recipe,
    )
    if check:
        check_packed(packed)
    write(packed.model, path)
    return packed


def packed_bytes(model: PackedModel) -> dict[str, int]:
    """Bytes of the file that `write` makes: constants by dtype, the rest (tables, text, gaps) and the total."""
    sizes = {"bits": 0, "i8": 0, "f32": 0, "i32": 0}
    for tensor in model.tensors:
        if tensor.place == "constant":
            sizes[tensor.dtype] += tensor.bytes
    total = len(to_bytes(model))
    return {**sizes, "rest": total - sum(sizes.values()), "total": total}


_OF_PIXELS = "they are of pixels scaled to 0..1. Divide those of pixels from 0 to 255 by 255."


def _class_names(classes: Sequence[str] | None) -> list[str]:
    """The names as texts that a file can hold."""
    if classes is None:
        return []
    if isinstance(classes, str | bytes) or not isinstance(classes, Sequence | np.ndarray):
        raise BnnfreeError(f"export: classes: got {classes!r}, expected a list of names, or None.")
    if any(isinstance(name, bytes) for name in classes):
        raise BnnfreeError("export: classes: got bytes among the names, expected texts.")
    names = [str(name) for name in classes]
    join_lines(names, "class name")  # refuses what no file can hold
    return names


def _size(image_size: tuple[int, int]) -> tuple[int, int]:
    message = f"export: image_size: got {image_size!r}, expected (height, width) in pixels."
    sizes = tuple(image_size) if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if len(sizes) != 2:
        raise BnnfreeError(message)
    return _whole(sizes[0], message), _whole(sizes[1], message)


def _whole(value: Any, message: str) -> int:
    """A number above 0 that is whole, numpy's too. Errors: BnnfreeError with `message`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise BnnfreeError(message)
    return int(value)


def _per_channel(value: Sequence[float] | float, channels: int, name: str) -> np.ndarray:
    message = f"export: {name}: got {value!r}, expected one number, or one per channel ({channels})."
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        raise BnnfreeError(message) from None
    if isinstance(value, str) or array.shape not in ((), (channels,)) or not np.isfinite(array).all():
        raise BnnfreeError(message)
    return np.broadcast_to(array, (channels,)).copy()
