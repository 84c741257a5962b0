"""A packed model as an OpenVINO graph, its binary convolutions by OpenVINO's own binary kernel. One image at a time.

Signs are FakeQuantize with two levels, binary convolutions are BinaryConvolution ("xnor-popcount"), which OpenVINO's
CPU plugin runs on bits. Its padding is exact: 0 counts nothing, +1 and -1 as such. Sums of signs are whole numbers;
floats differ in order, and a bias is taken from the threshold that follows it, so a bit within rounding of its
threshold may differ. The rest is convolutions of floats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bnnfree import ops
from bnnfree.errors import BnnfreeError
from bnnfree.format import Op, PackedModel, window_of
from bnnfree.format.schema import OPS as RULES

F32 = np.float32
WHOLE = 8  # OpenVINO's binary kernel takes multiples of so many channels; others become floats
SMALLEST = np.finfo(F32).tiny  # below this, OpenVINO may take a number for 0


def compile_openvino(model: PackedModel, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function of one image, uint8 [1, H, W, C] -> the output, flat. Error: BnnfreeError for what has no twin."""
    import openvino as ov

    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}
    graph, borrowed = to_openvino(model)
    compiled = ov.Core().compile_model(graph, "CPU", {**settings, "INFERENCE_NUM_THREADS": threads})
    request = compiled.create_infer_request()

    def run(image: np.ndarray, keep: Any = borrowed) -> np.ndarray:
        return request.infer({0: image}, share_inputs=True, share_outputs=True)[0].reshape(-1)

    return run


def to_openvino(model: PackedModel) -> tuple[Any, list[np.ndarray]]:
    """The openvino.Model, uint8 [1, H, W, C] -> float32 [1, H', W', C']; and the arrays that it reads its bits from."""
    import openvino as ov
    from openvino import opset8

    graph = _Graph(model, ov, opset8)
    image = opset8.parameter([1, *model.image_shape], np.uint8, name="image")
    channels_first = opset8.constant(np.array([0, 3, 1, 2], np.int64))
    graph.reals[model.input] = opset8.transpose(opset8.convert(image, "f32"), channels_first)
    for op in model.ops:
        if op.name not in OPS or (RULES[op.name].moves and op.bits is not None):
            raise BnnfreeError(f"openvino: got {op.name}{' of bits' * (op.bits is not None)}, which it has not.")
        v = OPS[op.name](graph, op)
        if "scale" in RULES[op.name].may + RULES[op.name].needs and not graph.whole(op):
            v = graph.epilogue(op, v)
        if op.real is not None:
            graph.reals[op.real] = v
        if op.bits is not None:
            graph.bits[op.bits] = graph.thresholds(op, v)
    channels_last = opset8.constant(np.array([0, 2, 3, 1], np.int64))
    return ov.Model([opset8.transpose(graph.reals[model.output], channels_last)], [image], "bnnfree"), graph.borrowed


