"""Recipes read against the builders of networks: what a network cannot be, and which keys nothing of it reads.

bnnfree.recipe reads without torch and knows a network by its recipe; here it is built, without memory, and looked at.
The functions are those of bnnfree.recipe.read. Imports torch, bnnfree.nn and the recipe.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnnfree.errors import BnnfreeError
from bnnfree.nn import (
    NORMS,
    BinaryBlock,
    BinaryConv2d,
    BinaryLinear,
    GhostBatchNorm2d,
    RPReLU,
    Sign,
    ThresholdedLinear,
    WeightLayer,
)
from bnnfree.recipe import read
from bnnfree.recipe.reads import Look, Traits, traits_of
from bnnfree.recipe.schema import Recipe

Builder = Callable[..., nn.Module]
Models = Mapping[str, Builder] | Iterable[str] | None
MOST_WEIGHTS = 2**31
ACTIVATIONS = (RPReLU, ThresholdedLinear, nn.PReLU, nn.ReLU)


def load_recipe(path: str | Path, overrides: Iterable[str] = (), models: Models = None) -> Recipe:
    """`bnnfree.recipe.load_recipe`; builders in `models` show what the network cannot be and what it reads."""
    models, look = _known(models)
    return read.load_recipe(path, overrides, models, look)


def parse_recipe(tree: dict, where: str, models: Models = None, overrides: Iterable[str] = ()) -> Recipe:
    """`bnnfree.recipe.parse_recipe`, likewise."""
    models, look = _known(models)
    return read.parse_recipe(tree, where, models, overrides, look)


def load_fitting(
    path: str | Path, overrides: Mapping[str, str], common: Iterable[str], models: Models
) -> tuple[Recipe, dict[str, str]]:
    """`bnnfree.recipe.read.load_fitting`, likewise."""
    models, look = _known(models)
    return read.load_fitting(path, overrides, common, models, look)


def _known(models: Models) -> tuple[list[str] | None, Look]:
    """The names of `models`, and what looks at the network of a recipe."""
    if models is None:
        return None, traits_of
    return list(models), functools.partial(look_at, builders=models) if isinstance(models, Mapping) else traits_of


def look_at(recipe: Recipe, builders: Mapping[str, Builder]) -> Traits:
    """The traits of the networks of a recipe's stages.

    Errors: BnnfreeError of an option that does not fit the network, and of a network of too many weights.
    """
    builder = builders[recipe.model.name]
    kinds = dict.fromkeys(stage.binarize or recipe.model.binarize for stage in recipe.stages)
    options = recipe.model.model_dump(exclude={"name", "binarize"})
    options["stem"] = "cifar" if options["stem"] == "auto" else options["stem"]
    found = [_traits(builder, json.dumps({**options, "binarize": kind})) for kind in kinds]
    return frozenset().union(*found)


@functools.lru_cache(maxsize=64)
def _traits(builder: Builder, options: str) -> Traits:
    """Those of a network for 10 classes and 3 channels, without values."""
    values = json.loads(options)
    with torch.device("meta"):
        net = builder(10, 3, **values)
    weights = sum(param.numel() for param in net.parameters())
    if weights > MOST_WEIGHTS:
        width = values["width"]
        raise BnnfreeError(f"width: got {width}, which makes {weights:,} weights, expected up to {MOST_WEIGHTS:,}.")
    found = {name for name, holds in LAYERS.items() if any(map(holds, net.modules()))}
    return frozenset(found | ({"statistics"} if NORMS[values["norm"]].batch_dependent else set()))


def _is_binary(layer: nn.Module) -> bool:
    return isinstance(layer, BinaryConv2d | BinaryLinear)


def _is_calibrated(layer: nn.Module) -> bool:
    if isinstance(layer, WeightLayer):
        return layer.centre is not None or layer.unit_output
    return isinstance(layer, BinaryBlock) and layer.measured


def _has_shortcut(layer: nn.Module) -> bool:
    return isinstance(layer, BinaryBlock) and layer.shortcut is not None and any(map(_is_binary, layer.shortcut))


LAYERS: dict[str, Callable[[Any], bool]] = {
    "binary": _is_binary,
    "bits": lambda layer: _is_binary(layer) and layer.binary,
    "shortcuts": _has_shortcut,
    "signs": lambda layer: isinstance(layer, Sign),
    "standardised": lambda layer: _is_binary(layer) and layer.standardize,
    "activations": lambda layer: isinstance(layer, ACTIVATIONS),
    "centred": lambda layer: isinstance(layer, WeightLayer) and layer.centre == "input",
    "constants": _is_calibrated,
    "rescaled": lambda layer: isinstance(layer, WeightLayer) and layer.unit_output and layer.gain is not None,
    "gradients": lambda layer: isinstance(layer, WeightLayer) and layer.gradient_centre is not None,
    "statistics": lambda layer: isinstance(layer, _BatchNorm),  # a network's own, beside those of its normaliser
    "settled": lambda layer: type(layer) in (nn.BatchNorm2d, GhostBatchNorm2d),
}
"""Trait of bnnfree.recipe.reads.TRAITS -> a layer that gives it to its network."""
