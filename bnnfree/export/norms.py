"""Lower normalisers to ops. Imports numpy, torch, bnnfree.nn and its own room.

Statistics of the training are constants: an affine, deferred. Statistics of the image are an op, group_norm or
rms_norm, whose gain and bias are deferred. Of proxy normalisation its activation stays, between two affines.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, fx, nn

from bnnfree.export.errors import ExportError
from bnnfree.export.value import Value
from bnnfree.nn import FilterResponseNorm, ProxyNorm

if TYPE_CHECKING:
    from bnnfree.export.lower import Lowering


def lower_batch_norm(low: Lowering, node: fx.Node, x: Value, layer: nn.BatchNorm2d) -> Value:
    if layer.running_mean is None or layer.running_var is None:
        raise low.refuse(
            node, "has no running statistics, so its output depends on the batch", "Use track_running_stats=True."
        )
    mean, var = layer.running_mean.double().numpy(), layer.running_var.double().numpy()
    scale = 1 / np.sqrt(var + layer.eps)
    scale = scale if layer.weight is None else scale * layer.weight.double().numpy()
    shift = -mean * scale + (0 if layer.bias is None else layer.bias.double().numpy())
    return x.affine(low.vector(node, scale, x), low.vector(node, shift, x))


def lower_group_norm(low: Lowering, node: fx.Node, x: Value, layer: nn.GroupNorm) -> Value:
    return _norm(low, node, x, "group_norm", np.full(layer.num_groups, layer.eps), layer)


def lower_response_norm(low: Lowering, node: fx.Node, x: Value, layer: FilterResponseNorm) -> Value:
    return _norm(low, node, x, "rms_norm", np.full(len(layer.weight), float(layer.effective_eps())), layer)


def _norm(
    low: Lowering, node: fx.Node, x: Value, name: str, eps: np.ndarray, layer: nn.GroupNorm | FilterResponseNorm
) -> Value:
    """As many groups as there are eps."""
    if low.shape(node) != x.shape:
        raise low.refuse(node, "works on maps that were flattened", "Put it before the Flatten, or pool to 1x1 first.")
    y = low.builder.emit(name, low.builder.settle(x), x.shape)
    low.builder.constant(y, "weights", eps)
    y = y if layer.weight is None else y.affine(low.vector(node, layer.weight, y))
    return y if layer.bias is None else y.affine(1.0, low.vector(node, layer.bias, y))


# -- proxy normalisation


class Affine(nn.Module):
    """scale x + shift, per channel. Shapes: [N, C, ...] -> the same."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor):
        super().__init__()
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("shift", shift.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (x.dim() - 2))
        return x * self.scale.view(shape) + self.shift.view(shape)


def lower_affine(low: Lowering, node: fx.Node, x: Value, layer: Affine) -> Value:
    return x.affine(low.vector(node, layer.scale, x), low.vector(node, layer.shift, x))


def freeze_proxies(module: nn.Module) -> nn.Module:
    """The module with each ProxyNorm taken apart, the moments of its proxy being constants from here on.

    Why before it is traced: the activation, which may be a sign, is then a layer like any other.
    """
    for path, layer in list(module.named_modules(remove_duplicate=False)):
        if type(layer) is not ProxyNorm:
            continue
        if layer._forward_hooks or layer._forward_pre_hooks:
            raise ExportError(
                f"export: layer {path} (ProxyNorm) has forward hooks, which a packed file cannot hold. Remove them."
            )
        mean, variance = layer.moments()
        factor = torch.rsqrt(variance + layer.eps)
        parts = (
            ("gain", Affine(layer.weight, layer.bias)),
            ("activation", layer.activation),
            ("proxy", Affine(factor, -mean * factor)),
        )
        frozen = nn.Sequential(OrderedDict(parts))
        parent, _, name = path.rpartition(".")
        if not name:
            return frozen
        setattr(module.get_submodule(parent), name, frozen)
    return module
