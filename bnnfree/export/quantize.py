"""Weights as int8 with one scale per output channel, and layers as arrays. Imports torch, numpy, bnnfree.nn.

The first and the last layer keep real weights when everything else is binary; stored in 8 bits they cost little.
`quantize_ends` puts the rounded weights into the torch module itself, so that what is verified is what is shipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bnnfree.export.trace import Traced, first_layers, last_layer, path_of
from bnnfree.export.twin import kind_of
from bnnfree.nn import BinaryConv2d, BinaryLinear, WeightLayer
from bnnfree.nn.standard import ConvLayer


@dataclass(frozen=True)
class Geometry:
    """Geometry of a convolution: that of a Window, groups and pad value."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    pad_value: int = 0
    after: tuple[int, int] = (0, 0)

    @property
    def padded(self) -> bool:
        """True where some window may see the padding."""
        return any((*self.padding, *self.after))


@dataclass(frozen=True)
class LayerArrays:
    """A convolution or linear layer: y = (weight * x) factor + bias, float64 [O, I, kh, kw] and [O].

    kind: "real"; "binary", whose weight is +1 and -1; "int8", whose weight is whole numbers, with the factor that
    input channel c has beside (`inputs`). linear: a matrix, given as [O, I, 1, 1]. None: 1, and 0. signed: factors
    may be negative.
    """

    kind: str
    weight: np.ndarray
    factor: np.ndarray | None
    bias: np.ndarray | None
    geometry: Geometry
    linear: bool
    inputs: np.ndarray | None = None
    signed: bool = False

    def affine(self) -> tuple[np.ndarray, np.ndarray]:
        """factor and bias, 1 and 0 where there are none."""
        outputs = len(self.weight)
        return (
            np.ones(outputs) if self.factor is None else self.factor,
            np.zeros(outputs) if self.bias is None else self.bias,
        )


def layer_arrays(layer: nn.Module, input_shape: Sequence[int], path: str) -> LayerArrays:
    """`layer` as arrays; input_shape: [N, C, H, W] or [N, C] of what it reads."""
    if isinstance(layer, Int8Layer):
        inputs = _double(layer.inputs)
        return _arrays("int8", layer.weight, layer.scale, layer.bias, layer.geometry, layer.linear, inputs)
    if isinstance(layer, WeightLayer):
        weight, factor, bias = layer.fold(torch.zeros(tuple(input_shape)))
        kind = "binary" if isinstance(layer, (BinaryConv2d, BinaryLinear)) and layer.binary else "real"
        if isinstance(layer, ConvLayer):
            pads = (layer.groups, layer.pad_value)
            geometry = Geometry(layer.stride, layer.padding, layer.dilation, *pads, after=layer.padding)
        else:
            geometry = Geometry()
        signed = layer.gain is not None or getattr(layer, "scale", None) is not None
        arrays = _arrays(kind, weight, factor, bias, geometry, not isinstance(layer, ConvLayer))
        return replace(arrays, signed=signed)
    if isinstance(layer, nn.Linear):
        return _arrays("real", layer.weight, None, layer.bias, Geometry(), True)
    assert isinstance(layer, nn.Conv2d)
    padding, after = _padding(layer)
    geometry = Geometry(_pair(layer.stride), padding, _pair(layer.dilation), layer.groups, after=after)
    return _arrays("real", layer.weight, None, layer.bias, geometry, False)


