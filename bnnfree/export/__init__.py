"""The one bridge from torch to packed files: `export`. Imports torch, bnnfree.nn, ops, format, engine; never train.

twin (the copy that is exported), trace (torch.fx), mutation (in-place changes taken out), quantize (int8 ends),
build, lower and its rules (ops, with everything affine folded), verify and check (is it the same?), onnx (the same
graph for other tools).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from bnnfree.errors import lacking

try:
    import torch  # noqa: F401
except ModuleNotFoundError as _error:
    raise lacking(_error, "bnnfree.export") from None

from torch import nn

import bnnfree
from bnnfree.export.check import check_packed
from bnnfree.export.errors import ExportError
from bnnfree.export.lower import Lowering
from bnnfree.export.options import Options, file_name, truth
from bnnfree.export.packed import Packed
from bnnfree.export.quantize import quantize_ends
from bnnfree.export.trace import trace
from bnnfree.export.twin import plain_mode
from bnnfree.format import PackedModel, to_bytes, write

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
    about: dict[str, str] | None = None,
) -> Packed:
    """The packed model of `module`, in memory; arguments as `export`."""
    options = Options(image_size, channels, mean, std, classes, stem, head, resize, reading, about)
    traced = trace(module, options.image_size, options.channels)
    quantize_ends(traced, options.std.tolist(), stem, head)
    lowering = Lowering(traced, options.mean, options.std)
    model = lowering.model()
    outputs = model.tensors[model.output].shape[-1]
    if options.classes and len(options.classes) != outputs:
        raise ExportError(f"export: classes: got {len(options.classes)} names for {outputs} outputs of the network.")
    model.classes = options.classes
    model.producer = f"bnnfree {bnnfree.__version__}"
    model.metadata = options.metadata
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

    @property
    def about(self) -> dict[str, str]: ...


PLACES = {"data": ("root", "test_root", "val_root", "cache"), "loss": ("teacher",), "": ("init",)}
"""Keys of a recipe that name places of the machine it ran on."""


def _plain_recipe(recipe: Any) -> str:
    """A recipe as one line of JSON, without its places."""
    tree = recipe.model_dump()
    for section, keys in PLACES.items():
        part = tree[section] if section else tree
        for key in keys:
            part.pop(key, None)
    return json.dumps(tree, separators=(",", ":"))


def pack_network(network: Network, *, stem: str = "int8", head: str = "int8", with_recipe: bool = False) -> Packed:
    """`pack` of a network that knows its own data; with_recipe: its recipe goes along, but for its places."""
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
        about=network.about | ({"recipe": _plain_recipe(network.recipe)} if with_recipe else {}),
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
    about: dict[str, str] | None = None,
    check: bool = True,
) -> Packed:
    """Write `module` as a bit-packed file that bnnfree.engine runs without torch.

    module      made of bnnfree layers and the usual torch ones; it is copied, and exported as in eval mode
    image_size  (height, width); channels=3
    mean, std   of pixels scaled to 0..1, per channel, as in training: the network was given (pixel/255 - mean) / std
    classes     their names
    stem, head  "int8" (default) or "float": weights of the first and of the last layer
    resize      how image files become that size: a name of bnnfree.preprocess.RESIZES
    about       more for the file's metadata: texts by key
    reading     how else image files are read: {"orientation": "exif" (default) or "stored", "range": [low, high] of
                files of more than 8 bits}, see bnnfree.preprocess.Reading
    check       run network and packed model on random images and write nothing where they differ

    Returns the packed model with what its activations stand for. Errors: ExportError names the layer that has no
    engine op, the reason and the remedy; then nothing is written. That the network computes what its traced graph
    computes is tried in any case.
    Example: export(net, "net.bnnf", image_size=(32, 32), mean=0.5, std=0.25, classes=["cat", "dog"])
    """
    path, check = file_name(path), truth("check", check)
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
        about=about,
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
