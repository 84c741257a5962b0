"""The meaning of a checkpoint: a check of its structure, its network's design, and upgrades of older versions.

A recipe may leave keys of its model to the normaliser (null). A checkpoint stores the values they had under `design`,
so that it keeps its meaning when a normaliser gains or changes something.

    version 1   no design: it follows from V1, the normalisers' values at that time, and from keys and tensors
    version 2   design, and a seal (bnnfree.train.sealed)

Imports torch, pydantic, bnnfree.errors, bnnfree.nn and the recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StrictStr, ValidationError
from torch import Tensor

from bnnfree.errors import CheckpointError
from bnnfree.names import BINARIZE, GROUP
from bnnfree.normalisers import complete
from bnnfree.recipe.schema import ModelRecipe

VERSION = 2
Count = Annotated[StrictInt, Field(ge=0, lt=2**53)]
Number = StrictInt | StrictFloat
Tensors = dict[StrictStr, Tensor]


class _Part(BaseModel):
    """Later versions of bnnfree may add keys: those unknown here are let through."""

    model_config = ConfigDict(extra="allow", strict=True, arbitrary_types_allowed=True)


class _Data(_Part):
    classes: Annotated[list[StrictStr], Field(min_length=1)]
    channels: Annotated[StrictInt, Field(ge=1, le=4096)]
    image_size: Annotated[list[Annotated[StrictInt, Field(ge=1, le=2**16)]], Field(min_length=2, max_length=2)]
    mean: list[Number]
    std: list[Number]


class _Network(_Part):
    """Keys that every checkpoint has."""

    recipe: dict[StrictStr, Any]
    binarize: Annotated[StrictStr, Field(pattern=f"^({'|'.join(BINARIZE)})$")]
    data: _Data
    model: Annotated[Tensors, Field(min_length=1)]
    ema: Tensors | None
    design: dict[StrictStr, bool | int | float | str | None]


class _Best(_Part):
    top1: Number | None
    epoch: Count


class _Progress(_Network):
    """Those of last.pt, from which a training goes on."""

    stage: Count
    epoch: Count
    step: Count
    optimizers: list[dict[Any, Any]]
    sums: Tensor
    signs: Tensors
    clip_rate: Any
    history: list[dict[StrictStr, Any]]
    best: _Best
    seconds: Number
    rng: Tensor
    cuda_rng: list[Tensor]
    origin: dict[StrictStr, Any]


def check_state(state: Mapping[str, Any], where: str, resume: bool = False) -> None:
    """Errors: CheckpointError that names the first key which is missing or of another type."""
    given = {"design": {}, **state} if state["version"] == 1 else dict(state)
    try:
        (_Progress if resume else _Network).model_validate(given)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])[:120]
        expected = first["msg"].removeprefix("Input should be ")
        got = "no such key" if first["type"] == "missing" else "another value"
        raise CheckpointError(
            f"{where}: {key}: got {got}, expected {expected}. It is damaged, or by another program."
        ) from None


def design_of(model: ModelRecipe, data: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the keys of `model` that may be left to the normaliser, and of `stem`: what null means today."""
    stem = ("imagenet" if min(data["image_size"]) > 64 else "cifar") if model.stem == "auto" else model.stem
    return {**complete(model.norm, model.model_dump()), "stem": stem}


def _completed(model: Mapping[str, Any], own: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `own` with the values that `model` gives, and those of `own` where it gives none; and the stem."""
    design = {key: value if model.get(key) is None else model[key] for key, value in own.items()}
    if model.get("centre_gradient") is None and not own["centre_gradient"] and design["centre_head"]:
        design["centre_gradient"] = "head" if design["centre"] else True
    stem = model.get("stem", "auto")
    design["stem"] = ("imagenet" if min(data["image_size"]) > 64 else "cifar") if stem == "auto" else stem
    return design


_PLAIN = {
    "standardize": False,
    "centre": False,
    "centre_gradient": False,
    "centre_head": False,
    "scale": "mean_abs",
    "alpha": 1.0,
    "beta": "none",
    "ste": "approx",
    "ste_window": "fixed",
    "activation": "trunk",
}
_TWIN = {**_PLAIN, "standardize": True, "scale": "fan_in", "ste_window": "sample"}
V1 = {
    "none": _PLAIN,
    "free": {**_TWIN, "centre": True, "centre_gradient": True},
    "free_paper": {**_PLAIN, "standardize": True, "alpha": 0.2, "beta": "nf"},
    "ab": {**_PLAIN, "standardize": True, "alpha": 0.25, "beta": "ref", "ste": "sigmoid"},
    **{name: {**_TWIN, "activation": "branch"} for name in ("ln_pn", "gn_pn", "in_pn")},
    **dict.fromkeys(("bn", "brn", "gn", "ln", "in", "frn", "ic", "ic_gn", "ic_frn", "kn"), _TWIN),
}
"""Values of a normaliser in version 1. `free` centred its classifier in some states of version 1 and not in others."""

ABSENT: dict[str, Any] = {"precondition": None, "probe": None, "recent": [], "origin": {}}
"""Keys that the first checkpoints of version 1 lack."""


def upgrade(state: dict[str, Any], where: str) -> dict[str, Any]:
    """A checkpoint of version 1 in the form of today, with the meaning that it had. `state` has passed `check_state`.

    Rules, by what tells the states of version 1 apart:
        tensor head.input_mean     the classifier is centred (free from model.centre_head on); without it, it is not
        no model.centre_gradient   gradients of centred layers were not centred (the first free)
        no free.recalibrate        deviations stayed as calibrated: 0
        no free.reference          no reference images: 0
        no free.group              a pass was centred as a whole: 0; with free.gather as groups are
        `compile`                  now speed: compiled
    """
    recipe = {key: dict(value) if isinstance(value, dict) else value for key, value in state["recipe"].items()}
    model = recipe.get("model")
    if not isinstance(model, dict) or model.get("norm", "free") not in V1:
        raise CheckpointError(f"{where}: recipe.model: got no norm of version 1, expected one of {', '.join(V1)}.")
    own = dict(V1[model.get("norm", "free")])
    own["centre_head"] = "head.input_mean" in state["model"]
    if "centre_gradient" not in model:
        own["centre_gradient"] = False
    if recipe.pop("compile", False):
        recipe["speed"] = "compiled"
    if own["centre"] or model.get("centre"):
        free = dict(recipe["free"]) if isinstance(recipe.get("free"), dict) else {}
        group = GROUP if free.pop("gather", False) else 0
        recipe["free"] = {"recalibrate": 0, "reference": 0, "group": group, **free}
    design = _completed(model, own, state["data"])
    return {**ABSENT, **state, "version": VERSION, "recipe": recipe, "design": design}
