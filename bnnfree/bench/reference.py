"""The part of tools/bench.py that runs the released code of the BN-free block (BNN_NoBN) from a checkout of it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

FAMILIES = {"reactnet18": ("reactnet_18", "birealnet18"), "reactnet_a": ("reactnet_A", "reactnet")}
BINARIZED = {"activations": "Qa", "both": "Qaw"}
NORMS_THERE = {"bn": "bn", "none": "none"}  # every other norm is compared with its BN-free one, "bf"


def open_reference(folder: str, recipe, data) -> tuple[Any, Callable, list]:
    """(its network for this recipe, its AGC, parameters that its AGC leaves out) from a checkout of the released code.

    Its model files and agc.py are imported and run from the folder; its train.py, which needs a GPU, is not.
    Errors: BnnfreeError for a recipe without a counterpart there, and for a folder that is no such checkout.
    """
    from bnnfree.bench.training import data_info
    from bnnfree.errors import BnnfreeError, pick
    from bnnfree.recipe import resolve

    binarize = recipe.stages[-1].binarize or recipe.model.binarize
    family, builder = pick(FAMILIES, recipe.model.name, "--against: the released code's network for model.name")
    kind = pick(BINARIZED, binarize, "--against: the released code's network for binarize")
    name = f"{kind}_{family}_{NORMS_THERE.get(recipe.model.norm, 'bf')}"
    stem = resolve(recipe, data_info(data)).model.stem
    layers = import_file(folder, "layers.py")
    file = f"models/{name}.py"
    build = attribute(folder, file, import_file(folder, file, layers=layers), builder)
    options = {"num_classes": len(data.classes)}
    if recipe.model.name == "reactnet18":
        options["imagenet"] = stem == "imagenet"
    try:
        net = build(**options)
        if recipe.model.name == "reactnet_a" and stem == "cifar":
            net.feature[0].conv1.stride = (1, 1)  # it has no switch for that
    except Exception as error:
        raise BnnfreeError(
            f"--against {folder}: {builder} of {file} cannot be built: {' '.join(str(error).split())[:300]}"
        ) from None
    check_same_size(folder, file, net, recipe, data)
    clip = attribute(folder, "agc.py", import_file(folder, "agc.py"), "adaptive_clip_grad")
    left_out = [parameter for key, parameter in net.named_parameters() if "fc" in key]
    return net, lambda parameters, factor: clip(parameters, clip_factor=factor), left_out


def import_file(folder: str, file: str, **known: ModuleType) -> ModuleType:
    """The module of a file in the checkout; `known` are what it may import by these names."""
    from bnnfree.errors import BnnfreeError

    path = Path(folder) / file
    if not path.is_file():
        raise BnnfreeError(f"--against {folder}: has no {file}, expected a checkout of the released code (BNN_NoBN).")
    spec = importlib.util.spec_from_file_location(f"_released_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # of a .py file there is always one
    module = importlib.util.module_from_spec(spec)
    before = {name: sys.modules.get(name) for name in known}
    sys.modules.update(known)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        hint = f" pip install {error.name}" if error.name else ""
        raise BnnfreeError(
            f"--against {folder}: {file} cannot be imported: {' '.join(str(error).split())[:300]}.{hint}"
        ) from None
    except Exception as error:
        raise BnnfreeError(
            f"--against {folder}: {file} cannot be imported: {' '.join(str(error).split())[:300]}"
        ) from None
    finally:
        for name, old in before.items():
            if old is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = old
    return module


def attribute(folder: str, file: str, module: ModuleType, name: str) -> Callable:
    from bnnfree.errors import BnnfreeError

    found = getattr(module, name, None)
    if not callable(found):
        raise BnnfreeError(f"--against {folder}: {file} has no {name}, expected the released code (BNN_NoBN).")
    return found


def check_same_size(folder: str, file: str, net, recipe, data) -> None:
    """Errors: BnnfreeError unless both networks have as many weights in their convolutions."""
    from bnnfree.bench.training import data_info
    from bnnfree.errors import BnnfreeError
    from bnnfree.models import MODELS
    from bnnfree.nn.standard import ConvLayer
    from bnnfree.train.checkpoint import build_model

    ours = build_model(recipe, MODELS, data_info(data))
    own = sum(layer.weight.numel() for layer in ours.modules() if isinstance(layer, ConvLayer))
    kernels = [p for p in net.parameters() if p.dim() == 4 and p.shape[0] > 1 and p[0].numel() > 1]
    there = sum(p.numel() for p in kernels)
    if own != there:
        raise BnnfreeError(
            f"--against {folder}: {file} has {there:,} convolution weights, expected the recipe's {own:,}. "
            "It knows model.width=1, images of 3 channels, and only the whole network."
        )
