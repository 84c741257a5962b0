"""The one bridge from torch to packed files: `export`. Imports torch, bnnfree.nn, ops and format; never train.

trace (torch.fx), quantize (int8 ends), build and lower (ops, with everything affine folded), verify (is it the
same?), onnx (the same graph for other tools).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import nn

import bnnfree
from bnnfree.errors import BnnfreeError
from bnnfree.export.build import Value
from bnnfree.export.errors import ExportError
from bnnfree.export.lower import Lowering
from bnnfree.export.quantize import quantize_ends
from bnnfree.export.trace import Traced, trace
from bnnfree.format import PackedModel, to_bytes, write

__all__ = ["ExportError", "Packed", "export", "pack", "pack_network", "packed_bytes"]


@dataclass(frozen=True)
class Packed:
    """A packed model beside the torch network it came from.

    module: a copy of the network in eval mode with the int8 ends put in: what `model` must equal.
    meaning: name of an activation -> (node of module's graph, what the activation stands for: scale * it + shift).
    """

    model: PackedModel
    traced: Traced
    meaning: dict[str, tuple[Any, Value]]

    @property
    def module(self) -> nn.Module:
        return self.traced.module


def pack(
    module: nn.Module,
    *,
    image_size: tuple[int, int],
    channels: int = 3,
    mean: Sequence[float] | float = 0.0,
    std: Sequence[float] | float = 1.0,
    classes: Sequence[str] = (),
    stem: str = "int8",
    head: str = "int8",
    resize: str | None = None,
    recipe: dict[str, Any] | None = None,
) -> Packed:
    """The packed model of `module`, in memory; arguments as `export`."""
    height, width = _size(image_size)
    means, deviations = _per_channel(mean, channels, "mean"), _per_channel(std, channels, "std")
    if (deviations <= 0).any():
        raise BnnfreeError(f"export: std: got {deviations.tolist()}, expected numbers above 0.")
    traced = trace(module, (height, width), channels)
    quantize_ends(traced, deviations.tolist(), stem, head)
    lowering = Lowering(traced, means, deviations)
    model = lowering.model()
    outputs = model.tensors[model.output].shape[-1]
    if classes and len(classes) != outputs:
        raise BnnfreeError(f"export: classes: got {len(classes)} names for {outputs} outputs of the network.")
    model.classes = [str(name) for name in classes]
    model.producer = f"bnnfree {bnnfree.__version__}"
    model.metadata = {"mean": means.tolist(), "std": deviations.tolist(), "stem": stem, "head": head}
    model.metadata |= {"resize": resize} if resize else {}
    model.metadata |= {"recipe": recipe} if recipe else {}
    number = lowering.builder.number
    meaning = {
        model.tensors[number[old]].name: found for old, found in lowering.meaning.items() if old in number and old
    }
    return Packed(model, traced, meaning)


class Network(Protocol):
    """What `pack_network` takes: a network with its data, as bnnfree.train.open_source gives it."""

    model: nn.Module
    recipe: Any  # has model_dump()
    data: dict[str, Any]  # classes, channels, image_size, mean, std

    @property
    def resize(self) -> str: ...


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
        recipe=network.recipe.model_dump(),
    )


def export(module: nn.Module, path: str | Path, **options: Any) -> Packed:
    """Write `module` as a bit-packed file that bnnfree.engine runs without torch.

    module      made of bnnfree layers and the usual torch ones; it is copied, and exported as in eval mode
    image_size  (height, width); channels=3
    mean, std   of pixels scaled to 0..1, per channel, as in training: the network was given (pixel/255 - mean) / std
    classes     their names
    stem, head  "int8" (default) or "float": weights of the first and of the last layer
    resize      how image files become that size: a name of bnnfree.preprocess.RESIZES; recipe: any JSON

    Returns the packed model with what its activations stand for. Errors: ExportError names the layer that has no
    engine op, the reason and the remedy; then nothing is written.
    Example: export(net, "net.bnnf", image_size=(32, 32), mean=0.5, std=0.25, classes=["cat", "dog"])
    """
    packed = pack(module, **options)
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


def _size(image_size: tuple[int, int]) -> tuple[int, int]:
    sizes = tuple(image_size) if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if len(sizes) != 2 or any(not isinstance(s, int) or s < 1 for s in sizes):
        raise BnnfreeError(f"export: image_size: got {image_size!r}, expected (height, width) in pixels.")
    return sizes[0], sizes[1]


def _per_channel(value: Sequence[float] | float, channels: int, name: str) -> np.ndarray:
    array = np.asarray(value, np.float64)
    if array.shape not in ((), (channels,)) or not np.isfinite(array).all():
        raise BnnfreeError(f"export: {name}: got {value!r}, expected one number, or one per channel ({channels}).")
    return np.broadcast_to(array, (channels,)).copy()
