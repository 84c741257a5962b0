"""A sweep file as the runs that it stands for: a base recipe, a grid over its keys, seeds, sizes.

    recipe: ../cifar10_reactnet20.yaml      # beside this file
    set: {data.augment: [flip], accumulate: = gradient_batch / data.batch_size}
    constants: {gradient_batch: 128}        # names for formulas
    grid:
      norm:                                 # variants: label -> changes; every: one for each name of a table
        every: model.norm
        bn: {model.norm: bn, optimizer.lr: 2e-3}
      data.batch_size: [1, 2, 128]          # values of a recipe key
    seeds: [0, 1, 2]
    scale: cpu
    scales:                                 # each may have set, constants, grid, seeds and about
      cpu: {set: {model.width: 0.5}, grid: {norm: [free, bn], data.batch_size: [2, 128]}, seeds: 1}
    plot: {x: data.batch_size}

Later wins: recipe, set, the scale's set, the point of the grid, key=value of the command line, the seed. A value that
begins with = is computed at the end from constants and other keys (bnnfree.train.expression).

Imports yaml (through recipes), bnnfree.nn and optim for their tables of names, and its own room.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bnnfree.errors import BnnfreeError, nearest, unknown_name
from bnnfree.nn import BETA_MODES, NORMS, SCALES, STES
from bnnfree.optim import OPTIMIZERS
from bnnfree.train.expression import compute, is_expression
from bnnfree.train.outcome import flat
from bnnfree.train.recipe import Recipe
from bnnfree.train.recipes import RecipeError, load_recipe, parse_yaml, read_tree

KEYS = ("recipe", "set", "constants", "grid", "seeds", "scale", "scales", "plot")
LEVEL_KEYS = ("about", "set", "constants", "grid", "seeds")
EVERY = "every"
TABLES: dict[str, Iterable[str]] = {
    "model.norm": NORMS,
    "model.scale": SCALES,
    "model.ste": STES,
    "model.beta": BETA_MODES,
    "optimizer.name": OPTIMIZERS,
}
MOST = 20_000  # runs of one sweep


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


@dataclass(frozen=True)
class Planned:
    """One run: where in the grid, its seed, what it changes in the base recipe, and the recipe that results."""

    point: dict[str, str]
    seed: int
    overrides: list[str]
    recipe: Recipe
    folder: str

    @property
    def name(self) -> str:
        return self.folder.replace(",", ", ")

    @property
    def weight(self) -> float:
        """Its duration, in arbitrary units: a forward pass takes about as long as 16 samples more."""
        data = self.recipe.data
        samples = sum(stage.epochs for stage in self.recipe.stages) * (data.train_limit or 1)
        return samples * (1 + 16 / data.batch_size)


@dataclass(frozen=True)
class Sweep:
    """All runs of a sweep file at one scale. `runs` goes seed by seed, so that a whole grid is there early."""

    path: Path
    base: Path
    scale: str | None
    about: str
    axes: list[Axis]
    seeds: list[int]
    x: str | None
    runs: list[Planned] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.stem + (f"_{self.scale}" if self.scale else "")


def read_sweep(path: str | Path, overrides: Iterable[str] = (), models: Iterable[str] | None = None) -> Sweep:
    """The sweep in `path`; `overrides` (key=value) change its own keys (scale=gpu, seeds=3, grid.norm=[free, bn],
    constants.epochs=2) or, all others, every run's recipe.

    Errors: SweepError, RecipeError: named by file, axis or run, key, with what is allowed and the nearest name.
    """
    path = Path(path)
    where = f"sweep {path}"
    tree = read_tree(path, where, "recipe, grid, seeds")
    own, forced = _split(overrides, where)
    _known(tree, KEYS, where)
    scale = own.get("scale", tree.get("scale"))
    level = _level(tree, scale, where)
    parts: list[Mapping[str, Any]] = [tree, level, own]
    for part, name in zip(parts, (where, f"{where}: scales.{scale}", "command line"), strict=True):
        _check_types(part, name)
    constants = {k: v for part in parts for k, v in _mapping(part, "constants").items()}
    settings: dict[str, Any] = {}
    for part in parts:
        _put(settings, _mapping(part, "set"))
    axes = _axes(parts, where)
    seeds = _seeds(next(part["seeds"] for part in (own, level, tree, {"seeds": 1}) if "seeds" in part), where)
    base = own.get("recipe", tree.get("recipe"))
    if not isinstance(base, str):
        raise SweepError(f"{where}: recipe: got {_shown(base)}, expected the path of a recipe from this file's folder.")
    x = _x({**_mapping(tree, "plot"), **_mapping(own, "plot")}, axes, where)
    about = str(level.get("about", ""))
    base_path = Path(os.path.normpath(path.parent / base))
    sweep = Sweep(path, base_path, scale, " ".join(about.split()), axes, seeds, x)
    _check_forced(forced, sweep, where)
    _plan(sweep, settings, constants, forced, models)
    return sweep


# -- the file


def _split(overrides: Iterable[str], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(changes to the sweep's own keys, changes to every recipe) of the command line."""
    own: dict[str, Any] = {}
    forced: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        try:
            value = parse_yaml(text)
        except RecipeError:
            equals = ""
        if not equals or not key:
            raise SweepError(f"override {override!r}: expected key=value, for example scale=gpu or model.width=0.5.")
        head, dot, rest = key.partition(".")
        if head not in KEYS or head == "scales":
            _put(forced, {key: value})
        elif dot and head in ("set", "constants", "grid", "plot"):
            own.setdefault(head, {})[rest] = value
        elif not dot:
            own[head] = value
        else:
            raise SweepError(f"override {override!r}: {head} has no keys.")
    return own, forced


