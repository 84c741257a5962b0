"""Rules for activations, signs, joins and functions of torch. Imports numpy, torch, bnnfree.nn and its own room.

A rule is given (Lowering, node, value, layer) for a layer, or (Lowering, node) for a function, and works on float64
numbers in the engine's order [H, W, C]; what `Value` means stands in build.py. The tables of rules: lower.py.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, fx

from bnnfree.export.pool import lower_average, lower_pool
from bnnfree.export.value import Value
from bnnfree.nn import RPReLU, RSign, Sign
from bnnfree.nn.block import Clip

if TYPE_CHECKING:
    from bnnfree.export.lower import Lowering

Rule = Callable[..., Any]
PARTS = "Slices of channels, rows and columns do."


# -- activations, signs


def sign(low: Lowering, node: fx.Node, x: Value, layer: Sign) -> Value:
    shift = low.vector(node, layer.bias, x) if isinstance(layer, RSign) else 0.0
    return low.builder.sign(x.affine(1.0, shift))


def clip(low: Lowering, node: fx.Node, x: Value, layer: Clip) -> Value:
    shift = 0.0 if layer.bias is None else low.vector(node, layer.bias, x)
    return low.builder.activate(x.affine(1.0, shift), low=-1.0, high=1.0)


def rprelu(low: Lowering, node: fx.Node, x: Value, layer: RPReLU) -> Value:
    if layer.input_shift is not None:
        x = x.affine(1.0, low.vector(node, layer.input_shift, x))
    y = low.builder.activate(x, slope=low.vector(node, layer.slope, x))
    return y.affine(1.0, low.vector(node, layer.output_shift, x))


def clamp(low: Lowering, x: Value, least: float | None, most: float | None) -> Value:
    bounds = {name: float(v) for name, v in (("low", least), ("high", most)) if v is not None}
    return low.builder.activate(x, **bounds) if bounds else x


def prelu(low: Lowering, node: fx.Node, x: Value, slope: Tensor | float) -> Value:
    return low.builder.activate(x, slope=low.vector(node, slope, x) if isinstance(slope, Tensor) else float(slope))


def softmax(low: Lowering, node: fx.Node, x: Value, dim: int | None) -> Value:
    rank = len(node.meta["shape"])
    if dim not in (1, 1 - rank):
        raise low.refuse(node, f"takes softmax along dimension {dim}, expected the channels (1)", "Use dim=1.")
    if low.is_flat(node, x):
        raise low.refuse(
            node, f"takes softmax over flattened maps of {x.shape[0]}x{x.shape[1]} positions", "Pool to 1x1 first."
        )
    x = low.builder.settle(x)
    return low.builder.emit("softmax", x, x.shape)


# -- joining


def concat(low: Lowering, node: fx.Node) -> Value:
    parts, dim = arguments(node, ("tensors", "dim"), (None, 0))
    values = [low.value(node, part) for part in parts]
    if dim not in (1, 1 - len(node.meta["shape"])):
        raise low.refuse(node, f"joins along dimension {dim}, expected the channels (1)", "")
    if len({value.shape[:2] for value in values}) > 1:
        sizes = " and ".join(f"{rows}x{columns}" for rows, columns, _ in (value.shape for value in values))
        raise low.refuse(
            node, f"joins flattened maps of {sizes} positions, expected one size", "Pool them to one size first."
        )
    return low.builder.concat(values)


def flatten(low: Lowering, node: fx.Node, x: Value, *_: Any) -> Value:
    """Only what comes to [N, values]; the order of values is the reader's business."""
    if len(node.meta["shape"]) != 2 or node.meta["shape"][1] != int(np.prod(x.shape)):
        if node.meta["shape"] == node.args[0].meta["shape"]:  # type: ignore[union-attr]
            return x
        raise low.refuse(node, f"makes {list(node.meta['shape'])} of it", "Only flattening to [N, values] is known.")
    return x


# -- functions and methods

SAME = {"axis": "dim", "split_size_or_sections": "split_size"}  # torch's other names
# Arguments that change no value in eval mode and float32, or are judged elsewhere (shapes, dropout)
WITHOUT_EFFECT = (
    "inplace",
    "dtype",
    "memory_format",
    "p",
    "training",
    "start_dim",
    "end_dim",
    "shape",
    "size",
    "_stacklevel",
    "recompute_scale_factor",
    "antialias",
)


def arguments(node: fx.Node, names: tuple[str, ...], defaults: tuple) -> list[Any]:
    """The arguments of a call by name or position, with defaults. Errors: TypeError for one that would be lost."""
    given = dict(zip(names, node.args, strict=False)) | {SAME.get(name, name): v for name, v in node.kwargs.items()}
    if lost := given.keys() - {*names, *WITHOUT_EFFECT}:
        raise TypeError(f"{', '.join(sorted(lost))} given")
    return [given.get(name, default) for name, default in zip(names, defaults, strict=True)]


def per_channel(low: Lowering, node: fx.Node, value: Any, x: Value) -> np.ndarray | float:
    """A number, or an array of one per channel."""
    if value is None:
        raise low.refuse(node, "computes with a size of its input", "Write the number.")
    if not isinstance(value, Tensor):
        return float(value)
    array = value.detach().double().numpy()
    rank = len(node.meta["shape"])
    if array.size == 1:
        return float(array.reshape(-1)[0])
    padded = (1,) * (rank - array.ndim) + array.shape
    if padded != (1, x.shape[2]) + (1,) * (rank - 2):
        raise low.refuse(
            node, f"combines an activation with a constant of shape {list(array.shape)}", "One per channel."
        )
    return array.reshape(-1)


