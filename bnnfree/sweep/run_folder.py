"""Read finished and unfinished runs: one run, one sweep point (all its seeds), or a whole sweep.

Imports its own room.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bnnfree.errors import BnnfreeError
from bnnfree.recipe.read import load_recipe
from bnnfree.recipe.resolve import reopened
from bnnfree.recipe.schema import Recipe
from bnnfree.train.resume import MAY_CHANGE

FAILURE = "failure.json"
SWEEP = "sweep.json"
CURVES = ("val_top1", "top1", "val_loss", "loss")

State = Literal["new", "interrupted", "done", "diverged", "failed"]


class OutcomeError(BnnfreeError):
    """A folder that holds no run, a damaged one, or another run than it should."""


@dataclass(frozen=True)
class Outcome:
    """One run. Of a diverged one (loss not finite) and of a failed one `error` says what happened.

    Accuracies in percent, of the best epoch by validation; curves: metric -> its value at each epoch.
    """

    state: State
    result: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    folder: Path = Path()

    @property
    def over(self) -> bool:
        """There is nothing left to do: a divergence is a result."""
        return self.state in ("done", "diverged")

    def figure(self, name: str) -> float | None:
        """test_top1 | val_top1 | test_loss | best_epoch | minutes, of a run that is done."""
        value = self.result.get("seconds" if name == "minutes" else name) if self.state == "done" else None
        if not isinstance(value, int | float):
            return None
        return value / 60 if name == "minutes" else float(value)


def read_run(folder: str | Path, expected: Recipe | None = None) -> Outcome:
    """Read the run in `folder`; a folder that is missing or empty is a new run.

    Errors: OutcomeError where it holds another recipe's run than `expected`, with what differs, or a damaged file.
    """
    folder = Path(folder)
    saved = folder / "recipe.yaml"
    recipe: dict[str, Any] = {}
    if saved.is_file():
        recipe = reopened(load_recipe(saved)).model_dump()
        if expected is not None and (found := _differences(recipe, expected)):
            shown = "; ".join(f"{key} ({was!r}, now {now!r})" for key, (was, now) in list(found.items())[:4])
            raise OutcomeError(
                f"run folder {folder}: holds the run of another recipe: {shown}. Choose another --out, or delete it."
            )
    curves = _curves(folder / "metrics.jsonl")
    if (folder / "result.json").is_file():
        result = _json(folder / "result.json")
        loss = result.get("test_loss", 0.0)
        if not isinstance(loss, int | float):
            raise OutcomeError(f"{folder / 'result.json'}: test_loss: got {loss!r}, expected a number.")
        if not math.isfinite(loss):
            return Outcome("diverged", result, "the loss on the test images is not finite", recipe, curves, folder)
        return Outcome("done", result, "", recipe, curves, folder)
    if (folder / FAILURE).is_file():
        failure = _json(folder / FAILURE)
        state: State = "diverged" if failure.get("diverged") and recipe else "failed"
        return Outcome(state, {}, str(failure.get("error", "")), recipe, curves, folder)
    return Outcome("interrupted" if (folder / "last.pt").is_file() else "new", {}, "", recipe, curves, folder)


def _differences(recipe: dict[str, Any], expected: Recipe) -> dict[str, list[Any]]:
    """Differences from the recipe of a run, key by key; a stem that is left to the images is that of the run."""
    now = reopened(expected).model_dump()
    if now["model"]["stem"] == "auto":
        now["model"]["stem"] = recipe["model"]["stem"]
    return differing([recipe, now])


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OutcomeError(f"{path}: cannot be read ({error}).") from None
    if not isinstance(value, dict):
        raise OutcomeError(f"{path}: got {type(value).__name__}, expected an object.")
    return value


def _curves(path: Path) -> dict[str, list[float]]:
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise OutcomeError(f"{path}: cannot be read ({error}).") from None
    if not all(isinstance(line, dict) for line in lines):
        raise OutcomeError(f"{path}: got a line that is no object, expected the metrics of an epoch in each.")
    return {key: [line[key] for line in lines] for key in CURVES if lines and all(key in line for line in lines)}


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; a list of sections by number."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        sections = isinstance(value, list) and value and isinstance(value[0], dict)
        items = {str(number): item for number, item in enumerate(value)} if sections else value
        if isinstance(items, dict) and items:
            found |= flat(items, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def differing(recipes: list[dict[str, Any]], ignore: Iterable[str] = MAY_CHANGE) -> dict[str, list[Any]]:
    """Dotted key -> its value in each recipe, for the keys that are not the same in all; a missing one is None."""
    flats = [flat(recipe) for recipe in recipes]
    keys = dict.fromkeys(key for each in flats for key in each)
    values = {key: [each.get(key) for each in flats] for key in keys if key not in set(ignore)}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


@dataclass(frozen=True)
class Entry:
    """One row of a table: a name, its point of the grid if it has one, and its runs (one per seed)."""

    name: str
    outcomes: list[Outcome]
    point: dict[str, str] = field(default_factory=dict)

    def mean(self, figure: str) -> float | None:
        values = self.values(figure)
        return statistics.fmean(values) if values else None

    def deviation(self, figure: str) -> float | None:
        """Sample standard deviation over seeds (n - 1); None of fewer than two."""
        values = self.values(figure)
        return statistics.stdev(values) if len(values) > 1 else None

    def values(self, figure: str) -> list[float]:
        return [value for run in self.outcomes if (value := run.figure(figure)) is not None]

    def count(self, state: State) -> int:
        return sum(run.state == state for run in self.outcomes)

    @property
    def runs(self) -> str:
        """Count of the runs behind the means, and the states of the others: `2 of 3, 1 diverged`."""
        done, all_ = self.count("done"), len(self.outcomes)
        parts = [str(done) if done == all_ else f"{done} of {all_}"]
        parts += [f"{n} {state}" for state in ("diverged", "failed") if (n := self.count(state))]  # type: ignore[arg-type]
        return ", ".join(parts)

    def curve(self, metric: str) -> list[float]:
        """Mean over runs at each epoch that all of those begun have reached."""
        found = [run.curves[metric] for run in self.outcomes if metric in run.curves]
        return [statistics.fmean(values) for values in zip(*found, strict=False)] if found else []


def entries_of(plan: list[tuple[dict[str, str], Outcome]], name: Callable[[dict[str, str]], str]) -> list[Entry]:
    """An Entry per point of the grid, of (point, outcome) pairs in any order."""
    groups: dict[tuple[str, ...], Entry] = {}
    for point, outcome in plan:
        key = tuple(point.values())
        groups.setdefault(key, Entry(name(point), [], point)).outcomes.append(outcome)
    return list(groups.values())


def read_plan(folder: str | Path) -> list[tuple[dict[str, str], Outcome]]:
    """(point of the grid, what became of it) for each run of a sweep's folder. Errors: OutcomeError."""
    path = Path(folder) / SWEEP
    plan = _json(path)
    try:
        return [(dict(run["point"]), read_run(path.parent / run["folder"])) for run in plan["runs"]]
    except (KeyError, TypeError, ValueError):
        raise OutcomeError(f"{path}: is not what tools/sweep.py writes.") from None