def _known(tree: Mapping[str, Any], allowed: Iterable[str], where: str) -> None:
    for key in tree:
        if key not in allowed:
            names = ", ".join(allowed)
            raise SweepError(f"{where}: {_shown(key)}: unknown key.{nearest(str(key), allowed)} Allowed here: {names}.")


def _level(tree: Mapping[str, Any], scale: Any, where: str) -> dict[str, Any]:
    scales = tree.get("scales", {})
    if not isinstance(scales, dict):
        raise SweepError(f"{where}: scales: got {_shown(scales)}, expected a name with its settings for each.")
    if scale is None and not scales:
        return {}
    if not isinstance(scale, str) or scale not in scales:
        raise unknown_name(f"{where}: scale", scale, scales)
    level = scales[scale]
    if not isinstance(level, dict):
        raise SweepError(f"{where}: scales.{scale}: got {_shown(level)}, expected {', '.join(LEVEL_KEYS)}.")
    _known(level, LEVEL_KEYS, f"{where}: scales.{scale}")
    return level


def _check_types(part: Mapping[str, Any], where: str) -> None:
    """set, constants, grid and plot are keys with values, their names texts; a constant is a number."""
    for key in ("set", "constants", "grid", "plot"):
        for name, value in _mapping(part, key, where).items():
            if not isinstance(name, str):
                hint = " Quote a word such as on, off, yes, no." if isinstance(name, bool) else ""
                raise SweepError(f"{where}: {key}: got the key {_shown(name)}, expected a text.{hint}")
            if key == "constants" and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise SweepError(f"{where}: constants.{name}: got {_shown(value)}, expected a number.")


def _mapping(part: Mapping[str, Any], key: str, where: str = "") -> dict[str, Any]:
    value = part.get(key, {})
    if not isinstance(value, dict):
        raise SweepError(f"{where}: {key}: got {_shown(value)}, expected keys with values.")
    return value


def _seeds(value: Any, where: str) -> list[int]:
    seeds = list(range(value)) if type(value) is int and 0 < value <= MOST else value
    if not isinstance(seeds, list) or not seeds or any(type(seed) is not int or seed < 0 for seed in seeds):
        raise SweepError(f"{where}: seeds: got {_shown(value)}, expected a list of whole numbers, or how many.")
    if len(set(seeds)) < len(seeds):
        raise SweepError(f"{where}: seeds: got {_shown(value)}, expected each once.")
    return seeds


def _x(plot: Mapping[str, Any], axes: list[Axis], where: str) -> str | None:
    _known(plot, ("x",), f"{where}: plot")
    names = [axis.name for axis in axes]
    if plot.get("x") is not None and plot["x"] not in names:
        raise unknown_name(f"{where}: plot.x", plot["x"], names)
    return plot.get("x")


# -- the grid


def _axes(parts: list[Mapping[str, Any]], where: str) -> list[Axis]:
    """The axes of the file; the scale and the command line may give other values, or choose among variants."""
    tree, level, own = (_mapping(part, "grid") for part in parts)
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
    if not axes:
        raise SweepError(f"{where}: grid: got no axis, expected one at least, such as data.batch_size: [2, 128].")
    return list(axes.values())


def _axis(name: str, value: Any, where: str) -> Axis:
    if value == EVERY:
        value = _names_of(name, where)
    if isinstance(value, dict):
        return Axis(name, _variants(value, where))
    if not isinstance(value, list) or not value:
        raise SweepError(f"{where}: got {_shown(value)}, expected a list of values, or variants: label and changes.")
    points: dict[str, dict[str, Any]] = {}
    for item in value:
        label = item if isinstance(item, str) else json.dumps(item, default=_shown)
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
            raise SweepError(f"{where}: got the label {_shown(label)}, expected a text: quote it.")
        if label == EVERY:
            continue
        if changes is None and label in found:
            del found[label]
            continue
        if not isinstance(changes, dict):
            raise SweepError(f"{where}.{label}: got {_shown(changes)}, expected changes such as {{model.norm: bn}}.")
        found[label] = {}
        _put(found[label], changes)
    if not found:
        raise SweepError(f"{where}: got no variant, expected one at least.")
    return found


