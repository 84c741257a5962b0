"""The meaning of a checkpoint: a check of its structure, and upgrades of older versions.

A recipe may leave keys to its normaliser (null). A checkpoint holds the values they had, so that it keeps its meaning
when a normaliser gains or changes something.

    version 1   recipe as written: the values follow from V1, those of that time, and from keys and tensors
    version 2   recipe as written, the values apart under `design`; a seal (bnnfree.train.sealed)
    version 3   resolved recipe; `open`: the keys that were left open as it was written

Imports torch, pydantic, bnnfree.errors and the recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StrictStr, ValidationError
from torch import Tensor

from bnnfree.errors import CheckpointError
from bnnfree.names import BINARIZE, GROUP
from bnnfree.normalisers import NORMS, OWN
from bnnfree.recipe.resolve import LARGEST_OF_CIFAR
from bnnfree.recipe.retired import translated, without_retired

VERSION = 3
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


class _Designed(_Part):
    design: dict[StrictStr, bool | int | float | str | None]


class _Open(_Part):
    open: list[StrictStr]


OF_VERSION: dict[int, type[_Part]] = {1: _Part, 2: _Designed, 3: _Open}


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
    try:
        (_Progress if resume else _Network).model_validate(dict(state))
        OF_VERSION[state["version"]].model_validate(dict(state))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])[:120]
        expected = first["msg"].removeprefix("Input should be ")
        got = "no such key" if first["type"] == "missing" else "another value"
        raise CheckpointError(
            f"{where}: {key}: got {got}, expected {expected}. It is damaged, or by another program."
        ) from None


def upgrade(state: dict[str, Any], where: str) -> dict[str, Any]:
    """A checkpoint in the form of today, with the meaning that it had. `state` has passed `check_state`."""
    if state["version"] == 1:
        state = _from_1(state, where)
    return _from_2(state, where) if state["version"] == 2 else state


def _from_2(state: dict[str, Any], where: str) -> dict[str, Any]:
    """Of version 2: what the recipe left open has the value that its design says; retired keys go."""
    recipe = without_retired(translated(state["recipe"]), where, stored=True)
    model, design = recipe.get("model"), state["design"]
    if not isinstance(model, dict) or model.get("norm", "free") not in NORMS:
        raise CheckpointError(f"{where}: recipe.model: got no norm, expected one of {', '.join(NORMS)}.")
    stem = model.get("stem", "auto")
    left = [key for key in OWN if model.get(key) is None] + ["stem"] * (stem == "auto")
    if lacking := [key for key in left if key not in design]:
        raise CheckpointError(f"{where}: design.{lacking[0]}: got no such key. It is damaged, or by another program.")
    values = {key: design[key] for key in left}
    if "centre_gradient" in values and values["centre_gradient"] is None:  # said so: of the classifier alone
        values["centre_gradient"] = "head"
    agc = recipe.get("agc") if isinstance(recipe.get("agc"), dict) else {}
    clip = agc.get("clip", "auto")
    agc = {**agc, "clip": NORMS[model.get("norm", "free")].agc if clip == "auto" else clip}
    rest = {key: value for key, value in state.items() if key != "design"}
    names = [f"model.{key}" for key in left]
    return {**rest, "version": 3, "open": names, "recipe": {**recipe, "model": {**model, **values}, "agc": agc}}


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


def _from_1(state: dict[str, Any], where: str) -> dict[str, Any]:
    """A checkpoint of version 1 in the form of version 2.

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
    design = {key: value if model.get(key) is None else model[key] for key, value in own.items()}
    if model.get("centre_gradient") is None and not own["centre_gradient"] and design["centre_head"]:
        # a centred head centres its gradient too; with centred convolutions that do not, no value says so
        design["centre_gradient"] = None if design["centre"] else True
    small = min(state["data"]["image_size"]) <= LARGEST_OF_CIFAR
    design["stem"] = "cifar" if small else "imagenet"
    return {**ABSENT, **state, "version": 2, "recipe": recipe, "design": design}
