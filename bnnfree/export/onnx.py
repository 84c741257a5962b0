"""A packed model as a float ONNX graph, for tools that know ONNX. Imports numpy and bnnfree.format; onnx when called.

    write_onnx(read("net.bnnf"), "net.onnx")

What it is for: looking at a network in Netron, and running it in ONNX Runtime or whatever else reads ONNX, to
compare or where bnnfree's own engines do not go. It is no way to deploy a binary network: ONNX has no bits, so
every sign is a float +1 or -1, a binary weight takes 32 times the space, and nothing runs faster for being binary.

    input   "image"   uint8 [N, H, W, C], the pixels, as Engine.run takes them; N is free
    output  "logits"  float32 [N, classes], or [N, H', W', C'] where maps come out

What is the same: the graph, op by op, each of its activations under its name, with the constants of the packed file.
Sums of signs and their thresholds are exact in float32. Padding is exact: zero after normalisation in the first
layer, by a map of biases [1, O, H', W'], and +1 or -1 where a convolution pads so, by a Pad.

What differs: a runtime sums floats in its own order and may fuse a product with a sum, so real values agree to
about six digits, not to the bit; a sign that lies within that of its threshold may come out the other way, and what
follows with it. Sums of pixels are floats too, exact up to 2^24. Softmax uses the runtime's exponential.

The class names, and the packed model's metadata are metadata properties; the names as a JSON list.

To add an op: a function (_Graph, op, its input) -> steps and a line of OPS.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bnnfree import ops
from bnnfree.errors import BnnfreeError, missing
from bnnfree.export import onnx_maps
from bnnfree.files import replacing
from bnnfree.format import Op, PackedModel, window_of
from bnnfree.format.schema import OPS as RULES
from bnnfree.ops.real import pool_windows

if TYPE_CHECKING:
    import onnx

OPSET = 17
IR_VERSION = 8  # the one that came with opset 17: older runtimes read it
MAX_FILE = (1 << 31) - (1 << 20)  # what protobuf holds in one message, less a little for the graph

F32 = np.float32
EPILOGUE = (
    ("scale", "Mul"), ("bias", "Add"), ("factor", "Mul"), ("other", "Add"), ("slope", "PRelu"), ("low", "Max"),
    ("high", "Min"), ("scale_after", "Mul"), ("bias_after", "Add"),
)  # fmt: skip
# (ONNX operator, its inputs after the first, its attributes)
Step = tuple[str, list[str], dict[str, Any]]


def to_onnx(model: PackedModel) -> onnx.ModelProto:
    """`model` as an ONNX model. Errors: BnnfreeError where onnx is not installed, or the floats exceed 2 GiB."""
    graph = _Graph(model)
    graph.chain("image/float", "image", [("Cast", [], {"to": 1}), ("Transpose", [], {"perm": [0, 3, 1, 2]})])
    graph.values[model.input] = "image/float"
    for op in model.ops:
        _add_op(graph, op)
    height, width, _ = model.tensors[model.output].shape
    flatten: Step = ("Flatten", [], {"axis": 1})
    as_images: Step = ("Transpose", [], {"perm": [0, 2, 3, 1]})
    graph.chain("logits", graph.values[model.output], [flatten if (height, width) == (1, 1) else as_images])
    return graph.finish()


def write_onnx(model: PackedModel, path: str | Path) -> int:
    """Write `model` to `path` as ONNX, whole or not at all; returns the file's size in bytes. Errors: as to_onnx."""
    blob = to_onnx(model).SerializeToString()
    with replacing(path) as temporary:
        temporary.write_bytes(blob)
    return len(blob)


def _onnx() -> Any:
    try:
        import onnx
    except ImportError:
        raise BnnfreeError(f"onnx: export needs {missing('onnx')}") from None
    return onnx


