"""ONNX of functions of single values, and of ops that move, repeat or reduce the values of maps. Imports numpy.

Each takes (graph, op) and gives the steps of bnnfree.export.onnx; maps are [N, C, H, W].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bnnfree.format import Op
from bnnfree.format.schema import OPS as RULES
from bnnfree.ops.maps import resize_positions

F32 = np.float32
Step = tuple[str, list[str], dict[str, Any]]
Graph = Any  # bnnfree.export.onnx._Graph


def mode_of(op: Op) -> str:
    return RULES[op.name].modes[op.mode]


def _shape(graph: Graph, op: Op) -> tuple[int, int, int]:
    return graph.model.tensors[op.input].shape


def _number(graph: Graph, op: Op, name: str, value: float) -> str:
    return graph.constant(graph.unique(f"{graph.name_of(op)}/{name}"), np.array(value, F32))


def _whole(graph: Graph, op: Op, name: str, values: Any) -> str:
    return graph.constant(graph.unique(f"{graph.name_of(op)}/{name}"), np.array(values, np.int64))


def _times_input(graph: Graph, op: Op, steps: list[Step]) -> list[Step]:
    """The input times what `steps` make of it."""
    gate = graph.unique(f"{graph.name_of(op)}/gate")
    graph.chain(gate, graph.values[op.input], steps)
    return [("Mul", [gate], {})]


def function(graph: Graph, op: Op) -> list[Step]:
    def number(value: float) -> list[str]:
        return [_number(graph, op, "number", value)]

    name = mode_of(op)
    if name == "silu":
        return _times_input(graph, op, [("Sigmoid", [], {})])
    if name == "gelu":
        half: list[Step] = [("Mul", number(0.5**0.5), {}), ("Erf", [], {}), ("Add", number(1.0), {})]
        return _times_input(graph, op, [*half, ("Mul", number(0.5), {})])
    if name == "gelu_tanh":
        cube: list[Step] = [("Mul", [graph.values[op.input]], {}), ("Mul", number(0.044715), {})]
        inner: list[Step] = [*cube, ("Add", number(1.0), {}), ("Mul", [graph.values[op.input]], {})]
        return _times_input(graph, op, [*inner, ("Mul", number(1.5957691), {}), ("Sigmoid", [], {})])
    return [({"exp": "Exp", "sqrt": "Sqrt"}.get(name, name.capitalize()), [], {})]


def channel_norm(graph: Graph, op: Op) -> list[Step]:
    average = {"axes": [1], "keepdims": 1}
    name, source = graph.name_of(op), graph.values[op.input]
    centred: list[Step] = []
    if mode_of(op) == "centred":
        mean = graph.unique(f"{name}/mean")
        graph.chain(mean, source, [("ReduceMean", [], average)])
        centred = [("Sub", [mean], {})]
    deviation = graph.unique(f"{name}/deviation")
    eps = _number(graph, op, "eps", float(graph.data(op, "weights")[0]))
    root: list[Step] = [("Pow", [_number(graph, op, "two", 2.0)], {}), ("ReduceMean", [], average)]
    graph.chain(deviation, source, [*centred, *root, ("Add", [eps], {}), ("Sqrt", [], {})])
    return [*centred, ("Div", [deviation], {})]


def conv_transpose2d(graph: Graph, op: Op) -> list[Step]:
    height, width, channels = _shape(graph, op)
    w = graph.data(op, "weights")  # [O, kh, kw, C / groups]
    grouped = w.reshape(op.groups, -1, *w.shape[1:]).transpose(
        0, 4, 1, 2, 3
    )  # [groups, C / groups, O / groups, kh, kw]
    weights = np.ascontiguousarray(grouped).reshape(channels, -1, op.kernel_h, op.kernel_w)
    more = []
    for axis, side in (("h", height), ("w", width)):
        f = {name: op.fields[f"{name}_{axis}"] or 0 for name in ("kernel", "stride", "padding", "dilation", "size")}
        more.append(f["size"] - ((side - 1) * f["stride"] + f["dilation"] * (f["kernel"] - 1) + 1 - 2 * f["padding"]))
    attributes = {
        "kernel_shape": [op.kernel_h, op.kernel_w],
        "strides": [op.stride_h, op.stride_w],
        "pads": [op.padding_h, op.padding_w] * 2,
        "dilations": [op.dilation_h, op.dilation_w],
        "output_padding": more,
        "group": op.groups,
    }
    return [("ConvTranspose", [graph.constant(f"{graph.name_of(op)}/weights", weights)], attributes)]


def _gathered(graph: Graph, op: Op, axis: int, index: np.ndarray) -> Step:
    return "Gather", [_whole(graph, op, f"index{axis}", index)], {"axis": axis}


def take(graph: Graph, op: Op) -> list[Step]:
    """Channels by index. Where one is -1 a channel of zeros comes behind the last, which -1 then means."""
    index = graph.data(op, "weights")
    zeros: list[Step] = []
    if (index < 0).any():
        around = _whole(graph, op, "pads", [0, 0, 0, 0, 0, 1, 0, 0])
        zeros = [("Pad", [around, _number(graph, op, "zero", 0.0)], {})]
    return [*zeros, _gathered(graph, op, 1, index)]


def crop(graph: Graph, op: Op) -> list[Step]:
    start, step = np.array([op.padding_h, op.padding_w]), np.array([op.stride_h, op.stride_w])
    end = start + step * (np.array([op.size_h, op.size_w]) - 1) + 1
    inputs = [
        _whole(graph, op, name, v) for name, v in (("start", start), ("end", end), ("axes", [2, 3]), ("step", step))
    ]
    return [("Slice", inputs, {})]


def pad(graph: Graph, op: Op) -> list[Step]:
    if mode_of(op) == "constant":
        around = _whole(graph, op, "pads", [0, 0, op.padding_h, op.padding_w, 0, 0, op.after_h, op.after_w])
        return [("Pad", [around, _number(graph, op, "value", op.pad_value)], {})]
    kinds = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    steps = []
    for axis, side in ((2, "h"), (3, "w")):
        near, far = op.fields[f"padding_{side}"], op.fields[f"after_{side}"]
        positions = np.arange(_shape(graph, op)[axis - 2])
        index = np.pad(positions, (near, far), kinds[mode_of(op)])  # type: ignore[call-overload]
        steps.append(_gathered(graph, op, axis, index))
    return steps


def resize(graph: Graph, op: Op) -> list[Step]:
    """Gathered rows and columns. Why not Resize: it computes positions in floats, and wants the number of images."""
    height, width, _ = _shape(graph, op)
    return _between(graph, op, [], [(2, height, op.size_h), (3, width, op.size_w)])


def _between(graph: Graph, op: Op, steps: list[Step], sides: list[tuple[int, int, int]]) -> list[Step]:
    """`steps`, then each of `sides` (axis, size, new size): two neighbours, each times its share."""
    if not sides:
        return steps
    (axis, size, out), *rest = sides
    first, second, weight = resize_positions(size, out, mode_of(op))
    near = _between(graph, op, [*steps, _gathered(graph, op, axis, first)], rest)
    if mode_of(op) == "nearest":
        return near
    shape = [1, 1, 1, 1]
    shape[axis] = out
    shares = [
        graph.constant(graph.unique(f"{graph.name_of(op)}/share"), share.reshape(shape))
        for share in (F32(1) - weight, weight)
    ]
    far = graph.unique(f"{graph.name_of(op)}/far")
    other = _between(graph, op, [*steps, _gathered(graph, op, axis, second)], rest)
    graph.chain(far, graph.values[op.input], [*other, ("Mul", [shares[1]], {})])
    return [*near, ("Mul", [shares[0]], {}), ("Add", [far], {})]


def pixel_shuffle(graph: Graph, op: Op) -> list[Step]:
    height, width, channels = _shape(graph, op)
    rows, columns = op.stride_h, op.stride_w
    if mode_of(op) == "shuffle":
        rest = channels // (rows * columns)
        parts, order = [0, rest, rows, columns, height, width], [0, 1, 4, 2, 5, 3]
        whole = [0, rest, height * rows, width * columns]
    else:
        parts, order = [0, channels, height // rows, rows, width // columns, columns], [0, 1, 3, 5, 2, 4]
        whole = [0, channels * rows * columns, height // rows, width // columns]
    first, last = (_whole(graph, op, name, shape) for name, shape in (("parts", parts), ("whole", whole)))
    return [("Reshape", [first], {}), ("Transpose", [], {"perm": order}), ("Reshape", [last], {})]


def reduce_channels(graph: Graph, op: Op) -> list[Step]:
    name = mode_of(op)
    if name == "sum":
        return [("ReduceSum", [_whole(graph, op, "axes", [1])], {"keepdims": 1})]
    return [(f"Reduce{name.capitalize()}", [], {"axes": [1], "keepdims": 1})]


OPS: dict[str, Callable[[Graph, Op], list[Step]]] = {
    "channel_norm": channel_norm,
    "function": function,
    "conv_transpose2d": conv_transpose2d,
    "take": take,
    "crop": crop,
    "pad": pad,
    "resize": resize,
    "pixel_shuffle": pixel_shuffle,
    "reduce_channels": reduce_channels,
    "xor": lambda graph, op: [("Mul", [graph.values[op.other]], {})],
}
