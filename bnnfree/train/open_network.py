"""Sources of a network for the tools: a checkpoint, a run folder (its best checkpoint) or a recipe.

A recipe stands for its last stage's network with random weights, so that any network can be exported, verified
and measured without training. Imports torch, bnnfree.nn and its own room; the model builders are passed in.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from bnnfree.data.datasets import CIFAR10, CIFAR100, IMAGENET, Stats, describe
from bnnfree.errors import CheckpointError, nearest_path
from bnnfree.nn import calibrate
from bnnfree.preprocess import DECODED_SIZE, resize_rule
from bnnfree.recipe.resolve import resolve
from bnnfree.recipe.schema import Recipe
from bnnfree.recipe.tree import SUFFIXES
from bnnfree.train.checkpoint import Builders, build_model, load_model
from bnnfree.train.networks import load_recipe, parse_recipe

CHECKPOINTS = (".pt",)
PLACES = ("root", "test_root", "val_root")  # keys of a recipe's data that say where it lies
MACHINE = ("download", "workers", "cache", "cache_gb")  # those that have a machine fetch, write or start something
DESCRIBING = (  # those that say no more than what the data is and how it is used
    *("name", "image_size", "channels", "orientation", "range", "classes", "samples", "batch_size", "augment"),
    *("mix_alpha", "burst", "train_limit", "test_limit", "val_fraction", "test_fraction", "bad_images"),
)
EXPECTED = "expected a run folder, a checkpoint (.pt) or a recipe (.yaml, .yml)"
STAND_IN = (0.4737, 0.2516)  # Why so odd: a mean on the grid of pixel values makes sums of pixels that are exactly 0
STATS = {"cifar10": CIFAR10, "cifar100": CIFAR100, "imagenet": IMAGENET}  # those known before the data is read


@dataclass(frozen=True, eq=False)
class Network:
    """A network and what must be known to use it. `model` is in eval mode, on the CPU, in float32."""

    model: nn.Module
    recipe: Recipe  # with the overrides given
    binarize: str  # a key of bnnfree.nn.BINARIZE: what is 1 bit in `model`
    data: dict[str, Any]  # classes (names), channels, image_size [H, W], mean and std per channel of pixel/255
    trained: bool  # False: random weights
    source: str  # the path it was opened by
    state: dict[str, Any] | None  # the checkpoint; None: it comes from a recipe

    @property
    def resize(self) -> str:
        """The key of bnnfree.preprocess.RESIZES by which its training brings images to their size."""
        if self.recipe.data.name in ("digits", "cifar10", "cifar100", "fake", "arrays"):  # held in memory at any size
            return "square"
        return resize_rule(max(self.data["image_size"]))

    @property
    def reading(self) -> dict[str, Any]:
        """Further choices of its training about image files: keys of a packed model's metadata."""
        data = self.recipe.data
        return {"orientation": data.orientation} | ({} if data.range is None else {"range": data.range})

    @property
    def about(self) -> dict[str, str]:
        """Description for a packed file: architecture, normaliser, and the data set that it is for."""
        return {"model": self.recipe.model.name, "norm": self.recipe.model.norm, "data": self.recipe.data.name}


def source_kind(source: str | Path) -> Literal["checkpoint", "recipe"]:
    """Kind of `source`; a run folder counts as its checkpoint. Errors: CheckpointError for anything else."""
    path = Path(source)
    if path.is_dir():
        return "checkpoint"
    if not path.is_file():
        raise CheckpointError(f"network {path}: no such file or folder, {EXPECTED}.{nearest_path(path)}")
    if path.suffix in SUFFIXES:
        return "recipe"
    if path.suffix in CHECKPOINTS:
        return "checkpoint"
    raise CheckpointError(f"network {path}: got a file that ends in {path.suffix!r}, {EXPECTED}.")


def open_source(source: str | Path, builders: Builders, overrides: Iterable[str] = ()) -> Network:
    """The network of a checkpoint, of a run folder (its best checkpoint) or of a recipe (random weights).

    `overrides` (key=value) change the recipe: that of a recipe file before its network is built; that of a
    checkpoint only as far as the data, precision and device go, for its network is what was trained.

    A recipe's network has the binarize of the last stage and is the same to the bit whenever seed and model are
    (on one machine with as many threads); its constants from data are set on standard-normal images.
    `data` then has the known statistics of the data set. Where only reading it would tell them (digits, fake,
    small images of image_folder), STAND_IN stands in: random weights know no data.
    torch's global random state is neither read nor changed.

    Errors: CheckpointError for what is none of the three, RecipeError, DataError (folders of image_folder).
    """
    path = Path(source)
    if source_kind(path) == "recipe":
        return _from_recipe(path, builders, overrides)
    model, state = load_model(path, builders)
    recipe = parse_recipe(without_places(state["recipe"]), f"checkpoint {path}", builders, overrides)
    return Network(model, recipe, state["binarize"], state["data"], True, str(path), state)


def without_places(tree: dict[str, Any], local: bool = True) -> dict[str, Any]:
    """The recipe of somebody's file without what would have this machine fetch or write: those come from its user.

    Of the data only keys of DESCRIBING stay, and where `local` those of PLACES that name a folder of this machine.
    """
    data = tree.get("data") or {}
    kept = {*DESCRIBING, *(key for key in PLACES if local and not _is_address(str(data.get(key))))}
    return {**tree, "data": {key: value for key, value in data.items() if key in kept}}


def _is_address(place: str) -> bool:
    # Why any colon but a drive's: braces of a pattern may make an address of what is none yet
    return ":" in place[2:] or place.startswith(("//", "\\\\"))


def _from_recipe(path: Path, builders: Builders, overrides: Iterable[str]) -> Network:
    written = load_recipe(path, overrides, builders)
    shape = describe(written.data, f"{path}: data")
    recipe = resolve(written, shape)
    channels, size = shape["channels"], shape["image_size"]
    mean, std = known_stats(recipe.data.name, channels, max(size))
    data = {key: shape[key] for key in ("classes", "channels", "image_size")} | {"mean": list(mean), "std": list(std)}
    binarize = recipe.stages[-1].binarize or recipe.model.binarize
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)  # Why not torch.manual_seed: it would reseed GPUs too
        model = build_model(recipe, builders, data, binarize)
        count = 64 if max(size) <= DECODED_SIZE else 8  # large images have many places to average over
        calibrate(model, torch.randn(count, channels, *size))
    return Network(model.eval(), recipe, binarize, data, False, str(path), None)


def known_stats(name: str, channels: int, size: int) -> Stats:
    """Mean and standard deviation per channel of a data set, without reading it: else STAND_IN."""
    streamed = name in ("image_folder", "shards") and size > DECODED_SIZE
    found = (IMAGENET if streamed else STATS.get(name)) if channels == 3 else None
    return found or ([STAND_IN[0]] * channels, [STAND_IN[1]] * channels)
