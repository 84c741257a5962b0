"""Rules for what moves, resizes or reduces maps. Imports numpy, torch and its own room.

What no op computes by itself is put together of others. Some nodes stand for no map until another takes them up:
`Padded` (a padding that a convolution takes as its own), `Grouped` (channels seen in two dimensions) and `Last` (a map
with its channels last).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from bnnfree.export.rules import arguments, flatten, mean, on, sizes
from bnnfree.export.value import Value
from bnnfree.format.schema import OPS

if TYPE_CHECKING:
    from bnnfree.export.lower import Lowering


@dataclass(frozen=True, eq=False)
class Padded:
    """`value` with rows and columns of `fill` around it: above, on the left, below, on the right."""

    value: Value
    around: tuple[int, int, int, int]
    fill: float


@dataclass(frozen=True, eq=False)
class Grouped:
    """The channels of `value` as [groups, rest]; swapped: as [rest, groups]."""

    value: Value
    groups: int
    swapped: bool = False


@dataclass(frozen=True, eq=False)
class Last:
    """`value` as [N, H, W, C]."""

    value: Value


# -- padding


def pad_call(low: Lowering, node: fx.Node) -> Any:
    x, around, mode, value = arguments(node, ("input", "pad", "mode", "value"), (None, None, "constant", None))
    return padded(low, node, low.value(node, x), low.number(around), mode, value)


def padded(low: Lowering, node: fx.Node, x: Value, around: Any, mode: str, value: float | None = None) -> Any:
    """As F.pad has it: columns before and after, rows, then channels; negative ones crop."""
    numbers = [int(n) for n in ((around,) * 4 if isinstance(around, int) else around)] + [0] * 6
    left, right, top, bottom, first, last = numbers[:6]
    fill = float(value or 0.0)
    if any(numbers[6:]) or ((first or last) and (mode != "constant" or fill)):
        raise low.refuse(node, f"pads {list(around)} by {mode} {fill}", "Channels can be padded with 0, images not.")
    if first or last:
        index = np.concatenate([np.full(max(first, 0), -1), np.arange(x.shape[2]), np.full(max(last, 0), -1)])
        x = low.builder.take(x, index[max(-first, 0) : len(index) - max(-last, 0)])
    if min(left, right, top, bottom) < 0:
        rows, columns, _ = x.shape
        start = (max(-top, 0), max(-left, 0))
        size = (rows - start[0] - max(-bottom, 0), columns - start[1] - max(-right, 0))
        x = _crop(low, x, start, (1, 1), size)
        left, right, top, bottom = (max(n, 0) for n in (left, right, top, bottom))
    if not any((left, right, top, bottom)):
        return x
    if mode == "constant":
        return Padded(x, (top, left, bottom, right), fill)
    modes = OPS["pad"].modes
    if mode not in modes:
        raise low.refuse(node, f"pads by {mode}", f"Known are {', '.join(modes)}.")
    return low.builder.pad(x, (top, left, bottom, right), modes.index(mode))


def pad_layer(mode: str) -> Any:
    def rule(low: Lowering, node: fx.Node, x: Value, layer: Any) -> Any:
        return padded(low, node, x, layer.padding, mode, getattr(layer, "value", 0.0))

    return rule


# -- parts of maps


def _crop(low: Lowering, x: Value, start: tuple[int, int], step: tuple[int, int], size: tuple[int, int]) -> Value:
    fields = {"padding": start, "stride": step, "size": size}
    named = {f"{name}_{axis}": pair[i] for name, pair in fields.items() for i, axis in enumerate("hw")}
    return low.builder.move("crop", x, (*size, x.shape[2]), **named)


def item(low: Lowering, node: fx.Node) -> Any:
    """x[...]: slices of channels, rows and columns; of several parts the one of that number."""
    from bnnfree.export.rules import plain

    source, asked = node.args[0], low.number(node.args[1])
    x = low.take(source)
    if isinstance(x, list) and isinstance(asked, int):
        return x[asked]
    if not isinstance(x, Value):
        return plain(low, node)
    if getattr(source, "meta", {}).get("shape") is not None and len(source.meta["shape"]) == 2:  # type: ignore[union-attr]
        return _vector_item(low, node, x, asked)
    parts = list(asked) if isinstance(asked, tuple) else [asked]
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        parts[at : at + 1] = [slice(None)] * (4 - len(parts) + 1)
    parts += [slice(None)] * (4 - len(parts))
    if len(parts) != 4 or not all(isinstance(part, slice) for part in parts) or parts[0] != slice(None):
        raise low.refuse(node, f"takes a part of an activation ({asked})", "Slices of channels, rows and columns do.")
    rows, columns, channels = x.shape
    chosen = [range(n)[part] for n, part in zip((channels, rows, columns), parts[1:], strict=True)]
    if not all(chosen):
        raise low.refuse(node, f"takes an empty part of an activation ({asked})", "")
    if len(chosen[0]) < channels:
        x = low.builder.take(x, np.array(chosen[0]))
    down, across = chosen[1:]
    if (len(down), len(across)) != (rows, columns):
        x = _crop(low, x, (down.start, across.start), (down.step, across.step), (len(down), len(across)))
    return x


def _vector_item(low: Lowering, node: fx.Node, x: Value, asked: Any) -> Value:
    """A vector as a map of one position: x[:, :, None, None]; or some of its values."""
    parts = list(asked) if isinstance(asked, tuple) else [asked]
    kept = [part for part in parts if part is not None]
    shape = node.meta["shape"]
    if low.is_flat(node.args[0], x) or not all(isinstance(part, slice) for part in kept):  # type: ignore[arg-type]
        raise low.refuse(node, f"takes a part of an activation ({asked})", "Slices of values do.")
    chosen = range(x.shape[2])[kept[1]] if len(kept) > 1 else range(x.shape[2])
    if len(shape) not in (2, 4) or shape[1] != len(chosen):
        raise low.refuse(node, f"makes {list(shape)} of it", "[N, C] and [N, C, 1, 1] are known.")
    return x if len(chosen) == x.shape[2] else low.builder.take(x, np.array(chosen))


def chunked(low: Lowering, node: fx.Node) -> list[Value]:
    """chunk along the channels."""
    x, count, dim = arguments(node, ("input", "chunks", "dim"), (None, None, 0))
    channels = low.value(node, x).shape[2]
    return _parts(low, node, x, dim, -(-channels // count))


def divided(low: Lowering, node: fx.Node) -> list[Value]:
    """split along the channels."""
    x, size, dim = arguments(node, ("tensor", "split_size", "dim"), (None, None, 0))
    return _parts(low, node, x, dim, size)


def _parts(low: Lowering, node: fx.Node, x: fx.Node, dim: int, size: Any) -> list[Value]:
    if dim not in (1, 1 - len(x.meta["shape"])):
        raise low.refuse(node, f"divides dimension {dim}, expected the channels (1)", "")
    value = low.builder.share(low.value(node, x))
    channels = value.shape[2]
    each = (
        list(size) if isinstance(size, list | tuple) else [min(size, channels - at) for at in range(0, channels, size)]
    )
    ends = np.cumsum([0, *each])
    return [low.builder.take(value, np.arange(a, b)) for a, b in zip(ends[:-1], ends[1:], strict=True)]


# -- other views of a map


def view(low: Lowering, node: fx.Node) -> Any:
    """view, reshape, flatten: to one vector per image, to channels in two dimensions, and back."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    x, shape = low.take(first), node.meta["shape"]
    if isinstance(x, Grouped):
        rows, columns, channels = x.value.shape
        if tuple(shape[1:]) != (channels, rows, columns):
            raise low.refuse(node, f"makes {list(shape)} of it", "[N, C, H, W] is known.")
        order = np.arange(channels).reshape(x.groups, -1)
        return low.builder.take(x.value, order.T.reshape(-1)) if x.swapped else x.value
    if isinstance(x, Value) and len(shape) == 5 and tuple(shape[3:]) == x.shape[:2]:
        return Grouped(x, shape[1])
    if isinstance(x, Value) and len(shape) == 4 and x.shape[:2] == (1, 1) and tuple(shape[1:]) == (x.shape[2], 1, 1):
        return x
    value = low.value(node, first)
    return flatten(low, node, value)


