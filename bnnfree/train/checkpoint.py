"""Checkpoints: plain tensors and plain containers, opened with torch.load(weights_only=True).

Imports torch, bnnfree.errors, bnnfree.files and the recipe; the model builders are passed in.
"""

from __future__ import annotations

import pickle
import platform
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bnnfree
from bnnfree.errors import CheckpointError
from bnnfree.files import replacing
from bnnfree.train.recipe import Recipe
from bnnfree.train.recipes import parse_recipe

KIND = "bnnfree checkpoint"
VERSION = 1
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
    """Write `state` (tensors, numbers, strings, lists, dictionaries) in one step: whole or not at all."""
    with replacing(path) as temporary:
        torch.save({"kind": KIND, "version": VERSION, **state}, temporary)


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
    """What `save_checkpoint` wrote. Errors: CheckpointError when it is missing, torn, foreign or too new."""
    path = find_checkpoint(path, prefer)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        refused = isinstance(error, pickle.UnpicklingError)
        reason = "it holds more than tensors and plain values" if refused else str(error).strip().split("\n")[0][:120]
        raise CheckpointError(f"checkpoint {path}: not a checkpoint, or torn ({reason}).") from None
    if not isinstance(state, dict) or state.get("kind") != KIND:
        found = sorted(map(str, state))[:4] if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"checkpoint {path}: not written by bnnfree (it holds {found}).")
    if state["version"] > VERSION:
        raise CheckpointError(f"checkpoint {path}: version {state['version']}, this bnnfree reads up to {VERSION}.")
    return state


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], where: str) -> None:
    """Put `weights` into `model`; any missing, unexpected or misshapen key is an error that names it."""
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
    model.load_state_dict(weights, strict=True)


def build_model(recipe: Recipe, builders: Builders, data: Mapping[str, Any], binarize: str | None = None) -> nn.Module:
    """The network of `recipe`, freshly initialised.

    `data`: classes (list of names), channels, image_size (H, W), as a checkpoint carries them.
    """
    options = recipe.model.model_dump(exclude={"name", "start"})  # start: how training begins, not what is built
    if options["stem"] == "auto":
        options["stem"] = "imagenet" if min(data["image_size"]) > 64 else "cifar"
    options["binarize"] = binarize or options["binarize"]
    return builders[recipe.model.name](len(data["classes"]), data["channels"], **options)


def load_model(path: str | Path, builders: Builders) -> tuple[nn.Module, dict[str, Any]]:
    """The trained network of a checkpoint or run folder (its best), in eval mode, and the checkpoint itself."""
    state = load_checkpoint(path)
    where = f"checkpoint {path}"
    recipe = parse_recipe(state["recipe"], where, builders)
    model = build_model(recipe, builders, state["data"], state["binarize"])
    load_weights(model, state["ema"] or state["model"], where)
    return model.eval(), state
