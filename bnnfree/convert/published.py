"""Checkpoints of two published repositories, read into networks of ours that compute the same function.

ReActNet (liuzechun/ReActNet, Liu et al. 2020) and BNN_NoBN (VITA-Group/BNN_NoBN, Chen et al. 2021, "BNN - BN
= ?"). VARIANTS names their networks by the file that defines each; UNITS and WHOLE say which tensor is which.
To add a variant: a line of VARIANTS; an architecture: an entry of WHOLE and NARROW, a column of UNITS.

What a file cannot tell
    Keys and shapes show architecture, normaliser, classes, width and the stem of the ResNet shape. Whether the
    weights are 1 bit they show only where they are stored flat (`weights` [n, 1]): all else holds the same keys
    in both stages, and with batch norm in both repositories. `variant` then has to say it; a file that kept its
    optimiser has a hint, for the published scripts decay weights by 1e-5 in the first stage and by 0 in the
    second. Nor are alpha and beta in a file: 0.2, and beta as the code has it, our mode "ref".

What is the same, and how
    bn      norm bn, standardize false, scale mean_abs: plain weights, binary ones sized by mean|W|, eps 1e-5
    bf      norm free_paper, beta ref: weights standardised with eps 1e-5 added to the deviation, then 1 bit
            sized by their mean size, then the gain; alpha on the branch alone; beta x into the sign and into
            the shortcut of a transition, x itself into any other
    none    norm none: as bn without its layers
    shapes  a doubling of ReActNet-A: two 1x1 convolutions and norms become one of twice the outputs; both
            norms count the same batches. The shortcuts' 1x1 convolution is 1 bit in the second stage of
            BNN_NoBN and stays real in ReActNet (`shortcut`).

What is not
    sign(0)  is 0 in theirs, for activations and for weights, and +1 in ours: a bit has no third state.
             It matters where a sum or a weight is 0 exactly.
    sides    that do not halve evenly: theirs stop with an error, ours pool the rest (ceil).
    stem     theirs always has stride 2 in ReActNet-A, and in the ResNet shape unless its kernel is 3x3, for
             small images too (32 pixels shrink to one): ours is then `stem: imagenet`, whatever the size.
    training goes on with our estimators and schedules (`ste_window: fixed` is theirs), not with their optimiser.
    34       layers (birealnet34) have no counterpart here; such a file is refused.

Imports torch, bnnfree.errors, the recipe and the data sets' statistics. bnnfree.train.start makes checkpoints of what
is read here (`convert_published`).
"""

from __future__ import annotations

import pickle
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnnfree.data.datasets import CIFAR10, CIFAR100, IMAGENET, KNOWN
from bnnfree.errors import CheckpointError, pick
from bnnfree.recipe.read import parse_recipe
from bnnfree.recipe.schema import Recipe


@dataclass(frozen=True)
class Variant:
    """A network of theirs.

    model     our name of its architecture
    norm      a key of SETTINGS
    binarize  what is 1 bit: "activations" in the first stage, "both" in the second
    shortcut  the 1x1 shortcut convolutions of a network of binary weights: "real" | "binary"
    stored    forms of the block convolutions' weights: "weight" [O, I, k, k] | "weights" [n, 1]
    """

    model: str
    norm: str
    binarize: str
    shortcut: str = "binary"
    stored: tuple[str, ...] = ("weight",)


