"""Checkpoints: plain tensors and plain containers, sealed by a checksum (bnnfree.train.sealed).

Imports torch, bnnfree.errors, the recipe and its own room; the model builders are passed in.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bnnfree
from bnnfree.errors import CheckpointError
from bnnfree.recipe.resolve import Resolved, left_open, resolve
from bnnfree.recipe.schema import Recipe
from bnnfree.train.meaning import VERSION, check_state, upgrade
from bnnfree.train.networks import parse_recipe
from bnnfree.train.sealed import ForeignCheckpoint, read_state, write_state

KIND = "bnnfree checkpoint"
Builders = Mapping[str, Callable[..., nn.Module]]


def origin() -> dict[str, str]:
    """Versions and commit of what runs: bnnfree, torch, python, git (empty where this file is not tracked)."""
    here = Path(__file__).resolve()
    try:
        ask = ["git", "log", "-1", "--format=%H", "--", str(here)]
        tracked = subprocess.run(ask, cwd=here.parent, capture_output=True, text=True, timeout=10, check=False)
        head = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(head, cwd=here.parent, capture_output=True, text=True, timeout=10, check=False)
        known = commit.stdout.strip() if tracked.stdout.strip() else ""
    except (OSError, subprocess.SubprocessError):
        known = ""
    return {
        "bnnfree": bnnfree.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "git": known,
    }


def save_checkpoint(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, lists, dictionaries) in one step, with a checksum over all of it."""
    write_state(path, {"kind": KIND, **state, "version": VERSION})


def find_checkpoint(path: str | Path, prefer: str = "best.pt") -> Path:
    """The checkpoint file that `path` means: itself, or the preferred one of a run folder."""
    path = Path(path)
    if path.is_dir():
        names = [prefer, "best.pt", "last.pt"]
        for name in names:
            if (path / name).is_file():
                return path / name
        raise CheckpointError(
            f"run folder {path}: holds neither best.pt nor last.pt. Has tools/train.py run with --out {path}?"
        )
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path}: no such file or run folder.")
    return path


def load_checkpoint(path: str | Path, prefer: str = "best.pt") -> dict[str, Any]:
    """Read what `save_checkpoint` wrote. Errors: CheckpointError when it is missing, damaged, foreign or too new."""
    path = find_checkpoint(path, prefer)
    state, sealed = read_state(path)
    if not isinstance(state, dict) or state.get("kind") != KIND:
        found = sorted(map(str, state))[:4] if isinstance(state, dict) else type(state).__name__
        raise ForeignCheckpoint(f"checkpoint {path}: not written by bnnfree (it holds {str(found)[:120]}).")
    version = state.get("version")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"checkpoint {path}: version: got {str(version)[:40]!r}, expected a number from 1.")
    if version > VERSION:
        raise CheckpointError(f"checkpoint {path}: version {version}, this bnnfree reads up to {VERSION}.")
    if version > 1 and not sealed:
        raise CheckpointError(
            f"checkpoint {path}: damaged: its checksum is missing. Copy or download the file again; after a change of "
            "yours, write it with bnnfree.train.checkpoint.save_checkpoint."
        )
    return state


def open_checkpoint(path: str | Path, prefer: str = "best.pt", resume: bool = False) -> dict[str, Any]:
    """A checkpoint whose structure is checked, in the form of today: older versions are upgraded, their meaning kept.

    resume: also what a training goes on from. Errors: as `load_checkpoint`, and for a key that is missing or odd.
    """
    file = find_checkpoint(path, prefer)
    where = f"checkpoint {file}"
    state = load_checkpoint(file)
    check_state(state, where, resume)
    return upgrade(state, where)


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], where: str) -> None:
    """Put `weights` into `model`; any missing, unexpected or misshapen key is an error that names it."""
    check_fit(model, weights, where)
    model.load_state_dict(weights, strict=True)


def check_fit(model: nn.Module, weights: Mapping[str, torch.Tensor], where: str) -> None:
    """Errors: CheckpointError for keys that are missing, unexpected or of another shape."""
    own = model.state_dict()
    missing = [k for k in own if k not in weights]
    unexpected = [k for k in weights if k not in own]
    shapes = [
        f"{k} {list(weights[k].shape)} for {list(own[k].shape)}"
        for k in own
        if k in weights and weights[k].shape != own[k].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "other shape": shapes}
    found = [f"{len(v)} {k} ({', '.join(v[:3])}{', ...' if len(v) > 3 else ''})" for k, v in problems.items() if v]
    if found:
        raise CheckpointError(f"{where}: the weights do not fit the network: {'; '.join(found)}.")


def build_model(recipe: Recipe, builders: Builders, data: Mapping[str, Any], binarize: str | None = None) -> nn.Module:
    """The network of `recipe`, freshly initialised.

    `data`: classes (list of names), channels, image_size (H, W), as a checkpoint carries them.
    """
    options = resolve(recipe, data).model.model_dump(exclude={"name"})
    options["binarize"] = binarize or options["binarize"]
    return builders[recipe.model.name](len(data["classes"]), data["channels"], **options)


def check_network(state: Mapping[str, Any], builders: Builders, where: str) -> Resolved:
    """The recipe of a state of `open_checkpoint`, whose network can be built and takes its weights.

    Built without memory, of which a file of some bytes could claim any amount. Errors: CheckpointError, RecipeError.
    """
    written = parse_recipe(state["recipe"], where, builders)
    if found := left_open(written):
        raise CheckpointError(f"{where}: recipe: {found[0]}: got no value, expected one. It is damaged.")
    recipe = resolve(written, state["data"])
    try:
        with torch.device("meta"):
            model = build_model(recipe, builders, state["data"], state["binarize"])
    except (TypeError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
        reason = str(error).strip().split("\n")[0][:120]
        raise CheckpointError(f"{where}: its network cannot be built ({reason}).") from None
    for weights in (state["model"], state["ema"] or state["model"]):
        check_fit(model, weights, where)
    return recipe


def load_model(path: str | Path, builders: Builders) -> tuple[nn.Module, dict[str, Any]]:
    """The trained network of a checkpoint or run folder (its best), in eval mode, and the checkpoint itself."""
    state = open_checkpoint(path)
    where = f"checkpoint {path}"
    recipe = check_network(state, builders, where)
    model = build_model(recipe, builders, state["data"], state["binarize"])
    load_weights(model, state["ema"] or state["model"], where)
    return model.eval(), state
