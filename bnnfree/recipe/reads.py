"""Conditions under which a key of a recipe is read, one row for each: a key that is set in vain is an error.

Imports torch, pydantic, bnnfree.errors, bnnfree.nn and the schema.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn

from bnnfree.data.augment import MIXTURES
from bnnfree.errors import BnnfreeError
from bnnfree.nn import BINARIZE, BinaryBlock, BinaryConv2d, BinaryLinear, Clip, Design, RPReLU, Sign, WeightLayer
from bnnfree.nn.norms import GhostBatchNorm2d, ThresholdedLinear
from bnnfree.recipe.schema import Recipe
from bnnfree.recipe.sections import section_of

MOST_WEIGHTS = 2**31
ACTIVATIONS = (RPReLU, ThresholdedLinear, nn.PReLU, nn.ReLU)
Builder = Callable[..., nn.Module]


# -- networks


def networks(recipe: Recipe, builders: Any) -> list[nn.Module]:
    """The networks of a recipe's stages, without values, as far as stages differ; for 10 classes and 3 channels.

    builders: name -> builder; of anything else, one block of the recipe's design stands in for the network.
    Errors: BnnfreeError of an option that does not fit the network, and of a network of too many weights.
    """
    builder = builders[recipe.model.name] if isinstance(builders, Mapping) else _one_block
    kinds = dict.fromkeys(stage.binarize or recipe.model.binarize for stage in recipe.stages)
    options = recipe.model.model_dump(exclude={"name", "start", "binarize"})
    options["stem"] = "cifar" if options["stem"] == "auto" else options["stem"]
    return [_network(builder, json.dumps({**options, "binarize": kind})) for kind in kinds]


@functools.lru_cache(maxsize=64)
def _network(builder: Builder, options: str) -> nn.Module:
    with torch.device("meta"):
        net = builder(10, 3, **json.loads(options))
    weights = sum(param.numel() for param in net.parameters())
    if weights > MOST_WEIGHTS:
        width = json.loads(options)["width"]
        raise BnnfreeError(f"width: got {width}, which makes {weights:,} weights, expected up to {MOST_WEIGHTS:,}.")
    return net


def _one_block(classes: int, channels: int, width: float, stem: str, **options) -> nn.Module:
    design = Design(**options)
    stem_and_block = design.make_stem(channels, 16, 3, 1), BinaryBlock(16, 32, design, stride=2)
    return nn.ModuleList([*stem_and_block, design.make_head(32, classes)])


# -- conditions


@dataclass(frozen=True)
class Reader:
    """The reader of a key: in the words of a recipe, and as a test of a recipe and the layers of its networks."""

    name: str
    reads: Callable[[Recipe, list[nn.Module]], bool]

    def also(self, other: Reader) -> Reader:
        """Both conditions together."""
        name = self.name if other.name in self.name else f"{self.name}, with {other.name}"
        return Reader(name, lambda recipe, layers: self.reads(recipe, layers) and other.reads(recipe, layers))


def _where(key: str, *values: str) -> Reader:
    """Recipes in which another key has one of these values."""
    section, _, name = key.partition(".")
    return Reader(f"{key}={' or '.join(values)}", lambda recipe, _: getattr(getattr(recipe, section), name) in values)


def _with(name: str, test: Callable[[nn.Module], bool]) -> Reader:
    """Networks with a layer of which `test` holds."""
    return Reader(name, lambda recipe, layers: any(map(test, layers)))


def _takes_inputs(layer: nn.Module) -> bool:
    return isinstance(layer, WeightLayer) and layer.centre == "input"


def _is_binary(layer: nn.Module) -> bool:
    return isinstance(layer, BinaryConv2d | BinaryLinear)


def _balances(layer: nn.Module) -> bool:
    return (
        isinstance(layer, Sign | RPReLU | Clip)
        and hasattr(layer, "balance")
        and next(layer.parameters(), None) is not None
    )


def _has_constants(layer: nn.Module) -> bool:
    """True where calibration sets anything of it."""
    if isinstance(layer, WeightLayer):
        return layer.centre is not None or layer.unit_output
    return isinstance(layer, BinaryBlock) and layer.measured


def _has_shortcut(layer: nn.Module) -> bool:
    return isinstance(layer, BinaryBlock) and layer.shortcut is not None and any(map(_is_binary, layer.shortcut))


ALWAYS = Reader("every recipe", lambda recipe, layers: True)
LATENTS = _with("networks with binary layers", _is_binary)
BITS = Reader(
    "networks with 1-bit weights (binarize=weights or both)",
    lambda recipe, layers: any(_is_binary(layer) and layer.binary for layer in layers),
)
SCALED = Reader(
    "networks with 1-bit weights (binarize=weights or both), or learned scales",
    lambda recipe, layers: (
        LATENTS.reads(recipe, layers) and (BITS.reads(recipe, layers) or recipe.model.scale == "learned")
    ),
)
SHORTCUTS = Reader(
    "networks with 1-bit weights and with convolutions in shortcuts",
    lambda recipe, layers: (
        any(map(_has_shortcut, layers))
        and any(BINARIZE[stage.binarize or recipe.model.binarize][1] for stage in recipe.stages)
    ),
)
SIGNS = _with("networks with signs of activations (binarize=activations or both)", lambda m: isinstance(m, Sign))
STANDARDIZED = _with("binary layers whose weights are standardised", lambda m: _is_binary(m) and bool(m.standardize))
ACTIVATED = _with("blocks with an activation (ReActNet, ResNet)", lambda m: isinstance(m, ACTIVATIONS))
BALANCED = _with("networks with thresholds or RPReLU", _balances)
CENTRED = _with(
    "layers centred by their inputs' means (model.norm=free, model.centre, model.centre_head)", _takes_inputs
)
TRACKED = CENTRED.also(Reader("free.track=true", lambda recipe, _: recipe.free.track))
CONSTANTS = _with("layers with constants of a calibration (model.norm=free, model.beta=measured)", _has_constants)
RESCALED = _with(
    "layers with a constant deviation and a gain (model.norm=free)",
    lambda m: isinstance(m, WeightLayer) and m.unit_output and m.gain is not None,
)
GAINS = _with(
    "layers with a gain (model.norm=free or free_paper)", lambda m: isinstance(m, WeightLayer) and m.gain is not None
)
GROUPED = _with(
    "layers with centred gradients (model.norm=free)",
    lambda m: isinstance(m, WeightLayer) and m.gradient_centre is not None,
)
COMMON = Reader(
    "layers with centred gradients (model.norm=free), without batch statistics and without optimizer.precondition",
    lambda recipe, layers: (
        any(isinstance(m, WeightLayer) and m.gradient_centre is not None for m in layers)
        and recipe.optimizer.precondition is None
        and not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in layers)
    ),
)
SETTLED = Reader(
    "running statistics (model.norm=bn) or centred layers (model.norm=free)",
    lambda recipe, layers: (
        CENTRED.reads(recipe, layers) or any(type(m) in (nn.BatchNorm2d, GhostBatchNorm2d) for m in layers)
    ),
)
ADAM, SGD, BOP = (
    _where("optimizer.name", "adam", "adamw", "bop"),
    _where("optimizer.name", "sgd"),
    _where("optimizer.name", "bop"),
)
BNP = _where("optimizer.precondition", "bnp")
STEP = _where("schedule.name", "step")
TAUGHT = _where("loss.name", "distribution")
STORED = Reader("data sets of files", lambda recipe, _: recipe.data.name not in ("digits", "fake"))
FILES = _where("data.name", "imagenet", "image_folder", "shards")
SHARDS = _where("data.name", "shards")
FAKE = _where("data.name", "fake")


def _left_by_stages(name: str) -> Reader:
    """Stages that do not say it themselves."""
    return Reader(
        f"stages without their own {name}", lambda recipe, _: any(getattr(s, name) is None for s in recipe.stages)
    )


READ: dict[str, Reader] = {
    "model.name": ALWAYS,
    "model.norm": ALWAYS,
    "model.norm_options": ALWAYS,  # each of its keys is one of the builder's, or an error
    "model.width": ALWAYS,
    "model.binarize": LATENTS,
    "model.stem": ALWAYS,
    "model.shortcut": SHORTCUTS,
    "model.activation": ACTIVATED,
    "model.standardize": ALWAYS,
    "model.centre": ALWAYS,
    "model.centre_gradient": Reader(
        CENTRED.name, lambda recipe, layers: not recipe.model.centre_gradient or CENTRED.reads(recipe, layers)
    ),
    "model.centre_head": ALWAYS,
    "model.scale": SCALED,
    "model.alpha": ALWAYS,
    "model.beta": ALWAYS,
    "model.ste": SIGNS,
    "model.ste_window": SIGNS,
    "model.ste_parameter": SIGNS,
    "model.ste_last": SIGNS,
    "model.pad_value": ALWAYS,
    "model.latent_std": STANDARDIZED,
    "model.start": BALANCED,
    "data.name": ALWAYS,
    "data.root": STORED,
    "data.test_root": SHARDS,
    "data.val_root": SHARDS,
    "data.batch_size": ALWAYS,
    "data.image_size": ALWAYS,
    "data.augment": ALWAYS,
    "data.mix_alpha": Reader(
        "mixup or cutmix in data.augment", lambda recipe, _: not MIXTURES.keys().isdisjoint(recipe.data.augment)
    ),
    "data.burst": ALWAYS,
    "data.train_limit": ALWAYS,
    "data.test_limit": ALWAYS,
    "data.val_fraction": Reader("data without data.val_root", lambda recipe, _: recipe.data.val_root is None),
    "data.download": _where("data.name", "cifar10", "cifar100"),
    "data.bad_images": FILES,
    "data.workers": ALWAYS,  # this and the next say how and where, and may be given to any training
    "data.cache": ALWAYS,
    "data.cache_gb": SHARDS.also(Reader("a URL as data.root", lambda recipe, _: "://" in (recipe.data.root or ""))),
    "data.samples": FAKE,
    "data.classes": _where("data.name", "fake", "shards"),
    "data.channels": _where("data.name", "fake", "imagenet", "image_folder", "shards"),
    "data.orientation": FILES,
    "data.range": _where("data.name", "imagenet", "image_folder", "shards", "arrays"),
    "data.test_fraction": _where("data.name", "image_folder", "arrays"),
    "stages.*.name": ALWAYS,
    "stages.*.epochs": ALWAYS,
    "stages.*.binarize": LATENTS,
    "stages.*.image_size": ALWAYS,
    "stages.*.lr": ALWAYS,
    "stages.*.weight_decay": ALWAYS,
    "optimizer.name": ALWAYS,
    "optimizer.lr": _left_by_stages("lr"),
    "optimizer.affine_lr_mult": ALWAYS,
    "optimizer.weight_decay": _left_by_stages("weight_decay"),
    "optimizer.gain_decay": GAINS,
    "optimizer.lr_mult": ALWAYS,
    "optimizer.betas": ADAM,
    "optimizer.eps": ADAM,
    "optimizer.momentum": SGD,
    "optimizer.nesterov": SGD,
    "optimizer.bop_gamma": BOP,
    "optimizer.bop_threshold": BOP,
    "optimizer.precondition": ALWAYS,
    "optimizer.bnp_rho": BNP,
    "optimizer.bnp_floor": BNP,
    "schedule.name": ALWAYS,
    "schedule.over": Reader("several stages", lambda recipe, _: len(recipe.stages) > 1),
    "schedule.warmup_steps": ALWAYS,
    "schedule.milestones": STEP,
    "schedule.gamma": STEP,
    "agc.clip": ALWAYS,
    "agc.eps": Reader("agc.clip above 0", lambda recipe, _: recipe.agc.clip is not None),
    "loss.name": ALWAYS,
    "loss.label_smoothing": _where("loss.name", "cross_entropy"),
    "loss.teacher": TAUGHT,
    "ema.decay": ALWAYS,
    "free.window": TRACKED,
    "free.calibration": CONSTANTS,
    "free.track": CENTRED,
    "free.freeze": TRACKED,
    "free.recalibrate": RESCALED,
    "free.reference": COMMON,
    "free.group": GROUPED,
    "probe.every": LATENTS,
    "probe.images": Reader("probe.every", lambda recipe, _: recipe.probe.every is not None),
    "init": ALWAYS,
    "freeze": ALWAYS,
    "settle": SETTLED,
    "accumulate": ALWAYS,
    "seed": ALWAYS,
    "deterministic": ALWAYS,
    "precision": ALWAYS,
    "speed": ALWAYS,
    "device": ALWAYS,
    "checkpoint_minutes": ALWAYS,
}
"""Key, of stages that of any -> what reads it."""


def unread(recipe: Recipe, written: Mapping[str, Any], networks: list[nn.Module]) -> dict[str, str]:
    """{key: what it is for} of keys that are set, to another value than their default, and that nothing reads.

    written: dotted key -> value, as `leaves` gives them; networks: those of the recipe.
    """
    layers = [layer for net in networks for layer in net.modules()]
    found = {}
    for key, value in written.items():
        reader = READ[".".join("*" if part.isdigit() else part for part in key.split("."))]
        if value != _default(key) and not reader.reads(recipe, layers):
            found[key] = reader.name
    return found


def leaves(tree: Any) -> dict[str, Any]:
    """{dotted key: value} of the schema's keys that a plain tree holds; what is no key of a recipe is left out."""
    return dict(_leaves(tree, Recipe, ""))


def _leaves(node: Any, section: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items() if isinstance(node, dict) else ():
        if key not in section.model_fields:
            continue
        inner = section_of(section.model_fields[key].annotation)
        if inner is None:
            yield prefix + key, value
        elif isinstance(value, list):
            for i, item in enumerate(value):
                yield from _leaves(item, inner, f"{prefix}{key}.{i}.")
        else:
            yield from _leaves(value, inner, f"{prefix}{key}.")


def _default(key: str) -> Any:
    section: type[BaseModel] = Recipe
    *sections, name = [part for part in key.split(".") if not part.isdigit()]
    for part in sections:
        section = section_of(section.model_fields[part].annotation)  # type: ignore[assignment]
    return section.model_fields[name].default