VARIANTS = {
    "ReActNet/mobilenet/1_step1": Variant("reactnet_a", "bn", "activations"),
    "ReActNet/mobilenet/2_step2": Variant("reactnet_a", "bn", "both", stored=("weights",)),
    "ReActNet/resnet/1_step1": Variant("reactnet18", "bn", "activations", "real"),
    # Why both: its code stores them whole, and says that it once stored them flat
    "ReActNet/resnet/2_step2": Variant("reactnet18", "bn", "both", "real", ("weight", "weights")),
    "BNN_NoBN/Qa_reactnet_A_bf": Variant("reactnet_a", "bf", "activations"),
    "BNN_NoBN/Qa_reactnet_A_bn": Variant("reactnet_a", "bn", "activations"),
    "BNN_NoBN/Qa_reactnet_A_none": Variant("reactnet_a", "none", "activations"),
    "BNN_NoBN/Qaw_reactnet_A_bf": Variant("reactnet_a", "bf", "both"),
    "BNN_NoBN/Qaw_reactnet_A_bn": Variant("reactnet_a", "bn", "both"),
    "BNN_NoBN/Qaw_reactnet_A_none": Variant("reactnet_a", "none", "both"),
    "BNN_NoBN/Qa_reactnet_18_bf": Variant("reactnet18", "bf", "activations"),
    "BNN_NoBN/Qa_reactnet_18_bn": Variant("reactnet18", "bn", "activations"),
    "BNN_NoBN/Qa_reactnet_18_none": Variant("reactnet18", "none", "activations"),
    "BNN_NoBN/Qaw_reactnet_18_bf": Variant("reactnet18", "bf", "both"),
    "BNN_NoBN/Qaw_reactnet_18_bn": Variant("reactnet18", "bn", "both"),
    "BNN_NoBN/Qaw_reactnet_18_none": Variant("reactnet18", "none", "both"),
}

SETTINGS: dict[str, dict[str, Any]] = {
    "bn": {"norm": "bn", "standardize": False, "scale": "mean_abs", "ste_window": "fixed"},
    "bf": {"norm": "free_paper", "beta": "ref"},
    "none": {"norm": "none"},
}
"""Keys of our recipe's model section, for each of their normalisers."""

WHOLE = {
    "reactnet_a": {"stem.0": "feature.0.conv1", "stem.1": "feature.0.bn1", "head": "fc"},
    "reactnet18": {"stem.0": "conv1", "stem.1": "bn1", "head": "fc"},
}
"""Ours -> theirs outside the blocks."""

UNITS = {
    # ours              reactnet18       reactnet_a 3x3   1x1              1x1 that doubles
    "branch.0.bias": ("move0.bias", "move11.bias", "move21.bias", "move21.bias"),
    "branch.1": ("binary_conv", "binary_3x3", "binary_pw", "binary_pw_down1 binary_pw_down2"),
    "branch.2": ("bn1", "bn1", "bn2", "bn2_1 bn2_2"),
    "act.input_shift": ("move1.bias", "move12.bias", "move22.bias", "move22.bias"),
    "act.slope": ("prelu.weight", "prelu1.weight", "prelu2.weight", "prelu2.weight"),
    "act.output_shift": ("move2.bias", "move13.bias", "move23.bias", "move23.bias"),
    "shortcut.0": ("downsample.1", "", "", ""),
    "shortcut.1": ("downsample.2", "", "", ""),
}
"""Ours -> theirs within a block of ours; two names are concatenated."""

SHIFTS = ("branch.0.bias", "act.input_shift", "act.output_shift")  # [C] in ours, [1, C, 1, 1] in theirs

NARROW = {  # tensors whose size in one dimension, over that at width 1, is the width
    "reactnet_a": (("feature.0.conv1.weight", 0, 32), ("fc.weight", 1, 1024), ("feature.1.prelu1.weight", 0, 32)),
    "reactnet18": (("conv1.weight", 0, 64), ("fc.weight", 1, 512), ("layer1.0.prelu.weight", 0, 64)),
}

DATA = {10: ("cifar10", CIFAR10), 100: ("cifar100", CIFAR100), 1000: ("imagenet", IMAGENET)}
"""Number of classes -> the data set that a network of so many was trained on."""

REMEDY = (
    "If you trust its source, keep its weights alone: "
    "torch.save({'state_dict': torch.load(FILE, map_location='cpu', weights_only=False)['state_dict']}, NEW)."
)


