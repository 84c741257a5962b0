"""Lower pooling to ops: maxima and averages over windows. Imports numpy, torch, bnnfree.ops and its own room."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import fx, nn

from bnnfree.export.value import Value
from bnnfree.ops import Window, pool_output

if TYPE_CHECKING:
    from bnnfree.export.lower import Lowering


def lower_pool(
    low: Lowering, node: fx.Node, x: Value, name: str, kernel, stride, padding, dilation, ceil_mode
) -> Value:
    """The op `name` (max_pool2d or avg_pool2d) of such windows; numbers or pairs of them."""
    pairs = [(v, v) if isinstance(v, int) else tuple(v) for v in (kernel, stride or kernel, padding, dilation)]
    window, build = Window(*pairs), low.builder
    if name == "max_pool2d" and x.kind == "bits" and not (x.shifted or x.signed or (x.scale <= 0).any()):
        kind = "bits"
    else:
        x, kind = build.as_tensor(x), "real"
    if name == "max_pool2d" and kind == "real" and (x.signed or not np.all(x.scale > 0)):
        x = build.settle(x)
    names, pairs = ("kernel", "stride", "padding", "dilation", "after"), [*pairs, pairs[2]]
    fields = {f"{n}_{axis}": pair[i] for n, pair in zip(names, pairs, strict=True) for i, axis in enumerate("hw")}
    rows, columns = pool_output(window, *x.shape[:2], bool(ceil_mode))
    if (rows, columns) != low.shape(node)[:2]:
        raise low.refuse(node, f"gives {low.shape(node)[:2]}, the engine's pooling {(rows, columns)}", "")
    made = build.emit(name, x, (rows, columns, x.shape[2]), kind=kind, ceil=int(bool(ceil_mode)), **fields)
    return made.like(x)


def lower_max_pool(low: Lowering, node: fx.Node, x: Value, layer: nn.MaxPool2d) -> Value:
    shape = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.ceil_mode)
    return lower_pool(low, node, x, "max_pool2d", *shape)


def lower_avg_pool(low: Lowering, node: fx.Node, x: Value, layer: nn.AvgPool2d) -> Value:
    rest = (layer.ceil_mode, layer.count_include_pad, layer.divisor_override)
    return lower_average(low, node, x, layer.kernel_size, layer.stride, layer.padding, *rest)


def lower_average(low, node, x, kernel, stride=None, padding=0, ceil=False, include_pad=True, divisor=None) -> Value:
    """An average over windows; where it divides by what is on the padding too, that is an op of its own."""
    sides = (padding, padding) if isinstance(padding, int) else tuple(padding)
    rows, columns = (kernel, kernel) if isinstance(kernel, int) else kernel
    if any(sides) and include_pad and not divisor:
        if ceil:
            raise low.refuse(
                node, "counts padding, and windows that hang over the edge", "Use count_include_pad=False."
            )
        x = low.builder.pad(x, (sides[0], sides[1], sides[0], sides[1]))
        return lower_pool(low, node, x, "avg_pool2d", kernel, stride, 0, 1, ceil)
    y = lower_pool(low, node, x, "avg_pool2d", kernel, stride, padding, 1, ceil)
    if divisor and (any(sides) or ceil):
        raise low.refuse(node, "has a divisor, and windows that are partly outside", "Leave out divisor_override.")
    return y.affine(rows * columns / divisor) if divisor else y


def lower_adaptive(name: str) -> Callable[..., Any]:
    """A rule for pooling to a size, where all windows are of one size."""

    def rule(low: Lowering, node: fx.Node, x: Value, layer: Any) -> Value:
        rows, columns, _ = low.shape(node)
        if x.shape[0] % rows or x.shape[1] % columns:
            raise low.refuse(
                node, f"maps {x.shape[:2]} to {(rows, columns)}, whose windows differ in size", "Use sizes that divide."
            )
        kernel = (x.shape[0] // rows, x.shape[1] // columns)
        return lower_pool(low, node, x, name, kernel, kernel, 0, 1, False)

    return rule