def transposed(low: Lowering, node: fx.Node) -> Any:
    """transpose and permute: of Grouped the two dimensions, of a map its channels to the end and back."""
    x = low.take(node.args[0])
    given: Any = node.args[1:] or node.kwargs.get("dims", ())
    dims: list[int] = [part for arg in given for part in (arg if isinstance(arg, list | tuple) else [arg])]
    rank = len(node.meta["shape"])
    order = list(range(rank))
    if len(dims) == 2 and rank != 2:
        a, b = (d % rank for d in dims)
        order[a], order[b] = b, a
    else:
        order = [d % rank for d in dims]
    if isinstance(x, Grouped) and order == [0, 2, 1, 3, 4]:
        return Grouped(x.value, x.groups, not x.swapped)
    if isinstance(x, Value) and order == [0, 2, 3, 1]:
        return Last(x)
    if isinstance(x, Last) and order == [0, 3, 1, 2]:
        return x.value
    if order == list(range(rank)):
        return x
    raise low.refuse(
        node, f"reorders dimensions to {order}", "Channels to the end and back (0, 2, 3, 1), and two of channels, do."
    )


def mean_of(low: Lowering, node: fx.Node) -> Any:
    """mean over rows and columns, over channels, or over one of two dimensions of channels."""
    x, dim, keep = arguments(node, ("input", "dim", "keepdim"), (None, None, False))
    value = low.take(x)
    rank = len(x.meta["shape"])
    dims = sorted(d % rank for d in (dim if isinstance(dim, list | tuple) else [dim])) if dim is not None else None
    if isinstance(value, Grouped) and dims in ([1], [2]):
        order = np.arange(value.value.shape[2]).reshape(value.groups, -1)
        order = order.T if value.swapped else order
        order = order if dims == [2] else order.T
        source = low.builder.share(value.value)
        total = low.builder.take(source, order[:, 0])
        for column in order.T[1:]:
            total = low.builder.add(total, low.builder.take(source, column))
        return total.affine(1 / order.shape[1])
    if dims == [1] and keep and isinstance(value, Value) and rank == 4:
        return _over_channels(low, value, "mean")
    return mean(low, node, low.value(node, x), dim, keep)