class _Graph:
    """Values by activation: floats [1, C, H, W]; of bits what they come from: v, the limit, 1 where above is +1."""

    def __init__(self, model: PackedModel, openvino: Any, opset: Any):
        self.model, self.openvino, self.opset = model, openvino, opset
        self.reals: dict[int, Any] = {}
        self.bits: dict[int, tuple[Any, Any, np.ndarray]] = {}
        self.borrowed: list[np.ndarray] = []  # OpenVINO does not copy a tensor that it is given

    def data(self, op: Op, field: str) -> np.ndarray:
        array = self.model.tensors[op.fields[field]].data  # type: ignore[index]
        assert array is not None
        return array

    def whole(self, op: Op) -> bool:
        """Is the threshold one of the whole sum?"""
        return op.threshold is not None and self.model.tensors[op.threshold].dtype == "i32"

    def per_channel(self, values: np.ndarray) -> Any:
        return self.opset.constant(values.astype(F32).reshape(1, -1, 1, 1))

    def real(self, index: int) -> Any:
        """An activation as floats; bits become +1 and -1."""
        if index not in self.reals:
            v, limit, above = self.bits[index]
            high, low = self.per_channel(2 * above - 1), self.per_channel(1 - 2 * above)
            self.reals[index] = self.opset.select(self.opset.greater(v, limit), high, low)
        return self.reals[index]

    def levels(self, index: int) -> Any:
        """Bits as 1 for +1 and 0 for -1. Why not `real` of it: what no binary convolution reads goes wrong."""
        v, limit, above = self.bits[index]
        return self.opset.fake_quantize(v, limit, limit, self.per_channel(1 - above), self.per_channel(above), 2)

    def signs(self, op: Op) -> np.ndarray:
        """Weights [O, C / groups, kh, kw] as numbers."""
        tensor, array = self.model.tensors[op.weights], self.data(op, "weights")
        if tensor.dtype == "bits":
            array = ops.signs(ops.unpack_bits(array, tensor.shape[3]))
        return array.astype(F32).transpose(0, 3, 1, 2)

    def epilogue(self, op: Op, v: Any) -> Any:
        make = self.opset
        if op.scale is not None:
            v = make.multiply(v, self.per_channel(self.data(op, "scale")))
        if op.bias is not None and self.data(op, "bias").ndim == 3:
            bias = ops.border_bias(self.data(op, "bias"), window_of(op), *self.model.tensors[op.input].shape[:2])
            v = make.add(v, make.constant(np.ascontiguousarray(bias.transpose(2, 0, 1)[None])))
        elif op.bias is not None:
            v = make.add(v, self.per_channel(self.data(op, "bias")))
        if op.factor is not None:
            v = make.multiply(v, self.repeated(op, "factor"))
        if op.other is not None and not op.other_last:
            v = make.add(v, self.repeated(op, "other"))
        if op.slope is not None:
            v = make.prelu(v, make.constant(self.data(op, "slope").astype(F32)))
        if op.low is not None:
            v = make.maximum(v, self.per_channel(self.data(op, "low")))
        if op.high is not None:
            v = make.minimum(v, self.per_channel(self.data(op, "high")))
        if op.scale_after is not None:
            v = make.multiply(v, self.per_channel(self.data(op, "scale_after")))
        if op.bias_after is not None:
            v = make.add(v, self.per_channel(self.data(op, "bias_after")))
        if op.other_last:
            v = make.add(v, self.repeated(op, "other"))
        return v

    def repeated(self, op: Op, field: str) -> Any:
        """A second activation, its channels repeated until there are as many as the op writes."""
        index = op.fields[field]
        assert index is not None
        times = self.model.tensors[op.writes()[0]].shape[2] // self.model.tensors[index].shape[2]
        other = self.real(index)
        return other if times == 1 else self.opset.concat([other] * times, 1)

    def thresholds(self, op: Op, v: Any) -> tuple[Any, Any, np.ndarray]:
        channels = self.model.tensors[op.bits].shape[2]
        threshold = np.zeros(channels, F32) if op.threshold is None else self.data(op, "threshold")
        above = np.ones(channels, F32)
        if op.flip is not None:
            above -= ops.unpack_bits(self.data(op, "flip"), channels)
        return v, self.per_channel(just_below(threshold)), above


def just_below(threshold: np.ndarray) -> np.ndarray:
    """t' with v > t' where v >= t: FakeQuantize gives its higher level above its limit, not at it."""
    if threshold.dtype == np.int32:
        return (threshold.astype(np.float64) - 0.5).astype(F32)
    below = np.nextafter(threshold, F32(-np.inf))
    below = np.where(np.abs(below) < SMALLEST, -SMALLEST, below)
    return np.clip(below, np.finfo(F32).min, np.finfo(F32).max)


def said_of(model: PackedModel) -> str:
    """Remark on the graph of `model`; "" where its binary convolutions are all binary."""
    binary = [op for op in model.ops if op.name == "binary_conv2d"]
    floats = sum(_is_left_to_floats(model, op) for op in binary)
    taken = f"its binary kernel takes multiples of {WHOLE} channels, without groups"
    return f"{floats} of {len(binary)} binary convolutions run as floats; {taken}." if floats else ""


def _is_left_to_floats(model: PackedModel, op: Op) -> bool:
    return op.groups > 1 or model.tensors[op.input].shape[2] % WHOLE > 0


def _binary_conv2d(graph: _Graph, op: Op) -> Any:
    if _is_left_to_floats(graph.model, op):
        return _conv2d(graph, op)
    weights = (graph.signs(op) > 0).astype(np.uint8)
    graph.borrowed.append(np.packbits(weights.reshape(-1), bitorder="little"))
    tensor = graph.openvino.Tensor(graph.borrowed[-1], weights.shape, graph.openvino.Type.u1)
    constant = graph.openvino.op.Constant(tensor)
    window, make = _window(op), graph.opset.binary_convolution
    return make(graph.levels(op.input), constant, *window, "xnor-popcount", float(op.pad_value))