class _Graph:
    """Collects nodes and constants; every value has a name of its own, taken from the packed model's."""

    def __init__(self, model: PackedModel):
        self.onnx = _onnx()
        self.model = model
        self.nodes: list[Any] = []
        self.initialisers: list[Any] = []
        self.shapes: list[Any] = []
        self.bytes = 0
        self.taken = {"image", "image/float", "logits"}
        self.values: dict[int, str] = {}  # activation -> name of the value that holds it
        for index, tensor in enumerate(model.tensors):
            if tensor.place == "activation":
                height, width, channels = tensor.shape
                self.values[index] = name = self.unique(tensor.name)
                self.shapes.append(self.onnx.helper.make_tensor_value_info(name, 1, ["N", channels, height, width]))

    def unique(self, name: str) -> str:
        """`name`, or if something has it already `name#2` and so on."""
        free, count = name, 1
        while free in self.taken:
            count += 1
            free = f"{name}#{count}"
        self.taken.add(free)
        return free

    def constant(self, name: str, array: np.ndarray) -> str:
        """An initialiser; returns its name."""
        self.bytes += array.nbytes
        if self.bytes > MAX_FILE:
            raise BnnfreeError(
                f"onnx: got weights that take more than {MAX_FILE} bytes as floats, which no file holds."
            )
        name = self.unique(name)
        self.initialisers.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def per_channel(self, name: str, array: np.ndarray) -> str:
        """A constant of one value per channel, as [C, 1, 1]."""
        return self.constant(name, array.astype(F32).reshape(-1, 1, 1))

    def chain(self, name: str, first: str, steps: list[Step]) -> None:
        """Nodes one after the other, each on the result of the one before; the last result is called `name`."""
        steps = steps or [("Identity", [], {})]
        for number, (kind, inputs, attributes) in enumerate(steps):
            result = name if number == len(steps) - 1 else self.unique(f"{name}/{kind}")
            self.nodes.append(self.onnx.helper.make_node(kind, [first, *inputs], [result], result, **attributes))
            first = result

    def data(self, op: Op, name: str) -> np.ndarray:
        array = self.model.tensors[op.fields[name]].data  # type: ignore[index]
        assert array is not None
        return array

    def name_of(self, op: Op) -> str:
        """Name for the nodes and constants of `op`: that of the activation it writes."""
        return self.values[op.writes()[0]]

    def finish(self) -> Any:
        model, helper = self.model, self.onnx.helper
        height, width, channels = model.tensors[model.output].shape
        shape = [channels] if (height, width) == (1, 1) else [height, width, channels]
        graph = helper.make_graph(
            self.nodes,
            "bnnfree",
            [helper.make_tensor_value_info("image", 2, ["N", *model.image_shape])],
            [helper.make_tensor_value_info("logits", 1, ["N", *shape])],
            self.initialisers,
            value_info=self.shapes,
        )
        whole = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name=model.producer or "bnnfree",
        )
        helper.set_model_props(whole, {"classes": json.dumps(model.classes, ensure_ascii=False), **model.metadata})
        return whole


# -- ops


def _add_op(graph: _Graph, op: Op) -> None:
    steps = OPS[op.name](graph, op)
    source = graph.values[op.input]
    if "scale" in RULES[op.name].may + RULES[op.name].needs:
        steps = steps + _epilogue(graph, op)
    if op.real is not None:
        graph.chain(graph.values[op.real], source, steps)
        source, steps = graph.values[op.real], []
    if op.bits is not None:
        graph.chain(graph.values[op.bits], source, steps if RULES[op.name].moves else steps + _sign(graph, op))


def _epilogue(graph: _Graph, op: Op) -> list[Step]:
    """Steps after the sum, a node for each that is there."""
    name = graph.name_of(op)
    steps: list[Step] = []
    last = ("other", "Add")
    order = [*(step for step in EPILOGUE if step != last), last] if op.other_last else EPILOGUE
    for field, kind in order:
        if op.fields[field] is None:
            continue
        if field in ("other", "factor"):
            constant = _repeated(graph, op, field)
        elif field == "bias" and graph.data(op, "bias").ndim == 3:
            bias = ops.border_bias(graph.data(op, "bias"), window_of(op), *graph.model.tensors[op.input].shape[:2])
            constant = graph.constant(f"{name}/bias", bias.transpose(2, 0, 1)[None])
        else:
            constant = graph.per_channel(f"{name}/{field}", graph.data(op, field))
        steps.append((kind, [constant], {}))
    return steps


