"""What must hold of a packed model beyond its layout. Imports numpy, bnnfree.ops (geometry) and bnnfree.format.

`check_model` is what a reader trusts a file by: after it, an engine may run the ops without a look at their
numbers. Each rule has one named error.
"""

from __future__ import annotations

import numpy as np

from bnnfree.errors import BnnfreeError
from bnnfree.format import schema
from bnnfree.format.errors import ConstantError, GraphError, LimitError, OpError, TensorError
from bnnfree.format.packed import Op, PackedModel, Tensor
from bnnfree.format.plan import check_plan
from bnnfree.ops import Window, border_classes, pool_output

Shape = tuple[int, ...]


def check_model(model: PackedModel) -> None:
    """Raise the FormatError of the first rule that `model` breaks."""
    _check_tensors(model)
    uses = [0] * len(model.tensors)
    written = {model.input}
    for number, op in enumerate(model.ops):
        where = f"op {number} ({op.name})"
        _check_fields(model, op, where)
        for tensor in op.reads():
            if tensor not in written:
                raise GraphError(f"{where}: reads {model.tensors[tensor].name}, which no op before it writes.")
        for tensor in (*op.reads(), *op.constants().values()):
            uses[tensor] += 1
        shape = _check_shapes(model, op, where)
        for tensor in op.writes():
            if tensor in written:
                raise GraphError(f"{where}: writes {model.tensors[tensor].name}, which is written already.")
            if model.tensors[tensor].shape != shape:
                raise GraphError(
                    f"{where}: {model.tensors[tensor].name} has shape {model.tensors[tensor].shape}, expected {shape}."
                )
            written.add(tensor)
    uses[model.output] += 1
    for index, record in enumerate(model.tensors):
        if record.place == "activation" and index not in written:
            raise GraphError(f"{record.name}: no op writes it.")
        if not uses[index]:
            raise GraphError(f"{record.name}: nothing uses it.")
    check_plan(model)


def _check_tensors(model: PackedModel) -> None:
    images = [i for i, t in enumerate(model.tensors) if t.place == "image"]
    if images != [model.input]:
        raise GraphError(f"got images {images} and input {model.input}, expected the input alone to be an image.")
    image, output = model.tensors[model.input], model.tensors[model.output]
    if image.dtype != "u8" or len(image.shape) != 3 or image.offset:
        raise TensorError(f"{image.name}: got {image.dtype} {image.shape}, expected u8 [height, width, channels].")
    if output.place != "activation" or output.dtype != "f32":
        raise TensorError(f"{output.name}: got {output.place} of {output.dtype}, expected an activation of f32.")
    if model.classes and len(model.classes) != output.shape[-1]:
        raise TensorError(f"got {len(model.classes)} class names for {output.shape[-1]} outputs.")
    if model.arena_bytes > schema.MAX_BYTES:
        raise LimitError(f"got an arena of {model.arena_bytes} bytes, expected up to {schema.MAX_BYTES}.")
    for tensor in model.tensors:
        if tensor.place != "constant":
            if tensor.bytes > schema.MAX_BYTES:
                raise LimitError(f"{tensor.name}: got {tensor.bytes} bytes, expected up to {schema.MAX_BYTES}.")
            if tensor.place == "activation" and (tensor.dtype not in ("f32", "bits") or len(tensor.shape) != 3):
                raise TensorError(f"{tensor.name}: got {tensor.dtype} {tensor.shape} for an activation.")
        elif tensor.dtype == "bits":
            _check_tail(tensor)


def _check_tail(tensor: Tensor) -> None:
    """Bits above the last channel must be 0: a product of signs would count them."""
    assert tensor.data is not None
    if spare := tensor.shape[-1] % 64:
        if np.any(tensor.data[..., -1] >> np.uint64(spare)):
            raise ConstantError(f"{tensor.name}: has bits set above its last channel.")