def _padding(layer: nn.Conv2d) -> tuple[tuple[int, int], tuple[int, int]]:
    """Padding above and on the left, and below and on the right."""
    if layer.padding == "valid":
        return (0, 0), (0, 0)
    if layer.padding == "same":
        rows, columns = (d * (k - 1) for d, k in zip(_pair(layer.dilation), layer.kernel_size, strict=True))
        return (rows // 2, columns // 2), (rows - rows // 2, columns - columns // 2)
    return _pair(layer.padding), _pair(layer.padding)


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _double(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()


def _arrays(kind, weight, factor, bias, geometry, linear, inputs=None) -> LayerArrays:
    outputs = weight.shape[0]
    return LayerArrays(
        kind,
        _double(weight).reshape(outputs, weight.shape[1], *(weight.shape[2:] or (1, 1))),
        None if factor is None else _double(factor),
        None if bias is None else _double(bias),
        geometry,
        linear,
        inputs,
    )


class Int8Layer(nn.Module):
    """A convolution or linear layer with int8 weights: W[o, c] = q[o, c] scale[o] inputs[c], then the bias.

    Shapes: weight int8 [O, I, kh, kw] or [O, I]; scale, bias [O]; inputs [I].
    """

    weight: Tensor
    scale: Tensor
    inputs: Tensor
    bias: Tensor

    def __init__(self, arrays: LayerArrays, inputs: np.ndarray):
        """`inputs`: the factor of each input channel that the stored numbers leave out."""
        super().__init__()
        factor, bias = arrays.affine()
        whole = arrays.weight * factor[:, None, None, None] / inputs[:, None, None]
        scale = np.abs(whole).max(axis=(1, 2, 3)) / 127
        scale = np.where(scale > 0, scale, 1.0).astype(np.float32)  # a channel of zeros stays one
        q = np.clip(np.rint(whole / scale[:, None, None, None].astype(np.float64)), -127, 127)
        self.linear, self.geometry = arrays.linear, arrays.geometry
        q = q[..., 0, 0] if arrays.linear else q
        self.register_buffer("weight", torch.from_numpy(q.astype(np.int8)))
        self.register_buffer("scale", torch.from_numpy(scale))
        self.register_buffer("inputs", torch.from_numpy(inputs.astype(np.float64)))
        self.register_buffer("bias", torch.from_numpy(bias.astype(np.float32)))

    def forward(self, x: Tensor) -> Tensor:
        rest = [1] * (self.weight.dim() - 2)
        scale = self.scale.double().view(-1, 1, *rest) * self.inputs.view(1, -1, *rest)
        weight = (self.weight.double() * scale).to(x.dtype)
        bias, g = self.bias.to(x.dtype), self.geometry
        if self.linear:
            return F.linear(x, weight, bias)
        if g.padded:
            around = (g.padding[1], g.after[1], g.padding[0], g.after[0])
            x = F.pad(x, around, value=float(g.pad_value))
        return F.conv2d(x, weight, bias, g.stride, 0, g.dilation, g.groups)


def quantize_ends(traced: Traced, std: Sequence[float], stem: str, head: str) -> None:
    """Replace the first and the last layer with real weights by Int8Layer, where asked to ("int8" or "float")."""
    last = last_layer(traced)
    for node in first_layers(traced) if stem == "int8" else []:
        _replace(traced, node, 255 * np.asarray(std, np.float64))
    if head == "int8" and last is not None:
        _replace(traced, last, None)


def fits_pixels(arrays: LayerArrays) -> bool:
    """Can this first layer run on the pixels themselves: zero padding, one group, sums within 32 bits?"""
    g = arrays.geometry
    return g.groups == 1 and not (g.pad_value and g.padded) and arrays.weight[0].size * 255 * 128 < 2**31


def _replace(traced: Traced, node: fx.Node, inputs: np.ndarray | None) -> None:
    layer, source = traced.layer(node), node.all_input_nodes[0]
    if layer is None or not (kind_of(layer) in (nn.Conv2d, nn.Linear) or isinstance(layer, WeightLayer)):
        return
    arrays = layer_arrays(layer, source.meta["shape"], path_of(node))
    if arrays.kind != "real" or (arrays.linear and len(source.meta["shape"]) != 2):
        return
    if inputs is None or not fits_pixels(arrays):
        inputs = np.ones(arrays.weight.shape[1])
    elif arrays.linear:  # columns in torch's order: channel by channel
        inputs = np.repeat(inputs, arrays.weight.shape[1] // len(inputs))
    parent, _, name = str(node.target).rpartition(".")
    setattr(traced.module.get_submodule(parent), name, Int8Layer(arrays, inputs))
