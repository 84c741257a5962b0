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

Later wins: recipe, set, the scale's set, the point of the grid, key=value of the command line, the seed. What is set
for all runs goes to those that read it, one at least; what a point sets it must read. A value that begins with = is
computed at the end from constants and other keys (bnnfree.sweep.formula).

Imports yaml (through recipes) and its own room.
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

from bnnfree.errors import nearest, unknown_name
from bnnfree.recipe.read import RecipeError
from bnnfree.recipe.resolve import completed
from bnnfree.recipe.schema import Recipe
from bnnfree.recipe.tree import parse_yaml, read_tree
from bnnfree.sweep.formula import compute, is_expression
from bnnfree.sweep.grid import Axis, SweepError, mapping, put, read_axes, short, shown
from bnnfree.sweep.run_folder import flat
from bnnfree.train.networks import load_fitting, load_recipe

KEYS = ("recipe", "set", "constants", "grid", "seeds", "scale", "scales", "plot")
LEVEL_KEYS = ("about", "set", "constants", "grid", "seeds")
MOST = 20_000  # runs of one sweep
LONGEST = 200  # bytes of a run folder's name: file systems take 255


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
    constants = {k: v for part in parts for k, v in mapping(part, "constants").items()}
    settings: dict[str, Any] = {}
    for part in parts:
        put(settings, mapping(part, "set"))
    axes = read_axes(parts, where)
    seeds = _seeds(next(part["seeds"] for part in (own, level, tree, {"seeds": 1}) if "seeds" in part), where)
    base = own.get("recipe", tree.get("recipe"))
    if not isinstance(base, str):
        raise SweepError(f"{where}: recipe: got {shown(base)}, expected the path of a recipe from this file's folder.")
    x = _x({**mapping(tree, "plot"), **mapping(own, "plot")}, axes, where)
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
            put(forced, {key: value})
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
            raise SweepError(f"{where}: {shown(key)}: unknown key.{nearest(str(key), allowed)} Allowed here: {names}.")


def _level(tree: Mapping[str, Any], scale: Any, where: str) -> dict[str, Any]:
    scales = tree.get("scales", {})
    if not isinstance(scales, dict):
        raise SweepError(f"{where}: scales: got {shown(scales)}, expected a name with its settings for each.")
    if scale is None and not scales:
        return {}
    if not isinstance(scale, str) or scale not in scales:
        raise unknown_name(f"{where}: scale", scale, scales)
    level = scales[scale]
    if not isinstance(level, dict):
        raise SweepError(f"{where}: scales.{scale}: got {shown(level)}, expected {', '.join(LEVEL_KEYS)}.")
    _known(level, LEVEL_KEYS, f"{where}: scales.{scale}")
    return level


def _check_types(part: Mapping[str, Any], where: str) -> None:
    """set, constants, grid and plot are keys with values, their names texts; a constant is a number."""
    for key in ("set", "constants", "grid", "plot"):
        for name, value in mapping(part, key, where).items():
            if not isinstance(name, str):
                hint = " Quote a word such as on, off, yes, no." if isinstance(name, bool) else ""
                raise SweepError(f"{where}: {key}: got the key {shown(name)}, expected a text.{hint}")
            if key == "constants" and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise SweepError(f"{where}: constants.{name}: got {shown(value)}, expected a number.")


def _seeds(value: Any, where: str) -> list[int]:
    seeds = list(range(value)) if type(value) is int and 0 < value <= MOST else value
    if not isinstance(seeds, list) or not seeds or any(type(seed) is not int or seed < 0 for seed in seeds):
        raise SweepError(f"{where}: seeds: got {shown(value)}, expected a list of whole numbers, or how many.")
    if len(set(seeds)) < len(seeds):
        raise SweepError(f"{where}: seeds: got {shown(value)}, expected each once.")
    return seeds


