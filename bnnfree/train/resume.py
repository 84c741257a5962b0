"""Going on with a run: what of its recipe may have changed, and what the user should know. Imports its own room."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bnnfree.errors import CheckpointError
from bnnfree.recipe.resolve import Resolved, left_open, resolve, values_of
from bnnfree.recipe.schema import Recipe
from bnnfree.train.checkpoint import Builders, check_network

PLACES = ("root", "test_root", "val_root", "cache", "cache_gb", "workers", "download")
MAY_CHANGE = (*(f"data.{key}" for key in PLACES), "device", "speed", "checkpoint_minutes")
"""Keys that a resumed run may be given anew: they say where, or how fast, and not what."""


def resume_recipe(
    state: Mapping[str, Any], recipe: Recipe, builders: Builders, data: Mapping[str, Any], folder: Path
) -> tuple[Resolved, bool]:
    """The recipe that the run of `state` goes on with, and whether its last stage has more epochs than it had.

    What the run's recipe left open, and `recipe` does too, stays as it was, whatever the normaliser says today.
    Errors: CheckpointError, with what differs, for another recipe or other data.
    """
    where = f"run folder {folder}"
    before = check_network(state, builders, where)  # keys that there were not when it was written have their defaults
    both = [key for key in left_open(recipe) if key in state["open"]]
    now = resolve(recipe, data, values_of(before, both) if recipe.model.norm == before.model.norm else None)
    changed = [each for each in _differences(before.model_dump(), now.model_dump()) if each[0] not in MAY_CHANGE]
    last = len(recipe.stages) - 1
    grown = [each for each in changed if each[0] == f"stages.{last}.epochs" and each[2] > each[1]]
    if others := [each for each in changed if each not in grown]:
        shown = "; ".join(f"{key} ({was!r} -> {now!r})" for key, was, now in others)
        fewer = [was for key, was, now in others if key == f"stages.{last}.epochs" and now < was]
        hint = f" More than {fewer[0]} epochs go on from there, fewer do not." if fewer else ""
        raise CheckpointError(
            f"{where}: was trained by another recipe; what differs (was -> now): {shown}.{hint} Its own recipe needs "
            f"no overrides: tools/train.py {folder} --resume. For another one choose another --out"
            f"{'' if recipe.init else f', with init={folder} to start from these weights'}."
        )
    if state["data"] != data:
        shown = "; ".join(_data_differences(state["data"], data))
        raise CheckpointError(
            f"{where}: was trained on other data; what differs: {shown}. Bring the data back as they were, "
            f"or train into another --out, with init={folder} to start from these weights."
        )
    if state["stage"] > last:
        raise CheckpointError(f"{where}: got stage {state['stage']} in last.pt, expected 0 to {last}.")
    return now, bool(grown)


def check_images(before: Mapping[str, list], now: Mapping[str, list], folder: Path) -> None:
    """Errors: CheckpointError where the images are not those that the run began with (see Data.listing)."""
    for part in [*before, *(name for name in now if name not in before)]:
        was, is_now = before.get(part, [0, ""]), now.get(part, [0, ""])
        if was != is_now:
            what = f"{was[0]} images, now {is_now[0]}" if was[0] != is_now[0] else f"{was[0]} images, now others"
            raise CheckpointError(
                f"run folder {folder}: was trained on other data: {part} had {what} (names, sizes or labels differ)."
                f" Bring the data back as they were, or train into another --out, with init={folder} to start from "
                "these weights."
            )


def _data_differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One text for each property of the data that is another; of classes the first that only one side has."""
    found = []
    for key in [*was, *(key for key in now if key not in was)]:
        before, after = was.get(key, []), now.get(key, [])
        if before == after:
            continue
        if key == "classes":
            apart = [name for name in before if name not in after] + [name for name in after if name not in before]
            names = f", such as {', '.join(map(repr, apart[:3]))}" if apart else ", in another order"
            found.append(f"classes ({len(before)} -> {len(after)}{names})")
        else:
            found.append(f"{key} ({_short(before)} -> {_short(after)})")
    return found


def _short(value: Any) -> str:
    return str([round(each, 4) for each in value] if isinstance(value, list) else value)


def other_bits(state: Mapping[str, Any]) -> list[str]:
    """Lines on what runs otherwise than before, by which a resumed run may not end in the bits of an unbroken one."""
    now = {"threads": torch.get_num_threads(), "torch": str(torch.__version__)}
    before = {"threads": state.get("threads", now["threads"]), "torch": state["origin"].get("torch", now["torch"])}
    return [
        f"{key}: {before[key]} -> {now[key]}: sums may be in another order, and bits differ from an unbroken run's"
        for key in now
        if now[key] != before[key]
    ]


def _differences(was: Any, now: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) wherever two plain trees differ."""
    if isinstance(was, dict) and isinstance(now, dict):
        names = [*was, *(name for name in now if name not in was)]
        found = [_differences(was.get(n), now.get(n), f"{key}.{n}" if key else n) for n in names]
        return [item for items in found for item in items]
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        found = [_differences(a, b, f"{key}.{i}") for i, (a, b) in enumerate(zip(was, now, strict=True))]
        return [item for items in found for item in items]
    return [] if was == now else [(key, was, now)]
