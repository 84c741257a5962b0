"""The copy of a network that is exported: without wrappers, on the CPU, in float32 and eval mode. Imports torch."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from bnnfree.export.errors import ExportError
from bnnfree.export.mutation import state_of
from bnnfree.export.norms import Affine, freeze_proxies
from bnnfree.nn import (
    BatchRenorm2d,
    FilterResponseNorm,
    GhostBatchNorm2d,
    GroupNorm,
    KalmanNorm2d,
    RPReLU,
    Sign,
    ThresholdedLinear,
    WeightLayer,
)
from bnnfree.nn.block import Clip

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)  # what they hold is .module
NORM_LAYERS = (BatchRenorm2d, GhostBatchNorm2d, KalmanNorm2d, GroupNorm, FilterResponseNorm)
OURS = (WeightLayer, Sign, RPReLU, Clip, *NORM_LAYERS, ThresholdedLinear, Affine)
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Methods and attributes of classes that say nothing of what a layer computes in eval mode
HARMLESS = {
    *dir(object),
    *("__annotations__", "__constants__", "__deepcopy__", "__getstate__", "__parameters__", "__setstate__"),
    *("__dict__", "__module__", "__static_attributes__", "__firstlineno__", "__weakref__"),
    *("extra_repr", "load_state_dict", "reset_parameters", "state_dict", "train"),
}

# Methods of layers with weights and of signs that the exporter takes as they are; others it calls, as forward does
TAKEN = {"forward", "__call__", "_call_impl", "_forward", "linear", "channel_shape", "fold", "_folded_bias", "compared"}


@contextlib.contextmanager
def plain_mode() -> Iterator[None]:
    """Compute in float32 on the CPU, whatever mode of torch the caller has switched on."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def kind_of(layer: nn.Module) -> type | None:
    """The class of torch or bnnfree that says what `layer` computes: its own, or a base that it leaves as it is.

    None: a container or a module of its own making, which is traced through.
    """
    kind, changed = _base_of(layer)
    return None if changed or kind in (nn.Module, *CONTAINERS) else kind


def check_unchanged(layer: nn.Module, path: str) -> None:
    """Errors: ExportError for a sign or a layer with weights of bnnfree whose methods were changed."""
    kind, changed = _base_of(layer)
    if changed and issubclass(kind, (WeightLayer, Sign)):
        raise ExportError(
            f"export: layer {path} ({type(layer).__name__}) is a {kind.__name__} with {', '.join(sorted(changed))} of "
            f"its own, which the exporter cannot know. Compute that in a module that holds a plain {kind.__name__}."
        )


def methods_put_on(layer: nn.Module) -> set[str]:
    """Names of methods that the object has in place of those of its class."""
    return {name for name in vars(layer) if callable(getattr(type(layer), name, None))} - HARMLESS


def _base_of(layer: nn.Module) -> tuple[type, set[str]]:
    """The nearest class of torch's or bnnfree's layers, and the names in it that the classes before it change."""
    changed = methods_put_on(layer)
    for kind in type(layer).__mro__:
        ours = issubclass(kind, OURS) and kind.__module__.startswith(("bnnfree.nn.", "bnnfree.export."))
        if ours or kind.__module__.startswith("torch.nn.modules."):
            changed &= set(dir(kind))
            return kind, changed & TAKEN if issubclass(kind, (WeightLayer, Sign)) else changed
        if kind.__module__ != "torch.nn.utils.parametrize":  # Why: it changes only how a parameter is read
            changed |= vars(kind).keys() - HARMLESS
    raise AssertionError("a module has nn.Module among its bases")


def twin_of(module: nn.Module) -> nn.Module:
    """A copy of `module` as it is exported. A layer alone is put into a Sequential."""
    _check_network(module)
    name, module = type(module).__name__, _unwrapped(module)
    try:
        twin = copy.deepcopy(module)
    except Exception as error:  # Why: a copy runs the module's own code too, and tensors with a history have none
        raise ExportError(
            f"export: {name} cannot be copied ({reason(error)}). Take off what keeps computed tensors or handles in "
            "it: nn.utils.remove_weight_norm, nn.utils.prune.remove, x.detach()."
        ) from None
    for holder in twin.modules():
        for child, held in holder.named_children():
            holder._modules[child] = _unwrapped(held)
    try:
        for step in (twin.cpu, twin.float, twin.eval):
            step()
    except Exception as error:  # Why: modules may override these
        raise ExportError(f"export: {name} cannot be put on the CPU in eval mode ({reason(error)}).") from None
    twin = freeze_proxies(twin.requires_grad_(False))
    alone = isinstance(twin, OURS) or type(twin) is kind_of(twin)
    return nn.Sequential(twin) if alone and not isinstance(twin, nn.Identity) else twin


def _unwrapped(module: nn.Module) -> nn.Module:
    """The network in wrappers for training."""
    while isinstance(module, WRAPPERS) or hasattr(module, "_orig_mod"):
        module = module.module if isinstance(module, WRAPPERS) else module._orig_mod  # type: ignore[assignment]
    return module


def _check_network(module: Any) -> None:
    """Errors: ExportError where `module` is no network whose layers and numbers can be seen."""
    if not isinstance(module, nn.Module):
        got = f"the class {module.__name__}" if isinstance(module, type) else f"a {type(module).__name__}"
        hint = " Make one of it first." if isinstance(module, type) else ""
        hint = " Load these weights into their network first." if isinstance(module, dict) else hint
        raise ExportError(f"export: network: got {got}, expected a torch module (nn.Module).{hint}")
    for path, layer in module.named_modules():
        if isinstance(layer, torch.jit.ScriptModule):
            raise ExportError(
                f"export: {path or 'network'}: got a scripted or traced module, whose layers cannot be seen, expected "
                "one of Python. Export the network that it was made of."
            )
    for path, tensor in state_of(module):
        if is_lazy(tensor):
            raise ExportError(f"export: {path}: has no shape yet. Run the network on an image first.")
        if tensor.is_meta:
            raise ExportError(f"export: {path}: has no values (device meta). Load the weights first.")


def check_finite(module: nn.Module) -> None:
    """Errors: ExportError that names a parameter or buffer which holds NaN or an infinity."""
    for path, tensor in state_of(module):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = tensor[~torch.isfinite(tensor)]
            raise ExportError(
                f"export: {path}: got {bad[0].item()} in {len(bad):,} of {tensor.numel():,} values, expected finite "
                "numbers. Has the training diverged?"
            )


def reason(error: BaseException) -> str:
    """The error's text on one line, without what torch.fx adds to it."""
    text = str(error).split("\n\nWhile executing")[0]
    return " ".join(text.split())[:200] or type(error).__name__