def _x(plot: Mapping[str, Any], axes: list[Axis], where: str) -> str | None:
    _known(plot, ("x",), f"{where}: plot")
    names = [axis.name for axis in axes]
    if plot.get("x") is not None and plot["x"] not in names:
        raise unknown_name(f"{where}: plot.x", plot["x"], names)
    return plot.get("x")


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
    names = flat(completed(load_recipe(sweep.base, (), models)).model_dump())
    combinations = list(itertools.product(*(axis.points for axis in sweep.axes)))
    seen: dict[str, str] = {}
    idle: dict[str, str] = {}  # keys for all runs that no run so far reads
    for number, labels in enumerate(combinations):
        point = {axis.name: label for axis, label in zip(sweep.axes, labels, strict=True)}
        here = f"{where}: {', '.join(f'{axis}={label}' for axis, label in point.items())}"
        changes, own = dict(settings), _merged(sweep.axes, point, here)
        put(changes, own)
        put(changes, forced)
        if "seed" in changes:
            raise SweepError(f"{here}: seed is set by seeds. Use seeds=[...].")
        known = _Names({**names, **constants}, changes, constants, here)
        changes = {key: known.computed(key) for key in changes}
        texts = {key: f"{key}={_text(value, f'{here}: {key}')}" for key, value in changes.items()}
        try:
            recipe, left = load_fitting(sweep.base, texts, changes.keys() - own.keys(), models)
        except RecipeError as error:
            raise RecipeError(*(f"{here}: {line}" for line in error.args)) from None
        same = json.dumps(completed(recipe).model_dump(), sort_keys=True)
        if same in seen:
            raise SweepError(f"{here}: is the same recipe as {seen[same]}. Leave one out.")
        seen[same] = ", ".join(labels)
        idle = {key: said for key, said in left.items() if key in idle or not number}
        chosen = [text for key, text in texts.items() if key not in left]
        for seed in sweep.seeds:
            seeded = recipe.model_copy(update={"seed": seed})
            sweep.runs.append(Planned(point, seed, [*chosen, f"seed={seed}"], seeded, _folder(point, seed)))
    for said in idle.values():
        raise RecipeError(f"{where}: in every run, {said}")
    sweep.runs.sort(key=lambda run: sweep.seeds.index(run.seed))  # stable: the grid's order within a seed
    if long := next((run.folder for run in sweep.runs if len(run.folder.encode()) > LONGEST), None):
        raise SweepError(f"{where}: the folder {long[:60]}... would have a name of more than {LONGEST} bytes. "
                         "Give variants shorter labels.")  # fmt: skip
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


class _Names(Mapping[str, Any]):
    """Names that formulas may use: constants, changed keys (computed when asked for), keys of the base recipe."""

    def __init__(self, known: Mapping[str, Any], changes: Mapping[str, Any], constants: Iterable[str], where: str):
        self.known, self.where = known, where
        self.changes = {key: value for key, value in changes.items()}
        self.constants = set(constants)
        self.busy: list[str] = []
        self.results: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        changed = name in self.changes and name not in self.constants
        return self.computed(name) if changed else self.known[name]

    def __iter__(self):
        return iter({**self.known, **self.changes})

    def __len__(self) -> int:
        return len({**self.known, **self.changes})

    def computed(self, key: str) -> Any:
        """The changed value of `key`, its formulas computed. Errors: SweepError of one that needs itself."""
        if key in self.results:
            return self.results[key]
        if key in self.busy:
            raise SweepError(f"{self.where}: {' needs '.join([*self.busy, key])}: expected formulas without a circle.")
        self.busy.append(key)
        value = self.results[key] = self._value(self.changes[key], f"{self.where}: {key}")
        self.busy.pop()
        return value

    def _value(self, value: Any, where: str) -> Any:
        if isinstance(value, list):
            return [self._value(item, where) for item in value]
        if isinstance(value, dict):
            return {key: self._value(item, where) for key, item in value.items()}
        return compute(value, self, where) if is_expression(value) else value


def _text(value: Any, where: str) -> str:
    """A value as key=value takes it: a plain word, or JSON, which YAML reads."""
    if isinstance(value, str) and re.fullmatch(r"[\w./+-]+", value) and parse_yaml(value) == value:
        return value
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise SweepError(f"{where}: got {shown(value)}, expected texts, finite numbers, lists, true, false.") from None


def _folder(point: Mapping[str, str], seed: int) -> str:
    parts = [f"{short(axis)}={label}" for axis, label in point.items()]
    return ",".join(re.sub(r"[^\w.+=-]+", "_", part) for part in [*parts, f"seed={seed}"])