def _over_channels(low: Lowering, x: Value, name: str) -> Value:
    x = low.builder.settle(x)
    return low.builder.emit("reduce_channels", x, (*x.shape[:2], 1), mode=OPS["reduce_channels"].modes.index(name))


def reduced(name: str) -> Any:
    """sum, amax and amin over channels (with keepdim), or over rows and columns."""

    def rule(low: Lowering, node: fx.Node) -> Value:
        x, dim, keep = arguments(node, ("input", "dim", "keepdim"), (None, None, False))
        value, rank = low.value(node, x), len(x.meta["shape"])
        dims = sorted(d % rank for d in (dim if isinstance(dim, list | tuple) else [dim])) if dim is not None else None
        if dims == [1] and keep and rank == 4:
            if name == "min":
                return _over_channels(low, value.affine(-1.0), "max").affine(-1.0)
            return _over_channels(low, value, name)
        if dims != [2, 3] or rank != 4:
            raise low.refuse(node, f"reduces dimensions {dim}", "Rows and columns, or channels with keepdim, do.")
        rows, columns, _ = value.shape
        if name == "sum":
            return mean(low, node, value, (2, 3), keep).affine(float(rows * columns))
        from bnnfree.export.pool import lower_pool

        sign = -1.0 if name == "min" else 1.0
        best = lower_pool(
            low, node, value.affine(sign) if name == "min" else value, "max_pool2d", (rows, columns), None, 0, 1, False
        )
        return best.affine(sign) if name == "min" else best

    return rule


# -- other sizes


