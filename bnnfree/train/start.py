"""Starting from weights: what `init` names, what a network takes of it, and what `freeze` keeps as it is.

Imports torch, bnnfree.errors, bnnfree.nn, bnnfree.optim and its own room; the model builders are passed in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnnfree.convert import published
from bnnfree.errors import BnnfreeError, CheckpointError, nearest, nearest_path
from bnnfree.nn import BinaryBlock
from bnnfree.optim import matching
from bnnfree.recipe.resolve import resolve
from bnnfree.shelf import ROOT
from bnnfree.train.checkpoint import Builders, build_model, load_weights, open_checkpoint, origin
from bnnfree.train.sealed import ForeignCheckpoint

PRETRAINED = ROOT / "models" / "pretrained"
WEIGHTS = Path("..", "..", "recipes", "weights")  # from there: what recipes start from
SHOWN = 4  # names of layers in a message
WEIGHTS_ONLY = ("kind", "recipe", "open", "binarize", "data", "origin", "best", "published")


@dataclass(frozen=True)
class Taken:
    """The weights that a network took of a checkpoint.

    tensors  names of what was taken
    new      layer -> reason why it starts anew
    unused   names that the network has no place for
    whole    layers of which nothing is missing, or empty where other parts of the network are 1 bit now: their
             constants, which come from data, hold
    """

    source: str
    tensors: list[str]
    new: dict[str, str]
    unused: list[str]
    whole: frozenset[str]

    def describe(self) -> list[str]:
        """One line for each kind: taken, new, unused."""
        lines = [f"init {self.source}: took {len(self.tensors)} tensors"]
        if self.new:
            shown = [f"{layer} ({reason})" for layer, reason in self.new.items()]
            lines.append(f"  new: {_some(shown)}")
        if self.unused:
            lines.append(f"  not used: {_some(self.unused)}")
        return lines

    def record(self) -> dict[str, Any]:
        """The record that a checkpoint and result.json keep."""
        return {"source": self.source, "taken": self.tensors, "new": self.new, "unused": self.unused}


def find_weights(init: str, what: str = "init") -> Path:
    """The file or run folder of `init`: a path, or a name in models/pretrained or recipes/weights; `what` it is called.

    Errors: CheckpointError, with the names.
    """
    path = Path(init)
    folders = (PRETRAINED, PRETRAINED / WEIGHTS)
    known = {each.stem: each for folder in folders for each in sorted(folder.glob("*.pt"))}
    packed = [path, PRETRAINED / f"{init}.bnnf"]
    if init not in known and any(file.suffix == ".bnnf" and file.is_file() for file in packed):
        raise CheckpointError(
            f"{what}: got {init!r}, which is a packed file: its weights are bits, which cannot be trained on. "
            f"Take the run folder or the checkpoint (.pt) that it was exported from{_or_one_of(known)}."
        )
    if path.exists():
        return path
    if init in known:
        return known[init]
    raise CheckpointError(
        f"{what}: got {init!r}, expected a checkpoint, a run folder, a published checkpoint or the name of a "
        f"pretrained one ({', '.join(known) or 'none is here'}).{nearest(init, known) or nearest_path(path)}"
    )


def _or_one_of(names: Iterable[str]) -> str:
    """The names of pretrained checkpoints, as the end of a sentence."""
    shown = ", ".join(names)
    return f", or a pretrained one ({shown})" if shown else ""


def open_weights(init: str, builders: Builders, what: str = "init", **options: Any) -> dict[str, Any]:
    """The checkpoint that `init` names; of another program's file what `convert_published` makes of it, with `options`.

    Errors: CheckpointError.
    """
    path = find_weights(init, what)
    try:
        return open_checkpoint(path)
    except ForeignCheckpoint:
        return convert_published(path, builders, **options)


def convert_published(
    path: str | Path,
    builders: Builders,
    *,
    variant: str | None = None,
    classes: Sequence[str] | None = None,
    image_size: int | None = None,
) -> dict[str, Any]:
    """A file of theirs as the state of a checkpoint of ours, for save_checkpoint; its key `published` says more.

    variant: a key of VARIANTS, needed where several have the same keys. classes: their names, in the order of
    the outputs (None: class0, class1, ...). image_size: side in pixels (None: 224, or 32 with 10 or 100 classes).
    Errors: CheckpointError for a file that fits no variant, or several; for another number of names.
    """
    where = f"published checkpoint {path}"
    theirs, decay = published.read_published(path)
    found = published.inspect(theirs, where)
    name = published.choose(found, variant, where, decay)
    written = published.recipe_of(found, name, image_size)
    names = [f"class{i}" for i in range(found.classes)] if classes is None else list(classes)
    if len(names) != found.classes:
        raise CheckpointError(f"{where}: got {len(names)} names of classes, expected {found.classes}.")
    mean, std = published.DATA[found.classes][1] if found.classes in published.DATA else published.IMAGENET
    size = [written.data.image_size] * 2
    data = {"classes": names, "channels": 3, "image_size": size, "mean": list(mean), "std": list(std)}
    recipe = resolve(written, data)
    model = build_model(recipe, builders, data)
    load_weights(model, published.translate(theirs, model, found.model, found.stored, where), where)
    return {
        "stage": 0,
        "epoch": 1,
        "step": 0,
        "model": model.state_dict(),
        "ema": None,
        "optimizers": [],
        "signs": {},
        "recipe": recipe.model_dump(),
        "open": [],
        "binarize": recipe.model.binarize,
        "data": data,
        "origin": origin(),
        "history": [],
        "best": {"top1": None, "epoch": 0},
        "seconds": 0.0,
        "published": {"variant": name, "file": Path(path).name},
    }


def take_weights(model: nn.Module, state: Mapping[str, Any], source: str, binarize: str) -> Taken:
    """Copy into `model` every tensor of the checkpoint `state` that fits by name and shape.

    A layer of which one tensor has another shape is new as a whole, as the head for other classes. What its design
    fixes (alpha, beta of blocks) stays. binarize: what is 1 bit in `model`.
    Errors: CheckpointError if no parameter fits.
    """
    weights: Mapping[str, Tensor] = state["ema"] or state["model"]
    own, fixed = model.state_dict(), _fixed(model)
    layers: dict[str, list[str]] = {}
    for name in own:
        if name not in fixed:
            layers.setdefault(name.rpartition(".")[0], []).append(name)
    tensors, new, whole = [], {}, set()
    for layer, names in layers.items():
        other = [name for name in names if name in weights and weights[name].shape != own[name].shape]
        found = [] if other else [name for name in names if name in weights]
        if other:
            new[layer] = f"{list(weights[other[0]].shape)} there, {list(own[other[0]].shape)} here"
        elif not found:
            new[layer] = "not there"
        elif len(found) == len(names):
            whole.add(layer)
        tensors += found
    unused = [name for name in weights if name not in own and name.rpartition(".")[0] not in new]
    parameters = {name for name, _ in model.named_parameters()}
    if not parameters.intersection(tensors):
        raise CheckpointError(
            f"init: {source}: no layer fits the network (its layers: {_some(list(new))}). "
            "Set model.name, model.width and model.stem as they are in the checkpoint (tools/summary.py shows them)."
        )
    with torch.no_grad():
        for name in tensors:
            own[name].copy_(weights[name])
    return Taken(source, tensors, new, unused, frozenset(whole if state["binarize"] == binarize else ()))


def _fixed(model: nn.Module) -> set[str]:
    """Names of buffers that the design of `model` gives, and no data."""
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, BinaryBlock):
            found |= {f"{name}.alpha"} | (set() if module.measured else {f"{name}.beta"})
    return found


def freeze(model: nn.Module, patterns: Iterable[str]) -> list[nn.Module]:
    """Leave the parameters that a pattern matches as they are, without gradient; the layers that are so as a whole.

    Patterns are those of a shell over full names: `stem.*`, `blocks.0.*`. Errors: BnnfreeError for one without a match,
    and where nothing is left to train.
    """
    parameters, patterns = dict(model.named_parameters()), list(patterns)
    for pattern in patterns:
        for name in matching(parameters, pattern, "freeze"):
            parameters[name].requires_grad_(False)
    if patterns and not any(each.requires_grad for each in parameters.values()):
        names = list(parameters)
        raise BnnfreeError(
            f"freeze: got {patterns}, which leaves nothing to train: all {len(names)} parameters match. "
            f"Leave some out, for example those of the last layer, {names[-1].rpartition('.')[0]}.*"
        )
    layers = [(module, list(module.parameters(recurse=False))) for module in model.modules()]
    return [module for module, own in layers if own and not any(each.requires_grad for each in own)]


def weights_only(state: Mapping[str, Any], half: bool = False) -> dict[str, Any]:
    """The weights of a checkpoint and what they mean, without what a training goes on from.

    half: tensors of two or more dimensions in bfloat16, which keeps every sign. Others are few, and stay as they are.
    """

    def smaller(tensor: Tensor) -> Tensor:
        return tensor.to(torch.bfloat16) if half and tensor.dim() > 1 and tensor.is_floating_point() else tensor

    weights = {name: smaller(tensor) for name, tensor in (state["ema"] or state["model"]).items()}
    return {**{key: state[key] for key in WEIGHTS_ONLY if key in state}, "model": weights, "ema": None}


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f", and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
