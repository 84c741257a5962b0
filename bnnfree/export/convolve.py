"""Lower convolutions and linear layers to ops. Imports numpy, torch, bnnfree.ops and its own room.

A sign by a sign is a binary_conv2d, pixels by int8 weights a pixel_conv2d, anything else a conv2d; a linear layer
is a convolution whose kernel is the whole map.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import fx, nn

from bnnfree.export.maps import Padded
from bnnfree.export.quantize import Geometry, LayerArrays, fits_pixels, layer_arrays
from bnnfree.export.trace import path_of
from bnnfree.export.value import Value
from bnnfree.format.schema import OPS
from bnnfree.ops import Window, border_classes

if TYPE_CHECKING:
    from bnnfree.export.lower import Lowering


def lower_linear(low: Lowering, node: fx.Node, x: Value | Padded, layer: nn.Module) -> Value:
    """The rule of every layer with weights."""
    source = node.all_input_nodes[0].meta["shape"]
    arrays = layer_arrays(layer, source, path_of(node))
    if isinstance(x, Padded):
        x, arrays = _taken_up(low, node, x, arrays)
    mode = getattr(layer, "padding_mode", "zeros")
    if mode != "zeros" and isinstance(layer, nn.Conv2d) and arrays.geometry.padded:
        x, arrays = _surrounded(low, x, arrays, mode)
    if arrays.linear:
        if len(source) != 2:
            raise low.refuse(node, "reads maps, not one vector per image", "Put a Flatten before it.")
        arrays = _as_conv(arrays, x.shape)
    build = low.builder
    rows, columns, channels = low.shape(node)
    w = arrays.weight.transpose(0, 2, 3, 1)  # [O, kh, kw, C / groups]
    geometry = arrays.geometry
    fields: dict[str, Any] = {"kernel_h": w.shape[1], "kernel_w": w.shape[2]}
    for name in ("stride", "padding", "dilation", "after"):
        fields[f"{name}_h"], fields[f"{name}_w"] = getattr(geometry, name)
    fields |= {"groups": geometry.groups, "pad_value": geometry.pad_value if geometry.padded else 0}
    shape = (rows, columns, channels)
    low.slow += _slow(low, node, x, arrays)
    if _meets_signs(x, arrays):
        y = build.emit("binary_conv2d", x, shape, **fields)
        build.constant(y, "weights", w < 0, "bits")
        if not x.shifted:
            return _finished(y, arrays, float(x.scale[0]))
        y = _finished(y, arrays, float(x.scale[0]))
        factor, _ = arrays.affine()
        return _offset(low, y, x, arrays, w, factor, fields)
    if arrays.kind == "int8" and x.kind == "image" and fits_pixels(arrays):
        return _pixel_conv(low, x, arrays, w, shape, fields)
    return _real_conv(low, x, arrays, w, shape, fields)


def _meets_signs(x: Value, arrays: LayerArrays) -> bool:
    """True where 1-bit weights meet signs: one scale for all; an offset where padding is 0 and groups are one."""
    if arrays.kind != "binary" or x.kind != "bits" or x.scaled == 2:
        return False
    geometry = arrays.geometry
    return not x.shifted or (geometry.groups == 1 and not (geometry.padded and geometry.pad_value))


def _offset(low: Lowering, y: Value, x: Value, arrays: LayerArrays, w: np.ndarray, factor: np.ndarray, fields) -> Value:
    """The part of an offset of signs: its sum with the weights of the taps inside, which a border has fewer of."""
    per_tap = (w * x.shift).sum(3) * factor[:, None, None]  # [O, kh, kw]
    if not arrays.geometry.padded:
        return y.affine(1.0, per_tap.sum((1, 2)))
    (_, rows), (_, columns) = map(border_classes, _window(fields).sides(*x.shape[:2]))
    table = np.einsum("ai,bj,oij->abo", rows.astype(float), columns.astype(float), per_tap)
    y = low.builder.settle(y)  # so that a bias comes after the scale
    constants = low.builder.makers[y.tensor].constants
    constants["bias"] = constants.get("bias", 0.0) + table
    return y


def _taken_up(low: Lowering, node: fx.Node, x: Padded, arrays: LayerArrays) -> tuple[Value, LayerArrays]:
    """The padding before a convolution as its own, where it is of one kind with that; else as an op."""
    geometry, inner = arrays.geometry, x.value
    same = not geometry.padded or geometry.pad_value == x.fill
    signs = inner.kind != "bits" or x.fill == 0 or not (inner.scaled or inner.shifted)
    if arrays.linear or x.fill not in (0.0, 1.0, -1.0) or not same or not signs:
        return low.value(node, node.all_input_nodes[0]), arrays
    top, left, bottom, right = x.around
    padding = (geometry.padding[0] + top, geometry.padding[1] + left)
    after = (geometry.after[0] + bottom, geometry.after[1] + right)
    return inner, replace(arrays, geometry=replace(geometry, padding=padding, after=after, pad_value=int(x.fill)))


def _surrounded(low: Lowering, x: Value, arrays: LayerArrays, mode: str) -> tuple[Value, LayerArrays]:
    """The padding of a convolution by other values than zero, as an op."""
    geometry = arrays.geometry
    around = (*geometry.padding, *geometry.after)
    x = low.builder.pad(x, around, OPS["pad"].modes.index(mode))
    return x, replace(arrays, geometry=replace(geometry, padding=(0, 0), after=(0, 0)))


def _slow(low: Lowering, node: fx.Node, x: Value, arrays: LayerArrays) -> list[str]:
    """A line, where 1-bit weights were meant to meet signs and do not, or meet them group by group."""
    if arrays.kind != "binary":
        return []
    if _meets_signs(x, arrays):
        if arrays.geometry.groups == 1:
            return []
        why = f"its {arrays.geometry.groups} groups have no vector kernel: portable C runs it, about 10 times slower"
        return [f"{path_of(node)}: {why}. One group is faster, for all that it multiplies."]
    between = low.traced.between_sign_and(node)
    if between is None:
        return []  # real inputs, as shortcuts have them
    why = f"its input is not signs as they come ({between}): a float convolution runs it, about 25 times slower"
    return [f"{path_of(node)}: {why}. Put the sign right before it, without scale or offset."]


def _as_conv(arrays: LayerArrays, shape: tuple[int, int, int]) -> LayerArrays:
    """A matrix on flattened maps as a convolution whose kernel is the whole map."""
    rows, columns, channels = shape
    weight = arrays.weight.reshape(len(arrays.weight), channels, rows, columns)
    inputs = arrays.inputs
    if inputs is not None:
        inputs = inputs.reshape(channels, -1)[:, 0]
    return replace(arrays, weight=weight, inputs=inputs, geometry=Geometry())


def _pixel_conv(low: Lowering, x: Value, arrays: LayerArrays, w: np.ndarray, shape, fields) -> Value:
    """int8 weights on pixels. The image means scale * p + shift: shift goes into the bias, per border class."""
    window, outputs = _window(fields), len(w)
    (_, rows), (_, columns) = map(border_classes, window.sides(*x.shape[:2]))
    assert arrays.inputs is not None
    factor, bias = arrays.affine()
    per_tap = (w * (arrays.inputs * x.shift)).sum(3) * factor[:, None, None]  # [O, kh, kw]
    table = np.einsum("ai,bj,oij->abo", rows.astype(float), columns.astype(float), per_tap) + bias
    # what is stored leaves out inputs = 255 std, which undoes the pixel's scale
    y = low.builder.emit("pixel_conv2d", x, shape, **{**fields, "groups": 1, "pad_value": 0})
    low.builder.constant(y, "weights", w, "i8")
    low.builder.constant(y, "scale", factor.copy())
    low.builder.constant(y, "bias", table)
    assert table.shape[2] == outputs
    return y


def _window(fields: dict[str, Any]) -> Window:
    return Window(*((fields[f"{n}_h"], fields[f"{n}_w"]) for n in ("kernel", "stride", "padding", "dilation", "after")))


def _real_conv(low: Lowering, x: Value, arrays: LayerArrays, w: np.ndarray, shape, fields) -> Value:
    """Float inputs: their scale goes into the weights and their shift into the bias, where that is exact."""
    build, groups, padded = low.builder, fields["groups"], arrays.geometry.padded
    x = build.as_tensor(x)
    if (padded and x.shifted) or fields["pad_value"] or (arrays.kind != "real" and x.scaled == 2):
        x = build.settle(x)
    inputs = np.ones(w.shape[3]) if arrays.inputs is None else arrays.inputs
    per_group = len(w) // groups
    grouped = w.reshape(groups, per_group, *w.shape[1:]) * inputs
    if x.shifted:
        factor, bias = arrays.affine()
        seen = (grouped * x.shift.reshape(groups, 1, 1, 1, -1)).sum((2, 3, 4)).reshape(-1)
        arrays = replace(arrays, bias=bias + seen * factor)
    y = build.emit("conv2d", x, shape, **fields)
    if arrays.kind == "real":
        scaled = (grouped * x.scale.reshape(groups, 1, 1, 1, -1)).reshape(w.shape)
        build.constant(y, "weights", scaled * arrays.affine()[0][:, None, None, None])
        return _finished(y, replace(arrays, factor=None))
    build.constant(y, "weights", w < 0 if arrays.kind == "binary" else w, "bits" if arrays.kind == "binary" else "i8")
    return _finished(y, arrays, float(inputs[0] * x.scale[0]))


def _finished(y: Value, arrays: LayerArrays, more: float = 1.0) -> Value:
    """The factor (times `more`) and the bias of a layer, deferred."""
    if arrays.factor is not None:
        y = y.affine(arrays.factor, signed=arrays.signed)
    y = y.affine(more)
    return y if arrays.bias is None else y.affine(1.0, arrays.bias)