def _conv2d(graph: _Graph, op: Op) -> Any:
    make, x, w, (strides, near, far, dilations) = graph.opset, graph.real(op.input), graph.signs(op), _window(op)
    if op.pad_value and any((*near, *far)):
        around = [make.constant(np.array([0, 0, *pads])) for pads in (near, far)]
        x, near, far = make.pad(x, *around, "constant", make.constant(F32(op.pad_value))), [0, 0], [0, 0]
    if op.groups == 1:
        return make.convolution(x, make.constant(np.ascontiguousarray(w)), strides, near, far, dilations)
    grouped = np.ascontiguousarray(w.reshape(op.groups, -1, *w.shape[1:]))
    return make.group_convolution(x, make.constant(grouped), strides, near, far, dilations)


def _window(op: Op) -> tuple[list[int], list[int], list[int], list[int]]:
    """Strides, padding before and after, and dilations."""
    pads = [op.padding_h, op.padding_w], [op.after_h, op.after_w]
    return [op.stride_h, op.stride_w], *pads, [op.dilation_h, op.dilation_w]


def _pool(graph: _Graph, op: Op) -> Any:
    """Pool with far padding. Why: with ceil the last window hangs over, and runtimes differ in what they make of it."""
    strides, near, _, dilations = _window(op)
    (height, width, _), kernel = graph.model.tensors[op.input].shape, [op.kernel_h, op.kernel_w]
    counts = ops.pool_output(window_of(op), height, width, bool(op.ceil))
    sides = zip(counts, window_of(op).sides(height, width), strict=True)
    far = [max(s.after, (count - 1) * s.stride + s.span - s.size - s.padding) for count, s in sides]
    x, make = graph.real(op.input), graph.opset
    if op.name == "max_pool2d":
        return make.max_pool(x, strides, dilations, near, far, kernel).output(0)
    if dilations != [1, 1]:
        raise BnnfreeError("openvino: got an avg_pool2d with dilation, which it has not.")
    return make.avg_pool(x, strides, near, far, kernel, True)


def _norm(graph: _Graph, op: Op) -> Any:
    """Over [1, groups, values of a group]."""
    make, eps = graph.opset, graph.data(op, "weights")
    height, width, channels = graph.model.tensors[op.input].shape
    values = make.constant(np.array([2], np.int64))
    x = make.reshape(graph.real(op.input), make.constant(np.array([1, len(eps), -1], np.int64)), False)
    if op.name == "group_norm":
        x = make.subtract(x, make.reduce_mean(x, values, True))
    power = make.add(make.reduce_mean(make.multiply(x, x), values, True), make.constant(eps.reshape(1, -1, 1)))
    shape = make.constant(np.array([1, channels, height, width], np.int64))
    return make.reshape(make.divide(x, make.sqrt(power)), shape, False)


def _function(graph: _Graph, op: Op) -> Any:
    make, x, name = graph.opset, graph.real(op.input), RULES["function"].modes[op.mode]
    if name in ("gelu", "gelu_tanh"):
        return make.gelu(x, "tanh" if name == "gelu_tanh" else "erf")
    if name == "reciprocal":
        return make.divide(make.constant(F32(1)), x)
    made = {"sigmoid": make.sigmoid, "tanh": make.tanh, "silu": make.swish, "exp": make.exp, "sqrt": make.sqrt}
    return make.elu(x, 1.0) if name == "elu" else made[name](x)


def _reduced(graph: _Graph, op: Op) -> Any:
    make, axis = graph.opset, graph.opset.constant(np.array([1], np.int64))
    reduce = {"mean": make.reduce_mean, "sum": make.reduce_sum, "max": make.reduce_max}
    return reduce[RULES["reduce_channels"].modes[op.mode]](graph.real(op.input), axis, True)


def _taken(graph: _Graph, op: Op) -> Any:
    """Channels by index, zeros for -1."""
    make, index, x = graph.opset, graph.data(op, "weights"), graph.real(op.input)
    around = [make.constant(np.array(pads, np.int64)) for pads in ([0, 0, 0, 0], [0, 1, 0, 0])]
    x = make.pad(x, *around, "constant", make.constant(F32(0)))
    last = graph.model.tensors[op.input].shape[2]
    return make.gather(x, make.constant(np.where(index < 0, last, index).astype(np.int64)), make.constant(np.int64(1)))


OPS: dict[str, Callable[[_Graph, Op], Any]] = {
    "pointwise": lambda graph, op: graph.real(op.input),
    "binary_conv2d": _binary_conv2d,
    "pixel_conv2d": _conv2d,
    "conv2d": _conv2d,
    "max_pool2d": _pool,
    "avg_pool2d": _pool,
    "concat": lambda graph, op: graph.opset.concat([graph.real(op.input), graph.real(op.other)], 1),
    "softmax": lambda graph, op: graph.opset.softmax(graph.real(op.input), 1),
    "group_norm": _norm,
    "rms_norm": _norm,
    "function": _function,
    "reduce_channels": _reduced,
    "take": _taken,
}