def _check_fields(model: PackedModel, op: Op, where: str) -> None:
    rule = schema.OPS[op.name]
    allowed = {"input", *rule.needs, *rule.may}
    for name in schema.TENSOR_FIELDS:
        index = op.fields[name]
        if index is None:
            if name == "input" or name in rule.needs:
                raise OpError(f"{where}: lacks its {name}.")
            continue
        if name not in allowed:
            raise OpError(f"{where}: has a {name}, which this op does not take.")
        if index >= len(model.tensors):
            raise OpError(f"{where}: got tensor {index} of {len(model.tensors)} as {name}.")
        place = model.tensors[index].place
        wanted = ("activation", "image") if name == "input" else ("activation",)
        wanted = wanted if name in ("input", "other", "real", "bits") else ("constant",)
        if place not in wanted:
            raise OpError(f"{where}: its {name} is a {place}, expected {' or '.join(wanted)}.")
    if not op.writes():
        raise OpError(f"{where}: writes nothing.")
    if op.real is not None and op.real == op.bits:
        raise OpError(f"{where}: writes two results to one tensor.")
    if op.bits is None and (op.threshold is not None or op.flip is not None):
        raise OpError(f"{where}: has a threshold but writes no bits.")
    dtypes = {"input": rule.inputs, "other": ("f32",), "real": ("f32",), "bits": ("bits",), "weights": rule.weights}
    dtypes |= {"threshold": ("f32", "i32") if op.name == "binary_conv2d" else ("f32",), "flip": ("bits",)}
    for name in schema.TENSOR_FIELDS:
        index = op.fields[name]
        if index is not None and model.tensors[index].dtype not in dtypes.get(name, ("f32",)):
            raise OpError(f"{where}: its {name} is {model.tensors[index].dtype}.")
    if op.threshold is not None and model.tensors[op.threshold].dtype == "i32":
        extra = [n for n in ("other", "scale", "bias", "slope", "low", "high", "real") if op.fields[n] is not None]
        if extra:
            raise OpError(f"{where}: has a threshold of its sum, and {', '.join(extra)} as well.")
    _check_window(op, where, rule.window)


def _check_window(op: Op, where: str, used: bool) -> None:
    values = {name: op.fields[name] or 0 for name in schema.WINDOW_FIELDS}
    if not used:
        if any(values.values()):
            raise OpError(f"{where}: has window fields, which this op does not take.")
        return
    for name, value in values.items():
        least = {"padding_h": 0, "padding_w": 0, "ceil": 0, "pad_value": -1}.get(name, 1)
        most = 1 if name in ("ceil", "pad_value") else schema.MAX_SIDE
        if not least <= value <= most:
            raise OpError(f"{where}: got {name} {value}, expected {least} to {most}.")
    if values["kernel_h"] * values["kernel_w"] > schema.MAX_TAPS:
        raise LimitError(f"{where}: got a window of more than {schema.MAX_TAPS} taps.")
    pooling = op.name in schema.POOLINGS
    if pooling and (values["groups"] != 1 or values["pad_value"]):
        raise OpError(f"{where}: has groups or a pad value, which a pooling does not take.")
    if pooling and any(2 * values[f"padding_{d}"] > values[f"kernel_{d}"] for d in "hw"):
        raise OpError(f"{where}: its padding is more than half its kernel.")
    if values["ceil"] and not pooling:
        raise OpError(f"{where}: has ceil, which a convolution does not take.")
    if op.name == "pixel_conv2d" and (values["groups"] != 1 or values["pad_value"]):
        raise OpError(f"{where}: has groups or a pad value, which this op does not take.")


def window_of(op: Op) -> Window:
    """The geometry of an op that has a window."""
    f = op.fields
    pairs = [(f[f"{name}_h"], f[f"{name}_w"]) for name in ("kernel", "stride", "padding", "dilation")]
    return Window(*pairs)  # type: ignore[arg-type]