def _repeated(graph: _Graph, op: Op, field: str) -> str:
    """A second activation, its channels repeated until there are as many as the op writes."""
    tensors, index, name = graph.model.tensors, op.fields[field], graph.name_of(op)
    assert index is not None
    other, times = graph.values[index], tensors[op.writes()[0]].shape[2] // tensors[index].shape[2]
    if times == 1:
        return other
    repeats = graph.constant(f"{name}/{field}_repeats", np.array([1, times, 1, 1], np.int64))
    tiled = graph.unique(f"{name}/{field}")
    graph.chain(tiled, other, [("Tile", [repeats], {})])
    return tiled


def _sign(graph: _Graph, op: Op) -> list[Step]:
    """+1 where v >= threshold, else -1; the other way round where the bit is flipped."""
    name, channels = graph.values[op.bits], graph.model.tensors[op.bits].shape[2]
    threshold = np.zeros(1, F32) if op.threshold is None else _float_threshold(graph.data(op, "threshold"))
    above = np.ones(1, F32)
    if op.flip is not None:
        above = ops.signs(ops.unpack_bits(graph.data(op, "flip"), channels)).astype(F32)
    values = [graph.per_channel(f"{name}/{side}", sign * above) for side, sign in (("above", 1), ("below", -1))]
    return [("GreaterOrEqual", [graph.per_channel(f"{name}/threshold", threshold)], {}), ("Where", values, {})]


def _float_threshold(threshold: np.ndarray) -> np.ndarray:
    """As float32, upwards: a whole number above 2^24 may fall between two, and v >= t must stay what it is."""
    near = threshold.astype(F32)
    with np.errstate(under="ignore"):  # above 0 is a denormal; a caller may have told numpy to raise
        above = np.nextafter(near, F32(np.inf))
    return np.where(near.astype(np.float64) < threshold, above, near)


def _weights(graph: _Graph, op: Op) -> np.ndarray:
    """[O, kh, kw, C / groups] -> float32 [O, C / groups, kh, kw]; bits as +1 and -1."""
    tensor, array = graph.model.tensors[op.weights], graph.data(op, "weights")
    if tensor.dtype == "bits":
        array = ops.signs(ops.unpack_bits(array, tensor.shape[3]))
    return array.astype(F32).transpose(0, 3, 1, 2)


def _convolution(graph: _Graph, op: Op) -> list[Step]:
    """All convolutions: the sums of signs and of pixels are whole numbers in float32."""
    steps, pads = [], [op.padding_h, op.padding_w, op.after_h, op.after_w]
    if op.pad_value and any(pads):
        steps, pads = [_pad(graph, op, pads, op.pad_value)], [0] * 4
    weights = graph.constant(f"{graph.name_of(op)}/weights", _weights(graph, op))
    return [*steps, ("Conv", [weights], {**_window(op, pads), "group": op.groups})]


def _window(op: Op, pads: list[int], dilated: bool = True) -> dict[str, Any]:
    attributes = {"kernel_shape": [op.kernel_h, op.kernel_w], "strides": [op.stride_h, op.stride_w], "pads": pads}
    return {**attributes, "dilations": [op.dilation_h, op.dilation_w]} if dilated else attributes


def _pad(graph: _Graph, op: Op, pads: list[int], value: float) -> Step:
    name = graph.name_of(op)
    around = np.array([0, 0, *pads[:2], 0, 0, *pads[2:]], np.int64)
    inputs = [graph.constant(f"{name}/pads", around), graph.constant(f"{name}/pad_value", np.array(value, F32))]
    return "Pad", inputs, {}