@dataclass(frozen=True)
class Found:
    """Identity of a published checkpoint, from its keys and shapes. `stored` is a value of `Variant.stored`."""

    model: str
    norm: str
    stored: str
    classes: int
    width: float
    stem: str

    def fits(self, variant: Variant) -> bool:
        return (variant.model, variant.norm) == (self.model, self.norm) and self.stored in variant.stored


def read_published(path: str | Path) -> tuple[dict[str, Tensor], float | None]:
    """The state dict in a file of theirs, without `module.`; and its optimiser's weight decay, if it has one.

    Opened with weights_only=True: nothing in the file is executed. Errors: CheckpointError.
    """
    where = f"published checkpoint {path}"
    if not Path(path).is_file():
        raise CheckpointError(f"{where}: no such file.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(f"{where}: no file of torch.save, or it holds more than weights. {REMEDY}") from None
    # Why so many: what torch and pickle raise on torn files and on files of another kind
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{where}: not a checkpoint, or torn ({_reason(error)}).") from None
    weights = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(weights, dict) or not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        found = sorted(map(str, state))[:4] if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{where}: got {found}, expected a state dict, or one under the key state_dict.")
    try:
        decay = max(float(group["weight_decay"]) for group in state["optimizer"]["param_groups"])
    except (KeyError, TypeError, ValueError):
        decay = None
    return {str(key).removeprefix("module."): value for key, value in weights.items()}, decay


def _reason(error: Exception) -> str:
    """The words of torch on a file, or, where these tell of its inner working only, their meaning."""
    said = str(error).strip().split("\n")[0][:120]
    return said if said and isinstance(error, RuntimeError | OSError) else "it is no file of torch.save"


def inspect(theirs: Mapping[str, Tensor], where: str) -> Found:
    """Identify a published state dict. Errors: CheckpointError where it is of neither repository."""
    starts = {"feature": "reactnet_a", "layer1": "reactnet18"}
    model = next((starts[key.split(".")[0]] for key in theirs if key.split(".")[0] in starts), None)
    if model is None:
        raise CheckpointError(
            f"{where}: got keys such as {sorted(theirs)[:3]}, expected those of liuzechun/ReActNet or "
            "VITA-Group/BNN_NoBN (feature.0.conv1.weight or layer1.0.binary_conv.weight)."
        )

    def holds(ending: str) -> bool:  # Why two: one stray key should be named as such, not change the network
        return sum(key.endswith(ending) for key in theirs) > 1

    (stem, *_), (head, *_), _ = NARROW[model]
    wrong = {"missing": [k for k in (stem, head) if k not in theirs]}
    dims = {stem: 4, head: 2}
    wrong["other shape"] = [f"{k} {list(theirs[k].shape)}" for k in dims if k in theirs and theirs[k].dim() != dims[k]]
    _refuse(wrong, where)
    widths = [theirs[k].shape[dim] / base for k, dim, base in NARROW[model] if k in theirs and theirs[k].dim() > dim]
    return Found(
        model=model,
        norm="bn" if holds(".running_mean") else "bf" if holds(".gain") else "none",
        stored="weights" if holds(".weights") else "weight",
        classes=theirs[head].shape[0],
        width=statistics.mode(widths),  # Why: a misshapen tensor is outvoted, and named when shapes are compared
        stem="cifar" if model == "reactnet18" and theirs[stem].shape[-1] == 3 else "imagenet",
    )


def choose(found: Found, variant: str | None, where: str, decay: float | None = None) -> str:
    """The name of the one variant that fits; `variant` where keys and shapes leave several."""
    fitting = [name for name, candidate in VARIANTS.items() if found.fits(candidate)]
    if not fitting:
        raise CheckpointError(
            f"{where}: got {found.model} with {found.norm} and weights stored as '{found.stored}', which is none of "
            f"{', '.join(VARIANTS)}."
        )
    if variant is not None:
        pick(VARIANTS, variant, "variant")
        if variant not in fitting:
            raise CheckpointError(f"{where}: variant: got {variant}, but its keys are those of {', '.join(fitting)}.")
        return variant
    if len(fitting) > 1:
        hint = "" if decay is None else f" Its optimiser's weight decay is {decay:g}; theirs: 1e-5, in the second 0."
        raise CheckpointError(
            f"{where}: the keys are the same for {', '.join(fitting)}. Say which with --variant NAME (Qa, step1: "
            f"first stage, real weights; Qaw, step2: second stage, 1-bit ones).{hint}"
        )
    return fitting[0]


def recipe_of(found: Found, variant: str, image_size: int | None = None) -> Recipe:
    """The recipe whose network computes what theirs does; image_size: pixels (None: its data set's)."""
    its = VARIANTS[variant]
    data = DATA[found.classes][0] if found.classes in DATA else "image_folder"
    own = KNOWN[data if data in KNOWN else "imagenet"][2]
    names = {"name": its.model, "width": found.width, "stem": found.stem, "shortcut": its.shortcut}
    tree = {
        "model": {**names, "binarize": its.binarize, **SETTINGS[its.norm]},
        "data": {"name": data, "image_size": own if image_size is None else image_size},
        "stages": [{"name": "published", "epochs": 1}],
    }
    return parse_recipe(tree, f"recipe of {variant}")


def _source(key: str, shape: Sequence[int], model: nn.Module, name: str, stored: str) -> tuple[list[str], list[int]]:
    """Their keys of one of our tensors, and the shape that each of them has."""
    place, rest, table = "", key, WHOLE[name]
    if key.startswith("blocks."):
        _, number, rest = key.split(".", 2)
        n, column = int(number), 0
        if name == "reactnet_a":
            place, column = f"feature.{n // 2 + 1}.", 1 + n % 2 + int(model.get_submodule(f"blocks.{n}").duplicate)  # type: ignore[arg-type]
        else:
            place = f"layer{n // 4 + 1}.{n % 4}."
        table = {ours: row[column] for ours, row in UNITS.items()}
    part = next(ours for ours in table if f"{rest}.".startswith(f"{ours}."))
    tail = rest.removeprefix(part)
    names = table[part].split()
    each = [shape[0] // len(names), *shape[1:]] if shape else []
    if part in SHIFTS:
        each = [1, each[0], 1, 1]
    elif tail == ".gain":
        each = [each[0], 1, 1, 1]
    elif part == "branch.1" and stored == "weights":
        tail, each = ".weights", [prod(each), 1]
    return [f"{place}{theirs}{tail}" for theirs in names], each


def _refuse(problems: Mapping[str, Sequence[str]], where: str) -> None:
    """One CheckpointError for all of them, in the form of checkpoint.load_weights."""
    found = [f"{len(v)} {k} ({', '.join(v[:3])}{', ...' if len(v) > 3 else ''})" for k, v in problems.items() if v]
    if found:
        raise CheckpointError(f"{where}: the weights do not fit the network: {'; '.join(found)}.")


def translate(theirs: Mapping[str, Tensor], model: nn.Module, name: str, stored: str, where: str) -> dict[str, Tensor]:
    """Their state dict as one for `model`, a network MODELS[name]; alpha and beta are the model's own.

    Errors: one CheckpointError that names every kind of key that does not fit, in their words.
    """
    own = model.state_dict()
    sources = {
        key: _source(key, list(value.shape), model, name, stored)
        for key, value in own.items()
        if not key.endswith((".alpha", ".beta"))
    }
    shapes = {key: shape for keys, shape in sources.values() for key in keys}
    _refuse(
        {
            "missing": [key for key in shapes if key not in theirs],
            "unexpected": [key for key in theirs if key not in shapes],
            "other shape": [
                f"{key} {list(theirs[key].shape)} for {shape}"
                for key, shape in shapes.items()
                if key in theirs and list(theirs[key].shape) != shape
            ],
        },
        where,
    )
    for key, (keys, _) in sources.items():
        parts = [theirs[k] for k in keys]
        whole = torch.cat([part.flatten() for part in parts]) if own[key].dim() else torch.stack(parts).amax()
        own[key] = whole.view(own[key].shape)
    return own