def _check_shapes(model: PackedModel, op: Op, where: str) -> Shape:
    """The shape of what the op writes; its constants and second input are checked against it."""
    tensors = model.tensors
    height, width, channels = tensors[op.input].shape
    bias_shape: Shape = ()
    if op.name == "concat":
        other = tensors[op.other].shape
        if other[:2] != (height, width):
            raise GraphError(f"{where}: joins {tensors[op.input].shape} and {other}.")
        return height, width, channels + other[2]
    if op.name == "softmax":
        return height, width, channels
    outputs = channels
    if schema.OPS[op.name].window:
        window = window_of(op)
        _check_padded(window, op, (height, width, channels), where)
        try:
            rows, columns = (
                pool_output(window, height, width, bool(op.ceil))
                if op.name in schema.POOLINGS
                else window.output(height, width)
            )
        except BnnfreeError as error:
            raise GraphError(f"{where}: {error}") from None
        if op.name in schema.POOLINGS:
            return rows, columns, channels
        outputs = _check_weights(model, op, where, channels)
        if op.name == "pixel_conv2d":
            bias_shape = (*_count_classes(window, height, width, where), outputs)
        height, width = rows, columns
    shapes = {name: (outputs,) for name in schema.EPILOGUE_FIELDS} | ({"bias": bias_shape} if bias_shape else {})
    for name, index in op.constants().items():
        if name != "weights":
            if tensors[index].shape != shapes[name]:
                raise GraphError(f"{where}: its {name} has shape {tensors[index].shape}, expected {shapes[name]}.")
            _check_finite(tensors[index], where, infinite=name in ("threshold", "low", "high"))
    if op.other is not None:
        other = tensors[op.other].shape
        if other[:2] != (height, width) or outputs % other[2]:
            raise GraphError(f"{where}: adds {other} to {(height, width, outputs)}.")
    return height, width, outputs


def _check_padded(window: Window, op: Op, shape: Shape, where: str) -> None:
    height, width, channels = (n + 2 * p for n, p in zip(shape, (*window.padding, 0), strict=True))
    # a window that hangs over the far edge needs up to one stride more
    height, width = (n + (s if op.ceil else 0) for n, s in zip((height, width), window.stride, strict=True))
    if height * width * channels * 4 > 2 * schema.MAX_BYTES:
        raise LimitError(f"{where}: its padded input of {height}x{width}x{channels} is above the limit.")


def _count_classes(window: Window, height: int, width: int, where: str) -> tuple[int, int]:
    counts = []
    for side in zip((height, width), window.size, window.stride, window.padding, window.dilation, strict=True):
        size, kernel, stride, padding, _ = side
        if ((size + 2 * padding) // stride + 1) * kernel > schema.MAX_SUM:
            raise LimitError(f"{where}: its rows times its kernel are above {schema.MAX_SUM}.")
        counts.append(len(border_classes(*side)[1]))
    return counts[0], counts[1]


def _check_weights(model: PackedModel, op: Op, where: str, channels: int) -> int:
    """Number of output channels of a convolution."""
    weights = model.tensors[op.weights]
    groups = op.groups
    if channels % groups:
        raise GraphError(f"{where}: got {groups} groups for {channels} channels.")
    expected = (op.kernel_h, op.kernel_w, channels // groups)
    if len(weights.shape) != 4 or weights.shape[1:] != expected or weights.shape[0] % groups:
        raise GraphError(f"{where}: got weights {weights.shape}, expected [outputs, {', '.join(map(str, expected))}].")
    terms = op.kernel_h * op.kernel_w * (channels // groups)
    if op.name == "binary_conv2d" and terms > schema.MAX_SUM:
        raise LimitError(f"{where}: got {terms} products in a sum, expected up to {schema.MAX_SUM}.")
    if op.name == "pixel_conv2d" and terms * 255 * 128 >= 2**31:
        raise LimitError(f"{where}: got {terms} products in a sum, which could leave 32 bits.")
    _check_finite(weights, where)
    return weights.shape[0]


def _check_finite(tensor: Tensor, where: str, infinite: bool = False) -> None:
    if tensor.dtype != "f32":
        return
    assert tensor.data is not None
    bad = np.isnan(tensor.data) if infinite else ~np.isfinite(tensor.data)
    if bad.any():
        raise ConstantError(f"{where}: {tensor.name} holds {tensor.data[bad][0]}.")
