"""The grid of a sweep file: its axes, from lists of values, variants with labels, and tables of names.

Imports the tables of names, the schema and its own room. The file as a whole: bnnfree.sweep.file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bnnfree.errors import BnnfreeError, unknown_name
from bnnfree.names import BETA_MODES, OPTIMIZERS, SCALES, STES
from bnnfree.normalisers import NORMS
from bnnfree.recipe.schema import Recipe

EVERY = "every"
TABLES: dict[str, Iterable[str]] = {
    "model.norm": NORMS,
    "model.scale": SCALES,
    "model.ste": STES,
    "model.beta": BETA_MODES,
    "optimizer.name": OPTIMIZERS,
}


class SweepError(BnnfreeError):
    """A sweep file that cannot be read, or one whose runs contradict themselves or each other."""


@dataclass(frozen=True)
class Axis:
    """One dimension of the grid: label -> what it changes in the recipe; `key` if it is the values of one key."""

    name: str
    points: dict[str, dict[str, Any]]
    key: str | None = None

    def number(self, label: str) -> float | None:
        """The value behind a label where it is a number."""
        value = self.points[label].get(self.key) if self.key else None
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def read_axes(parts: list[Mapping[str, Any]], where: str) -> list[Axis]:
    """The axes of the file; the scale and the command line may give other values, or choose among variants."""
    tree, level, own = (mapping(part, "grid") for part in parts)
    axes = {name: _axis(name, value, f"{where}: grid.{name}") for name, value in tree.items()}
    whole = dict(axes)  # what the command line chooses from, whatever the scale has chosen
    for part in (level, own):
        for name, value in part.items():
            if name in whole and whole[name].key is None and isinstance(value, list):
                axes[name] = _chosen(whole[name], value, f"{where}: grid.{name}")
            elif name in axes or name.partition(".")[0] in Recipe.model_fields or isinstance(value, dict):
                axes[name] = _axis(name, value, f"{where}: grid.{name}")
            else:
                raise unknown_name(f"{where}: grid", name, axes)
            if part is level and isinstance(value, dict):
                whole[name] = axes[name]  # the scale has variants of its own
    if not axes:
        raise SweepError(f"{where}: grid: got no axis, expected one at least, such as data.batch_size: [2, 128].")
    return list(axes.values())


def _axis(name: str, value: Any, where: str) -> Axis:
    if value == EVERY:
        value = _names_of(name, where)
    if isinstance(value, dict):
        return Axis(name, _variants(value, where))
    if not isinstance(value, list) or not value:
        raise SweepError(f"{where}: got {shown(value)}, expected a list of values, or variants: label and changes.")
    points: dict[str, dict[str, Any]] = {}
    for item in value:
        label = item if isinstance(item, str) else json.dumps(item, default=shown)
        if label in points:
            raise SweepError(f"{where}: got {label} twice, expected each value once.")
        points[label] = {name: item}
    return Axis(name, points, key=name)


def _names_of(key: Any, where: str) -> list[str]:
    if not isinstance(key, str) or key not in TABLES:
        raise unknown_name(f"{where}: {EVERY}", key, TABLES)
    return list(TABLES[key])


def _variants(value: Mapping[Any, Any], where: str) -> dict[str, dict[str, Any]]:
    """label -> dotted changes. `every: KEY` stands for a variant of each name of that key's table; a label after it
    replaces that one, or leaves it out where it is null."""
    found: dict[str, dict[str, Any]] = {}
    if EVERY in value:
        found = {name: {value[EVERY]: name} for name in _names_of(value[EVERY], where)}
    for label, changes in value.items():
        if not isinstance(label, str):
            raise SweepError(f"{where}: got the label {shown(label)}, expected a text: quote it.")
        if label == EVERY:
            continue
        if changes is None and label in found:
            del found[label]
            continue
        if not isinstance(changes, dict):
            raise SweepError(f"{where}.{label}: got {shown(changes)}, expected changes such as {{model.norm: bn}}.")
        found[label] = {}
        put(found[label], changes)
    if not found:
        raise SweepError(f"{where}: got no variant, expected one at least.")
    return found


def _chosen(axis: Axis, labels: list[Any], where: str) -> Axis:
    for label in labels:
        if label not in axis.points:
            raise unknown_name(where, label, axis.points)
    if not labels or len(set(labels)) < len(labels):
        raise SweepError(f"{where}: got {shown(labels)}, expected some of its labels, each once.")
    return Axis(axis.name, {label: axis.points[label] for label in labels})


def put(settings: dict[str, Any], changes: Mapping[Any, Any], prefix: str = "") -> None:
    """Add `changes`, nested keys as dotted ones; what is set as a whole replaces what was set within it."""
    for key, value in changes.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            put(settings, value, f"{name}.")
            continue
        for old in [old for old in settings if old == name or old.startswith(f"{name}.")]:
            del settings[old]
        settings[name] = value


def mapping(part: Mapping[str, Any], key: str, where: str = "") -> dict[str, Any]:
    value = part.get(key, {})
    if not isinstance(value, dict):
        raise SweepError(f"{where}: {key}: got {shown(value)}, expected keys with values.")
    return value


def short(axis: str) -> str:
    """The last part of a dotted key."""
    return axis.rsplit(".", 1)[-1]


def shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) < 80 else text[:77] + "..."
