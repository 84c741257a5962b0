"""The options of a normaliser are the keyword arguments of its builder: checking them. Imports bnnfree.errors only."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, get_args

from bnnfree.errors import BnnfreeError, unknown_name

LARGEST = 3e38  # what float32 holds
NOT_FOR_RECIPES = ("activation",)  # modules: what builds the network passes them


def check_options(builder: Callable[..., Any], options: Mapping[str, Any], where: str) -> None:
    """Is every option a keyword argument of `builder`, and of its annotated type (int serves as float)?

    Errors: UnknownNameError, BnnfreeError. Ranges are the builder's to check.
    """
    known = options_of(builder)
    for name, value in options.items():
        if name not in known:
            if not known:
                raise BnnfreeError(f"{where}: got {name!r}, expected none: this norm has no options.")
            raise unknown_name(where, name, known)
        annotation = known[name].annotation
        kinds = get_args(annotation) or (annotation,)
        whole_for_real = float in kinds and isinstance(value, int) and not isinstance(value, bool)
        if not whole_for_real and type(value) not in kinds:
            expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise BnnfreeError(f"{where}.{name}: got {value!r} ({type(value).__name__}), expected {expected}.")


def options_of(builder: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The options of a builder that a recipe can set: name -> parameter, with its annotation and default."""
    parameters = inspect.signature(builder, eval_str=True).parameters
    return {n: p for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY and n not in NOT_FOR_RECIPES}


def positive_eps(value: float, name: str = "eps") -> float:
    """An eps that keeps a division finite: the value, or an error if it is not clearly above 0."""
    return within(name, value, low=1e-12)


def within(name: str, value: float, *, low: float = -math.inf, high: float = LARGEST) -> float:
    """`value` if it lies in [low, high], else an error that says so."""
    if not low <= value <= high:
        bounds = f"from {low:g} on" if high == LARGEST else f"from {low:g} to {high:g}"
        raise BnnfreeError(f"{name}: got {value!r}, expected a number {bounds}.")
    return float(value)