def _pool_pads(graph: _Graph, op: Op) -> list[int]:
    """Padding: top, left, bottom, right. With ceil the far side gets what the last window hangs over.

    Why not ONNX's ceil_mode: it once kept windows that start beyond the image, and runtimes differ.
    """
    window, (height, width, _) = window_of(op), graph.model.tensors[op.input].shape
    counts = ops.pool_output(window, height, width, bool(op.ceil))
    sides = zip(counts, window.sides(height, width), strict=True)
    far = [max(s.after, (count - 1) * s.stride + s.span - s.size - s.padding) for count, s in sides]
    return [*window.padding, *far]


def _max_pool(graph: _Graph, op: Op) -> list[Step]:
    pads = _pool_pads(graph, op)
    if any(pads) and op.dilation_h * op.dilation_w > 1:
        # Why: a runtime may refuse to pad by a kernel or more, and a window may see no value at all
        return [_pad(graph, op, pads, -np.inf), ("MaxPool", [], _window(op, [0] * 4))]
    return [("MaxPool", [], _window(op, pads))]


def _avg_pool(graph: _Graph, op: Op) -> list[Step]:
    pads = _pool_pads(graph, op)
    if op.dilation_h * op.dilation_w == 1:
        return [("AveragePool", [], {**_window(op, pads, dilated=False), "count_include_pad": 0})]
    # AveragePool knows dilation from opset 19 on: a convolution with ones, divided by how many values are inside
    height, width, channels = graph.model.tensors[op.input].shape
    taps = pool_windows(np.zeros((1, height, width, 1), F32), window_of(op), bool(op.ceil))
    inside = sum(known[0, :, :, 0].astype(F32) for _, known in taps)
    name = graph.name_of(op)
    ones = graph.constant(f"{name}/ones", np.ones((channels, 1, op.kernel_h, op.kernel_w), F32))
    count = graph.constant(f"{name}/count", np.asarray(inside))
    return [("Conv", [ones], {**_window(op, pads), "group": channels}), ("Div", [count], {})]


def _norm(graph: _Graph, op: Op) -> list[Step]:
    """Over [N, groups, values of a group]. Why not GroupNormalization: it came with opset 18, and has one eps."""
    (height, width, channels), eps, name = (
        graph.model.tensors[op.input].shape,
        graph.data(op, "weights"),
        graph.name_of(op),
    )
    reshape, average = (
        graph.constant(f"{name}/groups", np.array([0, len(eps), -1], np.int64)),
        {"axes": [2], "keepdims": 1},
    )
    centred: list[Step] = [("Reshape", [reshape], {})]
    if op.name == "group_norm":
        mean = graph.unique(f"{name}/mean")
        graph.chain(mean, graph.values[op.input], [*centred, ("ReduceMean", [], average)])
        centred.append(("Sub", [mean], {}))
    deviation = graph.unique(f"{name}/deviation")
    square = graph.constant(f"{name}/two", np.array(2, F32))
    added = graph.constant(f"{name}/eps", eps.reshape(-1, 1))
    root: list[Step] = [("Pow", [square], {}), ("ReduceMean", [], average), ("Add", [added], {}), ("Sqrt", [], {})]
    graph.chain(deviation, graph.values[op.input], [*centred, *root])
    back = graph.constant(f"{name}/shape", np.array([0, channels, height, width], np.int64))
    return [*centred, ("Div", [deviation], {}), ("Reshape", [back], {})]


OPS: dict[str, Callable[[_Graph, Op], list[Step]]] = {
    "pointwise": lambda graph, op: [],
    "binary_conv2d": _convolution,
    "pixel_conv2d": _convolution,
    "conv2d": _convolution,
    "max_pool2d": _max_pool,
    "avg_pool2d": _avg_pool,
    "concat": lambda graph, op: [("Concat", [graph.values[op.other]], {"axis": 1})],
    "softmax": lambda graph, op: [("Softmax", [], {"axis": 1})],
    "group_norm": _norm,
    "rms_norm": _norm,
    **onnx_maps.OPS,
}
