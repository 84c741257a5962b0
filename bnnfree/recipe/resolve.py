"""Resolved recipes: every value that the written one leaves to the normaliser or to the data. No torch.

A recipe as written (`Recipe`) may say null or `auto`. `resolve` gives the `Resolved` one that a training, its folder
and its checkpoints hold, so that these keep their meaning when a normaliser gains or changes something.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from bnnfree.names import ACTIVATIONS, BETA_MODES, SCALES, STE_WINDOWS, STES
from bnnfree.normalisers import NORMS, OWN, complete
from bnnfree.recipe.data_section import one_of
from bnnfree.recipe.schema import AgcRecipe, ModelRecipe, Recipe

LARGEST_OF_CIFAR = 64  # shorter side of images, in pixels, up to which the stem keeps their resolution
OPEN = (*(f"model.{key}" for key in (*OWN, "stem")), "agc.clip")
"""Keys that a recipe may leave open."""


class ResolvedModel(ModelRecipe):
    """The `model` section without null."""

    stem: Literal["cifar", "half", "imagenet"]
    activation: one_of(ACTIVATIONS)  # type: ignore[valid-type]
    standardize: bool
    centre: bool
    centre_gradient: bool | Literal["head"]
    centre_head: bool
    scale: one_of(SCALES)  # type: ignore[valid-type]
    alpha: float
    beta: one_of(BETA_MODES)  # type: ignore[valid-type]
    ste: one_of(STES)  # type: ignore[valid-type]
    ste_window: one_of(STE_WINDOWS)  # type: ignore[valid-type]


class ResolvedAgc(AgcRecipe):
    """The `agc` section without auto; null is off."""

    clip: float | None


class Resolved(Recipe):
    """A recipe that leaves nothing open."""

    model: ResolvedModel
    agc: ResolvedAgc


def left_open(recipe: Recipe) -> list[str]:
    """The keys that a recipe leaves to the normaliser or to the data."""
    open_values = {"model.stem": "auto", "agc.clip": "auto"}
    return [key for key in OPEN if _value(recipe, key) == open_values.get(key)]


def completed(recipe: Recipe, kept: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe with the values that its normaliser has for keys left open; the stem alone may still be auto.

    kept: values of open keys that come before the normaliser's, as of a run that goes on.
    """
    model, agc, given = recipe.model, recipe.agc, kept or {}
    known = {key: given[key] for key in left_open(recipe) if key in given}
    own = {key.removeprefix("model."): value for key, value in known.items() if key != "agc.clip"}
    values = complete(model.norm, {**model.model_dump(), **own})
    clip = known.get("agc.clip", NORMS[model.norm].agc) if agc.clip == "auto" else agc.clip
    stem = own.get("stem", model.stem)
    sections = {
        "model": model.model_copy(update={**values, "stem": stem}),
        "agc": agc.model_copy(update={"clip": clip}),
    }
    return recipe.model_copy(update=sections)


def resolve(recipe: Recipe, data: Mapping[str, Any], kept: Mapping[str, Any] | None = None) -> Resolved:
    """The recipe for these data (`image_size` [H, W] counts), with nothing left open. `kept`: see `completed`."""
    if isinstance(recipe, Resolved):
        return recipe
    whole = completed(recipe, kept)
    model = whole.model.model_dump()
    if model["stem"] == "auto":
        model["stem"] = "imagenet" if min(data["image_size"]) > LARGEST_OF_CIFAR else "cifar"
    sections = {"model": ResolvedModel.model_validate(model), "agc": ResolvedAgc.model_validate(whole.agc.model_dump())}
    return Resolved.model_construct(**{**dict(whole), **sections})


def reopened(recipe: Recipe) -> Recipe:
    """The recipe with null and auto wherever a value is the normaliser's own: recipes differ in what was chosen."""
    whole = completed(recipe)
    norm, values = whole.model.norm, whole.model.model_dump()
    same = [key for key in OWN if complete(norm, {**values, key: None})[key] == values[key]]
    clip = "auto" if whole.agc.clip == NORMS[norm].agc else whole.agc.clip
    sections = {
        "model": ModelRecipe.model_construct(**{**values, **dict.fromkeys(same)}),
        "agc": AgcRecipe(clip=clip),
    }
    return Recipe.model_construct(**{**dict(recipe), **sections})


def values_of(recipe: Recipe, keys: list[str]) -> dict[str, Any]:
    """Dotted key -> value."""
    return {key: _value(recipe, key) for key in keys}


def _value(recipe: Recipe, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(recipe, section), name)
