"""Checks of a packed model: shapes, graph, limits. Imports numpy, bnnfree.ops (geometry) and bnnfree.format.

`check_model` is what a reader trusts a file by: after it, an engine may run the ops without a look at their
numbers. Each rule has one named error. Its time and memory are in proportion to the file's size, whatever that says.
"""

from __future__ import annotations

import math

import numpy as np

from bnnfree.errors import BnnfreeError
from bnnfree.format import schema
from bnnfree.format.errors import ConstantError, GraphError, LimitError, OpError, TensorError
from bnnfree.format.packed import Op, PackedModel, Tensor, storage_bytes
from bnnfree.format.plan import check_plan
from bnnfree.ops import Side, Window, pool_output

Shape = tuple[int, ...]


def check_model(model: PackedModel) -> None:
    """Raise the FormatError of the first rule that `model` breaks."""
    _check_tensors(model)
    special = _check_constants(model)
    uses = [0] * len(model.tensors)
    written = {model.input}
    work = 0
    for number, op in enumerate(model.ops):
        where = f"op {number} ({op.name})"
        _check_fields(model, op, where)
        for tensor in op.reads():
            if tensor not in written:
                raise GraphError(f"{where}: reads {model.tensors[tensor].name}, which no op before it writes.")
        for tensor in (*op.reads(), *op.constants().values()):
            uses[tensor] += 1
        shape = _check_shapes(model, op, where)
        _check_values(op, where, special)
        work += _work(model, op, shape)
        if work > schema.MAX_WORK:
            raise LimitError(f"{where}: up to here one image takes {work} products, expected up to {schema.MAX_WORK}.")
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
        raise TensorError(f"got images {images} and input {model.input}, expected the input alone to be an image.")
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
            if math.prod(tensor.shape) > schema.MAX_VALUES:
                raise LimitError(f"{tensor.name}: got {tensor.shape}, expected up to {schema.MAX_VALUES} values.")
            if tensor.place == "activation" and (tensor.dtype not in ("f32", "bits") or len(tensor.shape) != 3):
                raise TensorError(f"{tensor.name}: got {tensor.dtype} {tensor.shape} for an activation.")


def _check_constants(model: PackedModel) -> dict[int, float]:
    """Constant -> NaN or an infinity that it holds. Bits above the last channel must be 0: a product of signs
    would count them."""
    special = {}
    for index, tensor in enumerate(model.tensors):
        if tensor.data is None:
            continue
        if tensor.dtype == "bits" and (spare := tensor.shape[-1] % 64):
            if np.any(tensor.data[..., -1] >> np.uint64(spare)):
                raise ConstantError(f"{tensor.name}: has bits set above its last channel.")
        if tensor.dtype == "f32" and not np.isfinite(tensor.data).all():
            special[index] = math.nan if np.isnan(tensor.data).any() else math.inf
    return special


def _check_values(op: Op, where: str, special: dict[int, float]) -> None:
    """Constants are finite; a threshold, low or high may be infinite."""
    for name, index in op.constants().items():
        if (value := special.get(index)) is not None and (math.isnan(value) or name not in schema.MAY_BE_INFINITE):
            raise ConstantError(f"{where}: its {name} holds {value}.")


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
        wanted = wanted if name in schema.ACTIVATION_FIELDS else ("constant",)
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
        alone = ("input", "weights", "bits", "threshold", "flip")
        extra = [n for n in schema.TENSOR_FIELDS if n not in alone and op.fields[n] is not None]
        if extra:
            raise OpError(f"{where}: has a threshold of its sum, and {', '.join(extra)} as well.")
    _check_options(op, where, rule)
    _check_window(op, where, rule.window)


def _check_options(op: Op, where: str, rule: schema.Op) -> None:
    """The fields of a record that are neither tensors nor a window."""
    if op.other_last > 1 or (op.other_last and (op.other is None or "factor" not in rule.may)):
        raise OpError(f"{where}: got other_last {op.other_last}, expected 0, or 1 where the epilogue adds an other.")
    for name in ("mode", "size_h", "size_w"):
        if op.fields[name]:
            raise OpError(f"{where}: has a {name}, which this op does not take.")


def _check_window(op: Op, where: str, used: bool) -> None:
    values = {name: op.fields[name] or 0 for name in schema.WINDOW_FIELDS}
    if not used:
        if any(values.values()):
            raise OpError(f"{where}: has window fields, which this op does not take.")
        return
    for name, value in values.items():
        least = -1 if name == "pad_value" else 0 if name == "ceil" or name[:-2] in ("padding", "after") else 1
        most = 1 if name in ("ceil", "pad_value") else schema.MAX_SIDE
        if not least <= value <= most:
            kind = LimitError if value > schema.MAX_SIDE == most else OpError
            raise kind(f"{where}: got {name} {value}, expected {least} to {most}.")
    if values["kernel_h"] * values["kernel_w"] > schema.MAX_TAPS:
        raise LimitError(f"{where}: got a window of more than {schema.MAX_TAPS} taps.")
    pooling = op.name in schema.POOLINGS
    if pooling and (values["groups"] != 1 or values["pad_value"]):
        raise OpError(f"{where}: has groups or a pad value, which a pooling does not take.")
    if pooling and any(2 * values[f"{side}_{d}"] > values[f"kernel_{d}"] for side in ("padding", "after") for d in "hw"):
        raise OpError(f"{where}: its padding is more than half its kernel.")
    if values["ceil"] and not pooling:
        raise OpError(f"{where}: has ceil, which a convolution does not take.")
    if op.name == "pixel_conv2d" and (values["groups"] != 1 or values["pad_value"]):
        raise OpError(f"{where}: has groups or a pad value, which this op does not take.")