def resized(low: Lowering, node: fx.Node, x: Value, mode: str, corners: bool | None, size: Any, scale: Any) -> Value:
    """interpolate and Upsample."""
    rows, columns, channels = low.shape(node)
    if mode not in ("nearest", "bilinear"):
        raise low.refuse(node, f"resizes by {mode}", "Use nearest or bilinear.")
    if mode == "bilinear" and scale is not None and not corners:
        factors = scale if isinstance(scale, list | tuple) else (scale, scale)
        exact = [n * f for n, f in zip(x.shape[:2], factors, strict=True)]
        if (rows, columns) != tuple(exact):
            raise low.refuse(node, f"resizes {sizes(x)} by {scale}, which gives no whole size", "Give the size.")
    if mode == "nearest":
        for n, out in ((x.shape[0], rows), (x.shape[1], columns)):
            positions = torch.arange(n, dtype=torch.float64).view(1, 1, n, 1)
            given = {"scale_factor": (out / n, 1.0)} if scale is not None else {"size": (out, 1)}
            theirs = F.interpolate(positions, **given, mode="nearest").view(-1)  # type: ignore[arg-type]
            if len(theirs) != out or not torch.equal(theirs, (torch.arange(out) * n // out).double()):
                raise low.refuse(node, f"resizes {n} to {out} by positions that torch rounds", "Use a whole factor.")
    name = "bilinear_corners" if mode == "bilinear" and corners else mode
    x = low.builder.settle(x) if x.kind != "real" or x.repeat > 1 else x
    fields: dict[str, Any] = {"mode": OPS["resize"].modes.index(name), "size_h": rows, "size_w": columns}
    made = low.builder.emit("resize", x, (rows, columns, channels), **fields)
    return made.like(x)


def upsample(low: Lowering, node: fx.Node, x: Value, layer: nn.Upsample) -> Value:
    return resized(low, node, x, layer.mode, layer.align_corners, layer.size, layer.scale_factor)


interpolate = on(
    lambda low, node, x, size, scale, mode, corners: resized(low, node, x, mode, corners, size, scale),
    ("size", "scale_factor", "mode", "align_corners"),
    (None, None, "nearest", None),
)


def shuffled(low: Lowering, node: fx.Node, x: Value, factor: int, back: bool = False) -> Value:
    """Between channels and positions."""
    x = low.builder.settle(x)
    rows, columns, channels = low.shape(node)
    fields: dict[str, Any] = {"mode": int(back), "stride_h": factor, "stride_w": factor}
    return low.builder.emit("pixel_shuffle", x, (rows, columns, channels), **fields)


def channel_shuffle(low: Lowering, node: fx.Node, x: Value, groups: int) -> Value:
    return low.builder.take(x, np.arange(x.shape[2]).reshape(groups, -1).T.reshape(-1))


def conv_transpose(low: Lowering, node: fx.Node, x: Value, layer: nn.ConvTranspose2d) -> Value:
    rows, columns, channels = low.shape(node)
    w = layer.weight.detach().double().numpy()  # [C, O / groups, kh, kw]
    grouped = w.reshape(layer.groups, -1, *w.shape[1:]).transpose(0, 2, 3, 4, 1)
    pairs = {"kernel": layer.kernel_size, "stride": layer.stride, "dilation": layer.dilation, "padding": layer.padding}
    fields: dict[str, Any] = {
        f"{name}_{axis}": int(pair[i]) for name, pair in pairs.items() for i, axis in enumerate("hw")
    }
    x = low.builder.settle(x)
    y = low.builder.emit(
        "conv_transpose2d", x, (rows, columns, channels), groups=layer.groups, size_h=rows, size_w=columns, **fields
    )
    low.builder.constant(y, "weights", grouped.reshape(channels, *w.shape[2:], -1))
    return y if layer.bias is None else y.affine(1.0, low.vector(node, layer.bias, y))


# -- norms


def instance_norm(low: Lowering, node: fx.Node, x: Value, layer: nn.InstanceNorm2d) -> Value:
    if layer.running_mean is not None and layer.running_var is not None:
        from bnnfree.export.norms import lower_batch_norm

        return lower_batch_norm(low, node, x, layer)  # type: ignore[arg-type]
    y = low.builder.emit("group_norm", low.builder.settle(x), x.shape)
    low.builder.constant(y, "weights", np.full(x.shape[2], layer.eps))
    y = y if layer.weight is None else y.affine(low.vector(node, layer.weight, y))
    return y if layer.bias is None else y.affine(1.0, low.vector(node, layer.bias, y))


def layer_norm(low: Lowering, node: fx.Node, x: Value, layer: nn.LayerNorm) -> Value:
    """Over the channels of each position, where they are last; over all of a map, with one gain and bias."""
    shape, (rows, columns, channels) = tuple(layer.normalized_shape), x.shape
    weight, bias = (None if v is None else v.detach().double().numpy() for v in (layer.weight, layer.bias))
    if shape == (channels,):
        name, eps = "channel_norm", np.array([layer.eps])
    elif shape == (channels, rows, columns):
        name, eps = "group_norm", np.array([layer.eps])
        per_channel = [None if v is None else v.reshape(channels, -1) for v in (weight, bias)]
        if any(v is not None and (v != v[:, :1]).any() for v in per_channel):
            raise low.refuse(
                node,
                "has a gain or bias that differs from position to position, of which the engine has none",
                "GroupNorm(1, C) has one per channel.",
            )
        weight, bias = (None if v is None else v[:, 0] for v in per_channel)
    else:
        raise low.refuse(node, f"normalises over {list(shape)} of {sizes(x)}", "Over channels, or the whole map.")
    y = low.builder.emit(name, low.builder.settle(x), x.shape)
    low.builder.constant(y, "weights", eps)
    y = y if weight is None else y.affine(low.vector(node, weight, y))
    return y if bias is None else y.affine(1.0, low.vector(node, bias, y))