def _chosen(axis: Axis, labels: list[Any], where: str) -> Axis:
    for label in labels:
        if label not in axis.points:
            raise unknown_name(where, label, axis.points)
    if not labels or len(set(labels)) < len(labels):
        raise SweepError(f"{where}: got {_shown(labels)}, expected some of its labels, each once.")
    return Axis(axis.name, {label: axis.points[label] for label in labels})


def _put(settings: dict[str, Any], changes: Mapping[Any, Any], prefix: str = "") -> None:
    """Add `changes`, nested keys as dotted ones; what is set as a whole replaces what was set within it."""
    for key, value in changes.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            _put(settings, value, f"{name}.")
            continue
        for old in [old for old in settings if old == name or old.startswith(f"{name}.")]:
            del settings[old]
        settings[name] = value


# -- the runs


def _check_forced(forced: Mapping[str, Any], sweep: Sweep, where: str) -> None:
    for axis in sweep.axes:
        if axis.key in forced:
            raise SweepError(f"{where}: {axis.key} is an axis of the grid. Use grid.{axis.key}=[...].")
    if "seed" in forced or any(axis.key == "seed" for axis in sweep.axes):
        raise SweepError(f"{where}: seed is set by seeds. Use seeds=[...].")


def _plan(sweep: Sweep, settings: dict[str, Any], constants: dict[str, Any], forced: dict[str, Any], models) -> None:
    where = f"sweep {sweep.path}"
    count = math.prod(len(axis.points) for axis in sweep.axes) * len(sweep.seeds)
    if count > MOST:
        raise SweepError(f"{where}: got {count} runs, expected up to {MOST}.")
    names = flat(load_recipe(sweep.base, (), models).model_dump())
    combinations = list(itertools.product(*(axis.points for axis in sweep.axes)))
    seen: dict[str, str] = {}
    for labels in combinations:
        point = {axis.name: label for axis, label in zip(sweep.axes, labels, strict=True)}
        here = f"{where}: {', '.join(f'{axis}={label}' for axis, label in point.items())}"
        changes = dict(settings)
        _put(changes, _merged(sweep.axes, point, here))
        _put(changes, forced)
        known = {**names, **{k: v for k, v in changes.items() if not is_expression(v)}, **constants}
        changes = {key: _computed(value, known, f"{here}: {key}") for key, value in changes.items()}
        texts = [f"{key}={_text(value, f'{here}: {key}')}" for key, value in changes.items()]
        try:
            recipe = load_recipe(sweep.base, texts, models)
        except RecipeError as error:
            raise RecipeError(f"{here}: {error}") from None
        same = json.dumps(recipe.model_dump(), sort_keys=True)
        if same in seen:
            raise SweepError(f"{here}: is the same recipe as {seen[same]}. Leave one out.")
        seen[same] = ", ".join(labels)
        for seed in sweep.seeds:
            seeded = recipe.model_copy(update={"seed": seed})
            sweep.runs.append(Planned(point, seed, [*texts, f"seed={seed}"], seeded, _folder(point, seed)))
    sweep.runs.sort(key=lambda run: sweep.seeds.index(run.seed))  # stable: the grid's order within a seed
    folders = {run.folder for run in sweep.runs}
    if len(folders) < len(sweep.runs):
        raise SweepError(f"{where}: two points of the grid would have one folder. Give variants other labels.")


def _merged(axes: list[Axis], point: Mapping[str, str], here: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for axis in axes:
        for key, value in axis.points[point[axis.name]].items():
            if key in found:
                raise SweepError(f"{here}: {key} is set by two axes.")
            found[key] = value
    return found


def _computed(value: Any, names: Mapping[str, Any], where: str) -> Any:
    if isinstance(value, list):
        return [_computed(item, names, where) for item in value]
    if isinstance(value, dict):
        return {key: _computed(item, names, where) for key, item in value.items()}
    return compute(value, names, where) if is_expression(value) else value


def _text(value: Any, where: str) -> str:
    """A value as key=value takes it: a plain word, or JSON, which YAML reads."""
    if isinstance(value, str) and re.fullmatch(r"[\w./+-]+", value) and parse_yaml(value) == value:
        return value
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise SweepError(f"{where}: got {_shown(value)}, expected texts, finite numbers, lists, true, false.") from None


def _folder(point: Mapping[str, str], seed: int) -> str:
    parts = [f"{short(axis)}={label}" for axis, label in point.items()]
    return ",".join(re.sub(r"[^\w.+=-]+", "_", part) for part in [*parts, f"seed={seed}"])


def short(axis: str) -> str:
    """The last part of a dotted key."""
    return axis.rsplit(".", 1)[-1]


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) < 80 else text[:77] + "..."