def window_of(op: Op) -> Window:
    """The geometry of an op that has a window."""
    f = op.fields
    pairs = [(f[f"{name}_h"], f[f"{name}_w"]) for name in ("kernel", "stride", "padding", "dilation", "after")]
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
    if op.name in schema.NORMS:
        groups = tensors[op.weights].shape
        if len(groups) != 1 or channels % groups[0]:
            raise GraphError(f"{where}: got weights {groups}, expected [groups], which divides {channels} channels.")
    if schema.OPS[op.name].window:
        window = window_of(op)
        _check_padded(op, tensors[op.input], where)
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
            try:
                rows_columns = [count_classes(side) for side in window.sides(height, width)]
            except LimitError as error:
                raise LimitError(f"{where}: {error}") from None
            bias_shape = (*rows_columns, outputs)
        height, width = rows, columns
    shapes = {name: (outputs,) for name in schema.EPILOGUE_FIELDS} | ({"bias": bias_shape} if bias_shape else {})
    for name, index in op.constants().items():
        if name != "weights":
            if tensors[index].shape != shapes[name]:
                raise GraphError(f"{where}: its {name} has shape {tensors[index].shape}, expected {shapes[name]}.")
    for name in ("other", "factor"):
        if op.fields[name] is not None:
            taken = tensors[op.fields[name]].shape  # type: ignore[index]
            if taken[:2] not in ((height, width), (1, 1)) or outputs % taken[2]:
                raise GraphError(f"{where}: its {name} {taken} does not fit {(height, width, outputs)}.")
    return height, width, outputs


def _padded(op: Op, shape: Shape) -> tuple[int, int]:
    """Rows and columns of the input with its padding; a window that hangs over the far edge needs one stride more."""
    height, width = (side.padded + (side.stride if op.ceil else 0) for side in window_of(op).sides(*shape[:2]))
    return height, width


def _check_padded(op: Op, record: Tensor, where: str) -> None:
    size = (*_padded(op, record.shape), record.shape[2])
    if storage_bytes(record.dtype, size) > schema.MAX_BYTES:
        raise LimitError(f"{where}: its padded input of {size} takes more than {schema.MAX_BYTES} bytes.")
    if op.name in schema.POOLINGS:
        for axis, side in zip("hw", record.shape, strict=False):
            around = getattr(op, f"padding_{axis}") or getattr(op, f"after_{axis}")
            if around and getattr(op, f"dilation_{axis}") > side:
                raise GraphError(f"{where}: a window may see nothing of the image: its dilation is above {side}.")


def _work(model: PackedModel, op: Op, shape: Shape) -> int:
    """Values that the op takes in plus products that it sums up, for one image."""
    taken, terms = model.tensors[op.input].shape, 1
    if schema.OPS[op.name].window:
        taken = (*_padded(op, taken), taken[2])
        terms = op.kernel_h * op.kernel_w * (1 if op.weights is None else model.tensors[op.weights].shape[3])
    return math.prod(taken) + max(math.prod(shape), schema.LEAST_WORK) * terms


def inside_taps(side: Side, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Taps of a window that lie inside the image, along one axis: at each of `positions` those from the first
    result up to, without, the second; 0 and 0 where there is none. Shapes: [R] -> [R], [R]."""
    start = positions * side.stride - side.padding
    first = np.clip(-(start // side.dilation), 0, side.kernel)
    behind = np.clip(-((start - side.size) // side.dilation), 0, side.kernel)
    some = first < behind
    return first * some, behind * some


def count_classes(side: Side) -> int:
    """Number of different sets of taps inside the image, along one axis. Error: LimitError."""
    count, stride = side.positions, side.stride
    near = min(count, -(-side.padding // stride))  # positions that begin before the image
    far = min(count, max(near, (side.size + side.padding - side.span) // stride + 1))  # the first that ends behind it
    if near + count - far > schema.MAX_BORDER:
        raise LimitError(f"got {near + count - far} positions at the border, expected up to {schema.MAX_BORDER}.")
    border = np.concatenate([np.arange(min(near + 1, far)), np.arange(far, count)])
    first, behind = inside_taps(side, border)
    return len(np.unique(first * (side.kernel + 1) + behind))


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
    return weights.shape[0]
