"""Conditions under which a key of a recipe is read, one row for each: a key that is set in vain is an error.

A condition asks the recipe and the traits of its networks. `traits_of` has those of any network of blocks, from the
normaliser's facts alone; bnnfree.train.networks looks at what a builder makes. Imports pydantic and torch-free facts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from bnnfree.names import BINARIZE, FILE_DATASETS, MIXTURES
from bnnfree.normalisers import NORMS
from bnnfree.recipe.resolve import completed
from bnnfree.recipe.schema import Recipe
from bnnfree.recipe.sections import section_of

Traits = frozenset[str]
Look = Callable[[Recipe], Traits]
TRAITS = {
    "binary": "binary layers, whatever of them is 1 bit",
    "bits": "1-bit weights",
    "shortcuts": "binary layers in shortcuts",
    "signs": "signs of activations",
    "standardised": "binary layers whose weights are standardised",
    "activations": "activations of blocks",
    "centred": "layers centred by their inputs' means",
    "constants": "layers with constants of a calibration",
    "rescaled": "layers with a constant deviation and a gain",
    "gradients": "layers with centred gradients",
    "statistics": "layers whose output depends on the batch",
    "settled": "running statistics that can be measured anew",
}
"""Name of a trait -> a network has it if any of its stages' networks has these."""


def traits_of(recipe: Recipe) -> Traits:
    """The traits of a network of BinaryBlocks with activations and convolutions in shortcuts, by its recipe alone."""
    model = completed(recipe).model
    rule = NORMS[model.norm]
    kinds = [BINARIZE[stage.binarize or model.binarize] for stage in recipe.stages]
    centred, head = model.centre, model.centre_head
    has = {
        "binary": True,
        "bits": any(weights for _, weights in kinds),
        "shortcuts": True,
        "signs": any(signs for signs, _ in kinds),
        "standardised": model.standardize,
        "activations": True,
        "centred": centred or head,
        "constants": centred or head or rule.unit_output or model.beta == "measured",
        "rescaled": rule.unit_output and rule.gain,
        "gradients": (centred and model.centre_gradient is True) or (head and bool(model.centre_gradient)),
        "statistics": rule.batch_dependent,
        "settled": rule.settles,
    }
    return frozenset(name for name, holds in has.items() if holds)


# -- conditions


@dataclass(frozen=True)
class Reader:
    """The reader of a key: in the words of a recipe, and as a test of a recipe and the traits of its networks."""

    name: str
    reads: Callable[[Recipe, Traits], bool]

    def also(self, other: Reader) -> Reader:
        """Both conditions together."""
        name = self.name if other.name in self.name else f"{self.name}, with {other.name}"
        return Reader(name, lambda recipe, traits: self.reads(recipe, traits) and other.reads(recipe, traits))


def _where(key: str, *values: str) -> Reader:
    """Recipes in which another key has one of these values."""
    section, _, name = key.partition(".")
    return Reader(f"{key}={' or '.join(values)}", lambda recipe, _: getattr(getattr(recipe, section), name) in values)


def _with(name: str, trait: str) -> Reader:
    """Networks that have a trait."""
    return Reader(name, lambda recipe, traits: trait in traits)


ALWAYS = Reader("every recipe", lambda recipe, traits: True)
LATENTS = _with("networks with binary layers", "binary")
SCALED = Reader(
    "networks with 1-bit weights (binarize=weights or both), or learned scales",
    lambda recipe, traits: "bits" in traits or ("binary" in traits and recipe.model.scale == "learned"),
)
SHORTCUTS = Reader(
    "networks with 1-bit weights and with convolutions in shortcuts",
    lambda recipe, traits: (
        "shortcuts" in traits and any(BINARIZE[stage.binarize or recipe.model.binarize][1] for stage in recipe.stages)
    ),
)
SIGNS = _with("networks with signs of activations (binarize=activations or both)", "signs")
STANDARDIZED = _with("binary layers whose weights are standardised", "standardised")
ACTIVATED = _with("blocks with an activation (ReActNet, ResNet)", "activations")
CENTRED = _with("layers centred by their inputs' means (model.norm=free, model.centre, model.centre_head)", "centred")
TRACKED = CENTRED.also(Reader("free.track=true", lambda recipe, _: recipe.free.track))
CONSTANTS = _with("layers with constants of a calibration (model.norm=free, model.beta=measured)", "constants")
RESCALED = _with("layers with a constant deviation and a gain (model.norm=free)", "rescaled")
GROUPED = _with("layers with centred gradients (model.norm=free)", "gradients")
COMMON = Reader(
    "layers with centred gradients (model.norm=free), without batch statistics and without optimizer.precondition",
    lambda recipe, traits: (
        "gradients" in traits and recipe.optimizer.precondition is None and "statistics" not in traits
    ),
)
SETTLED = Reader(
    "running statistics (model.norm=bn) or centred layers (model.norm=free)",
    lambda recipe, traits: "centred" in traits or "settled" in traits,
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
FILES = _where("data.name", *FILE_DATASETS)
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
        CENTRED.name, lambda recipe, traits: not recipe.model.centre_gradient or CENTRED.reads(recipe, traits)
    ),
    "model.centre_head": ALWAYS,
    "model.scale": SCALED,
    "model.alpha": ALWAYS,
    "model.beta": ALWAYS,
    "model.ste": SIGNS,
    "model.ste_window": SIGNS,
    "model.pad_value": ALWAYS,
    "model.latent_std": STANDARDIZED,
    "data.name": ALWAYS,
    "data.root": STORED,
    "data.test_root": SHARDS,
    "data.val_root": SHARDS,
    "data.batch_size": ALWAYS,
    "data.image_size": ALWAYS,
    "data.augment": ALWAYS,
    "data.mix_alpha": Reader(
        "mixup or cutmix in data.augment", lambda recipe, _: not set(MIXTURES).isdisjoint(recipe.data.augment)
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
    "optimizer.lr_mult": ALWAYS,
    "optimizer.betas": ADAM,
    "optimizer.eps": ADAM,
    "optimizer.momentum": SGD,
    "optimizer.nesterov": SGD,
    "optimizer.bop_gamma": BOP,
    "optimizer.bop_threshold": BOP,
    "optimizer.precondition": ALWAYS,
    "optimizer.bnp_rho": BNP,
    "schedule.name": ALWAYS,
    "schedule.over": Reader("several stages", lambda recipe, _: len(recipe.stages) > 1),
    "schedule.warmup_steps": ALWAYS,
    "schedule.milestones": STEP,
    "schedule.gamma": STEP,
    "agc.clip": ALWAYS,
    "loss.name": ALWAYS,
    "loss.label_smoothing": _where("loss.name", "cross_entropy"),
    "loss.teacher": TAUGHT,
    "ema.decay": ALWAYS,
    "free.window": TRACKED,
    "free.calibration": CONSTANTS,
    "free.track": CENTRED,
    "free.recalibrate": RESCALED,
    "free.reference": COMMON,
    "free.group": GROUPED,
    "probe.every": LATENTS,
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


def unread(recipe: Recipe, written: Mapping[str, Any], traits: Traits) -> dict[str, str]:
    """{key: what it is for} of keys that are set, to another value than their default, and that nothing reads.

    written: dotted key -> value, as `leaves` gives them; traits: those of the recipe's networks.
    """
    found = {}
    for key, value in written.items():
        reader = READ[".".join("*" if part.isdigit() else part for part in key.split("."))]
        if value != _default(key) and not reader.reads(recipe, traits):
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