def _check_pair(low: Lowering, node: fx.Node, a: Value, b: Value, kind: str) -> None:
    """Errors: ExportError for shapes of which neither stands for the other at each position and channel."""
    large, small = (a, b) if a.shape[0] * a.shape[1] >= b.shape[0] * b.shape[1] else (b, a)
    if large.shape[:2] == small.shape[:2] and large.shape[2] < small.shape[2]:
        large, small = small, large
    flat = low.is_flat(node, large) and large.shape != small.shape
    if small.shape[:2] not in (large.shape[:2], (1, 1)) or small.shape[2] not in (large.shape[2], 1) or flat:
        raise low.refuse(
            node,
            f"combines two activations of {sizes(a)} and {sizes(b)} by {kind}",
            "One may have one position, or one channel, where the other has more.",
        )


def arithmetic(kind: str) -> Rule:
    def rule(low: Lowering, node: fx.Node) -> Any:
        if more := node.kwargs.keys() - {"input", "other"}:
            raise low.refuse(node, f"has {', '.join(sorted(more))}", "Write it as an operation of its own.")
        given = arguments(node, ("input", "other"), (None, None))
        a, b = (low.value(node, each) if low.is_padded(each) else low.take(each) for each in given)
        if not isinstance(a, Value) and not isinstance(b, Value):
            return None  # sizes and other plain numbers
        if isinstance(a, Value) and isinstance(b, Value):
            _check_pair(low, node, a, b, kind)
            if kind == "mul":
                return low.builder.multiply(a, b)
            if kind == "div":
                return low.builder.multiply(a, low.builder.function(b, "reciprocal"))
            return low.builder.add(a, b if kind == "add" else b.affine(-1.0))
        x, other, swapped = (a, b, False) if isinstance(a, Value) else (b, a, True)
        c = per_channel(low, node, other, x)
        if kind == "add":
            return x.affine(1.0, c)
        if kind == "sub":
            return x.affine(-1.0, c) if swapped else x.affine(1.0, -c)
        if kind == "div" and swapped:
            return low.builder.function(x, "reciprocal").affine(c)
        return x.affine(c if kind == "mul" else 1 / c)

    return rule


def on(function: Callable[..., Any], names: tuple[str, ...] = (), defaults: tuple = ()) -> Rule:
    """A rule for a call whose first argument is the activation."""

    def rule(low: Lowering, node: fx.Node) -> Any:
        x, *rest = arguments(node, ("input", *names), (None, *defaults))
        return function(low, node, low.value(node, x), *(low.take(value) for value in rest))

    return rule


def mean(low: Lowering, node: fx.Node, x: Value, dim: Any, keepdim: Any) -> Value:
    if dim is None or sorted(d % 4 for d in (dim if isinstance(dim, (list, tuple)) else [dim])) != [2, 3]:
        raise low.refuse(node, f"averages over dimensions {dim}", "Over rows and columns: mean((2, 3)).")
    return lower_pool(low, node, x, "avg_pool2d", x.shape[:2], x.shape[:2], 0, 1, False)


def sizes(x: Value) -> str:
    return "x".join(map(str, x.shape))


def maximum(low: Lowering, node: fx.Node) -> Value:
    a, b = (low.take(argument) for argument in arguments(node, ("input", "other"), (None, None)))
    x, other = (a, b) if isinstance(a, Value) else (b, a)
    if not isinstance(x, Value) or not isinstance(other, Tensor):
        raise low.refuse(
            node, "takes a maximum that is not one of an activation and a constant tensor", "Use torch.clamp(x, min=0)."
        )
    return low.builder.activate(x, low=per_channel(low, node, other, x))


def bounded(low: Lowering, node: fx.Node, x: Value, least: Any, most: Any) -> Value:
    bounds = {name: per_channel(low, node, v, x) for name, v in (("low", least), ("high", most)) if v is not None}
    return low.builder.activate(x, **bounds) if bounds else x


def plain(low: Lowering, node: fx.Node) -> None:
    """Sizes, shapes and other numbers that only say how to reshape."""
    asked = node.args[1] if len(node.args) > 1 else None
    if node.op == "call_method" or (node.target is getattr and asked in ("shape", "ndim", "dtype", "device")):
        return
    if any(isinstance(low.take(argument), Value) for argument in node.args):
        part = node.target in (operator.getitem, getattr)
        why = f"takes a part of an activation ({asked})" if part else "divides an activation without a rest"
        raise low.refuse(node, why, PARTS if part else "")


def passed(low: Lowering, node: fx.Node, x: Value, *_: Any) -> Value:
    """x itself."""
    return x


relu = on(lambda low, node, x, *_: clamp(low, x, 0.0, None))
relu6 = on(lambda low, node, x, *_: clamp(low, x, 0.0, 6.0))
hardtanh = on(lambda low, node, x, least, most: clamp(low, x, least, most), ("min_val", "max_val"), (-1.0, 1.0))
leaky_relu = on(prelu, ("negative_slope",), (0.01,))
clamp_call = on(bounded, ("min", "max"), (None, None))
prelu_call = on(prelu, ("weight",), (None,))
pass_call = on(passed)
flatten_call = on(flatten)
mean_call = on(mean, ("dim", "keepdim"), (None, False))
softmax_call = on(softmax, ("dim",), (None,))
negative = on(lambda low, node, x: x.affine(-1.0))
_POOL = ("kernel_size", "stride", "padding")
max_pool_call = on(
    lambda low, node, x, k, s, p, d, ceil, _: lower_pool(low, node, x, "max_pool2d", k, s, p, d, ceil),
    (*_POOL, "dilation", "ceil_mode", "return_indices"),
    (None, None, 0, 1, False, False),
)
avg_pool_call = on(
    lower_average,
    (*_POOL, "ceil_mode", "count_include_pad", "divisor_override"),
    (None, None, 0, False, True, None),
)
