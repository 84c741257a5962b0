"""The ops of a packed model in float64, by torch: an independent formulation to compare engines with.

Imports torch, numpy, bnnfree.ops and bnnfree.format.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bnnfree.format import Op, PackedModel, window_of
from bnnfree.format.schema import FLOAT_FIELDS, NORMS, OPS
from bnnfree.ops import Window, border_bias, pool_output, unpack_bits


def signed(words: np.ndarray, channels: int) -> np.ndarray:
    """Bits as +1 and -1."""
    return np.where(unpack_bits(words, channels), -1.0, 1.0)


def first_double(model: PackedModel, op: Op, values: dict[int, Tensor]) -> Tensor:
    """Values that the epilogue starts from, or the result of an op without one."""
    x = values[op.input]
    if op.name == "pointwise":
        return x
    if op.name in MOVES:
        return MOVES[op.name](model, op, x, values)
    if op.name == "softmax":
        return torch.softmax(x, 1)
    if op.name == "function":
        return FUNCTIONS[OPS["function"].modes[op.mode]](x)
    if op.name == "conv_transpose2d":
        return _transposed(model, op, x)
    if op.name == "channel_norm":
        d = x if op.mode else x - x.mean(1, keepdim=True)
        eps = model.tensors[op.weights].data
        assert eps is not None
        return d / (d.square().mean(1, keepdim=True) + float(eps[0])).sqrt()
    if op.name in NORMS:
        return _double_norm(x, model.tensors[op.weights].data, op.name == "group_norm")
    window = window_of(op)
    if op.name in ("max_pool2d", "avg_pool2d"):
        return _double_pool(x, window, bool(op.ceil), op.name == "max_pool2d")
    weights = model.tensors[op.weights]
    assert weights.data is not None
    array = signed(weights.data, weights.shape[3]) if weights.dtype == "bits" else weights.data.astype(np.float64)
    w = torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))
    (top, left), (bottom, right) = window.padding, window.after  # type: ignore[misc]
    x = F.pad(x, (left, right, top, bottom), value=float(op.pad_value))
    return F.conv2d(x, w, None, window.stride, 0, window.dilation, op.groups)


def _taken(model: PackedModel, op: Op, x: Tensor, _: dict[int, Tensor]) -> Tensor:
    index = torch.from_numpy(np.array(model.tensors[op.weights].data, np.int64))
    return torch.cat([x, torch.zeros_like(x[:, :1])], 1)[:, index]


def _cropped(_: PackedModel, op: Op, x: Tensor, __: dict[int, Tensor]) -> Tensor:
    rows, columns = (
        slice(start, start + step * (size - 1) + 1, step)
        for start, step, size in ((op.padding_h, op.stride_h, op.size_h), (op.padding_w, op.stride_w, op.size_w))
    )
    return x[:, :, rows, columns]


def _surrounded(_: PackedModel, op: Op, x: Tensor, __: dict[int, Tensor]) -> Tensor:
    around, mode = (op.padding_w, op.after_w, op.padding_h, op.after_h), OPS["pad"].modes[op.mode]
    return F.pad(x, around, mode, float(op.pad_value)) if mode == "constant" else F.pad(x, around, mode)


def _resized(_: PackedModel, op: Op, x: Tensor, __: dict[int, Tensor]) -> Tensor:
    size, mode = (op.size_h, op.size_w), OPS["resize"].modes[op.mode]
    if mode == "nearest":
        rows, columns = (torch.arange(out) * n // out for out, n in zip(size, x.shape[2:], strict=True))
        return x[:, :, rows[:, None], columns]
    return F.interpolate(x, size, mode="bilinear", align_corners=mode == "bilinear_corners")


def _shuffled(_: PackedModel, op: Op, x: Tensor, __: dict[int, Tensor]) -> Tensor:
    (n, channels, height, width), rows, columns = x.shape, op.stride_h, op.stride_w
    if op.mode:
        parts = x.view(n, channels, height // rows, rows, width // columns, columns).permute(0, 1, 3, 5, 2, 4)
        return parts.reshape(n, channels * rows * columns, height // rows, width // columns)
    rest = channels // (rows * columns)
    parts = x.view(n, rest, rows, columns, height, width).permute(0, 1, 4, 2, 5, 3)
    return parts.reshape(n, rest, height * rows, width * columns)


def _reduced(_: PackedModel, op: Op, x: Tensor, __: dict[int, Tensor]) -> Tensor:
    reduce: dict[str, Callable[..., Tensor]] = {"mean": x.mean, "sum": x.sum, "max": x.amax}
    return reduce[OPS["reduce_channels"].modes[op.mode]](1, keepdim=True)


MOVES: dict[str, Callable[[PackedModel, Op, Tensor, dict[int, Tensor]], Tensor]] = {
    "concat": lambda model, op, x, values: torch.cat([x, values[op.other]], 1),
    "xor": lambda model, op, x, values: x * values[op.other],
    "take": _taken,
    "crop": _cropped,
    "pad": _surrounded,
    "resize": _resized,
    "pixel_shuffle": _shuffled,
    "reduce_channels": _reduced,
}
"""Ops that move, repeat or reduce values, without an epilogue."""

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "elu": F.elu,
    "exp": torch.exp,
    "sqrt": torch.sqrt,
    "reciprocal": torch.reciprocal,
}


def _transposed(model: PackedModel, op: Op, x: Tensor) -> Tensor:
    w = model.tensors[op.weights]
    assert w.data is not None
    grouped = w.data.astype(np.float64).reshape(op.groups, -1, *w.shape[1:]).transpose(0, 4, 1, 2, 3)
    weights = torch.from_numpy(np.ascontiguousarray(grouped)).reshape(x.shape[1], -1, op.kernel_h, op.kernel_w)
    window = window_of(op)
    whole = F.conv_transpose2d(x, weights, None, window.stride, 0, 0, op.groups, window.dilation)
    rows, columns = window.padding
    far = (op.size_w + columns - whole.shape[3], op.size_h + rows - whole.shape[2])
    whole = F.pad(whole, (0, max(far[0], 0), 0, max(far[1], 0)))
    return whole[:, :, rows : rows + op.size_h, columns : columns + op.size_w]


def _double_pool(x: Tensor, window: Window, ceil: bool, largest: bool) -> Tensor:
    """Maxima or averages of what each window has inside the image."""
    sides = window.sides(x.shape[2], x.shape[3])
    counts = pool_output(window, x.shape[2], x.shape[3], ceil)
    far = [max(s.after, (n - 1) * s.stride + s.span - s.size - s.padding) for n, s in zip(counts, sides, strict=True)]
    around = (sides[1].padding, far[1], sides[0].padding, far[0])
    if largest:
        return F.max_pool2d(F.pad(x, around, value=-math.inf), window.size, window.stride, 0, window.dilation)
    ones = torch.ones(window.size, dtype=x.dtype).expand(x.shape[1], 1, *window.size)
    shape = (None, window.stride, 0, window.dilation, x.shape[1])
    inside = F.pad(torch.ones_like(x[:1]), around)
    return F.conv2d(F.pad(x, around), ones, *shape) / F.conv2d(inside, ones, *shape)


def _double_norm(x: Tensor, eps: np.ndarray | None, centred: bool) -> Tensor:
    """A group of channels for each eps. Shapes: [N, C, H, W], [groups] -> [N, C, H, W]."""
    added = torch.from_numpy(np.array(eps, np.float64))[:, None]
    groups = x.reshape(len(x), len(added), -1)
    if centred:
        groups = groups - groups.mean(2, keepdim=True)
    return (groups / (groups.square().mean(2, keepdim=True) + added).sqrt()).view_as(x)


def epilogue_double(model: PackedModel, op: Op, v: Tensor, values: dict[int, Tensor]) -> Tensor:
    if "scale" not in OPS[op.name].may + OPS[op.name].needs:
        return v
    constants = {field: model.tensors[index].data for field, index in op.constants().items()}
    if (table := constants.get("bias")) is not None and table.ndim == 3:
        _, _, height, width = values[op.input].shape
        constants["bias"] = border_bias(table, window_of(op), height, width)

    def given(name: str) -> Tensor | None:
        """A constant, ready to be combined with [N, C, H, W]."""
        array = constants.get(name)
        if array is None:
            return None
        tensor = torch.from_numpy(np.array(array, np.float64))
        return tensor.permute(2, 0, 1) if tensor.dim() == 3 else tensor.view(-1, 1, 1)

    def second(name: str, neutral: float) -> Tensor | float:
        """A second activation, its channels repeated."""
        index = op.fields[name]
        return neutral if index is None else values[index].repeat(1, v.shape[1] // values[index].shape[1], 1, 1)

    scale, bias, slope, low, high, scale_after, bias_after = map(given, FLOAT_FIELDS)
    factor, other = second("factor", 1.0), second("other", 0.0)
    v = v if scale is None else v * scale
    v = v if bias is None else v + bias
    v = v * factor if op.other_last else v * factor + other
    v = v if slope is None else torch.where(v >= 0, v, v * slope)
    v = v if low is None else torch.maximum(v, low)
    v = v if high is None else torch.minimum(v, high)
    v = v if scale_after is None else v * scale_after
    v = v if bias_after is None else v + bias_after
    return v + other if op.other_last else v
