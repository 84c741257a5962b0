"""Shapes of what ops write, and what they ask of the shapes that they read. Imports numpy, bnnfree.ops, its room.

To add an op: a function and a line of SHAPES.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from bnnfree.errors import BnnfreeError
from bnnfree.format import schema
from bnnfree.format.errors import ConstantError, GraphError, LimitError
from bnnfree.format.packed import Op, PackedModel, Tensor, storage_bytes
from bnnfree.ops import Side, Window, pool_output

Shape = tuple[int, ...]


def window_of(op: Op) -> Window:
    """The geometry of an op that has a window."""
    f = op.fields
    pairs = [(f[f"{name}_h"], f[f"{name}_w"]) for name in ("kernel", "stride", "padding", "dilation", "after")]
    return Window(*pairs)  # type: ignore[arg-type]


def check_shapes(model: PackedModel, op: Op, where: str) -> Shape:
    """The shape of what the op writes; its constants and second activations are checked against it."""
    shape = SHAPES[op.name](model, op, where) if op.name in SHAPES else model.tensors[op.input].shape
    if math.prod(shape) > schema.MAX_VALUES:
        raise LimitError(f"{where}: its result {shape} has more than {schema.MAX_VALUES} values.")
    if "scale" in schema.OPS[op.name].may + schema.OPS[op.name].needs:
        _check_epilogue(model, op, where, shape)
    return shape


def _check_epilogue(model: PackedModel, op: Op, where: str, shape: Shape) -> None:
    tensors, outputs = model.tensors, shape[2]
    for name, index in op.constants().items():
        dependent = name == "bias" and op.name in schema.DEPENDENT
        expected: Shape = (outputs,)
        if dependent and (op.name == "pixel_conv2d" or len(tensors[index].shape) == 3):
            try:
                sides = window_of(op).sides(*tensors[op.input].shape[:2])
                expected = (*map(count_classes, sides), outputs)
            except LimitError as error:
                raise LimitError(f"{where}: {error}") from None
        if name != "weights" and tensors[index].shape != expected:
            raise GraphError(f"{where}: its {name} has shape {tensors[index].shape}, expected {expected}.")
    if op.name == "binary_conv2d" and op.pad_value and op.bias is not None and len(tensors[op.bias].shape) == 3:
        raise GraphError(f"{where}: has a pad value, and a bias that depends on the padding.")
    for name in ("other", "factor"):
        if op.fields[name] is not None:
            taken = tensors[op.fields[name]].shape  # type: ignore[index]
            if taken[:2] not in (shape[:2], (1, 1)) or outputs % taken[2]:
                raise GraphError(f"{where}: its {name} {taken} does not fit {shape}.")


def _convolution(model: PackedModel, op: Op, where: str) -> Shape:
    height, width, channels = model.tensors[op.input].shape
    _check_padded(op, model.tensors[op.input], where)
    try:
        rows, columns = window_of(op).output(height, width)
    except BnnfreeError as error:
        raise GraphError(f"{where}: {error}") from None
    return rows, columns, _check_weights(model, op, where, channels)


def _transposed(model: PackedModel, op: Op, where: str) -> Shape:
    """Every output position must be in reach of some tap, so that a size is not arbitrary."""
    height, width, channels = model.tensors[op.input].shape
    for axis, side in zip("hw", (height, width), strict=True):
        f = {name: op.fields[f"{name}_{axis}"] or 0 for name in ("kernel", "stride", "padding", "dilation", "size")}
        whole = (side - 1) * f["stride"] + f["dilation"] * (f["kernel"] - 1) + 1 - 2 * f["padding"]
        if not 0 <= f["size"] - whole < max(f["stride"], f["dilation"]):
            raise GraphError(f"{where}: got size_{axis} {f['size']} for {whole} rows or columns that its window makes.")
    return op.size_h, op.size_w, _check_weights(model, op, where, channels)


def _pooling(model: PackedModel, op: Op, where: str) -> Shape:
    height, width, channels = model.tensors[op.input].shape
    _check_padded(op, model.tensors[op.input], where)
    try:
        return *pool_output(window_of(op), height, width, bool(op.ceil)), channels
    except BnnfreeError as error:
        raise GraphError(f"{where}: {error}") from None


def _norm(model: PackedModel, op: Op, where: str) -> Shape:
    shape, groups = model.tensors[op.input].shape, model.tensors[op.weights].shape
    most = 1 if op.name == "channel_norm" else shape[2]
    if len(groups) != 1 or shape[2] % groups[0] or groups[0] > most:
        raise GraphError(f"{where}: got weights {groups}, expected [groups], which divides {shape[2]} channels.")
    return shape


def _joined(model: PackedModel, op: Op, where: str) -> Shape:
    (height, width, channels), other = model.tensors[op.input].shape, model.tensors[op.other].shape
    if other[:2] != (height, width) or (op.name == "xor" and other[2] != channels):
        raise GraphError(f"{where}: joins {(height, width, channels)} and {other}.")
    return height, width, channels + (other[2] if op.name == "concat" else 0)


def _taken(model: PackedModel, op: Op, where: str) -> Shape:
    record, index = model.tensors[op.input], model.tensors[op.weights]
    height, width, channels = record.shape
    least = 0 if record.dtype == "bits" else -1
    if len(index.shape) != 1:
        raise GraphError(f"{where}: got weights {index.shape}, expected [channels].")
    if index.data is None or index.data.min() < least or index.data.max() >= channels:
        raise ConstantError(f"{where}: its weights name channels beyond {least} to {channels - 1}.")
    return height, width, index.shape[0]


def _cropped(model: PackedModel, op: Op, where: str) -> Shape:
    *sides, channels = model.tensors[op.input].shape
    for axis, side in zip("hw", sides, strict=True):
        start, stride, size = (op.fields[f"{name}_{axis}"] or 0 for name in ("padding", "stride", "size"))
        if start + stride * (size - 1) >= side:
            raise GraphError(f"{where}: its last row or column is {start + stride * (size - 1)}, of {side}.")
    return op.size_h, op.size_w, channels


def _surrounded(model: PackedModel, op: Op, where: str) -> Shape:
    record = model.tensors[op.input]
    *sides, channels = record.shape
    most = {"reflect": -1, "circular": 0}.get(schema.OPS["pad"].modes[op.mode])
    for axis, side in zip("hw", sides, strict=True):
        if most is not None and max(op.fields[f"padding_{axis}"] or 0, op.fields[f"after_{axis}"] or 0) > side + most:
            raise GraphError(f"{where}: its padding is more than {side + most}.")
    if record.dtype == "bits" and op.mode == 0 and op.pad_value == 0:
        raise GraphError(f"{where}: pads signs with 0, expected 1 or -1.")
    rows, columns = sides[0] + op.padding_h + op.after_h, sides[1] + op.padding_w + op.after_w
    if max(rows, columns) > schema.MAX_SIDE:
        raise LimitError(f"{where}: its result has sides above {schema.MAX_SIDE}.")
    return rows, columns, channels


def _resized(model: PackedModel, op: Op, where: str) -> Shape:
    return op.size_h, op.size_w, model.tensors[op.input].shape[2]


def _shuffled(model: PackedModel, op: Op, where: str) -> Shape:
    height, width, channels = model.tensors[op.input].shape
    rows, columns = op.stride_h, op.stride_w
    if op.mode:
        if height % rows or width % columns:
            raise GraphError(f"{where}: blocks of {rows}x{columns} do not divide {height}x{width}.")
        return height // rows, width // columns, channels * rows * columns
    if channels % (rows * columns):
        raise GraphError(f"{where}: blocks of {rows}x{columns} do not divide {channels} channels.")
    if max(height * rows, width * columns) > schema.MAX_SIDE:
        raise LimitError(f"{where}: its result has sides above {schema.MAX_SIDE}.")
    return height * rows, width * columns, channels // (rows * columns)


SHAPES: dict[str, Callable[[PackedModel, Op, str], Shape]] = {
    **dict.fromkeys(schema.CONVOLUTIONS, _convolution),
    **dict.fromkeys(schema.POOLINGS, _pooling),
    **dict.fromkeys((*schema.NORMS, "channel_norm"), _norm),
    **dict.fromkeys(("concat", "xor"), _joined),
    "conv_transpose2d": _transposed,
    "take": _taken,
    "crop": _cropped,
    "pad": _surrounded,
    "resize": _resized,
    "pixel_shuffle": _shuffled,
    "reduce_channels": lambda model, op, where: (*model.tensors[op.input].shape[:2], 1),
}
"""Ops whose result has another shape than their input, or that ask something of it."""


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


def work_of(model: PackedModel, op: Op, shape: Shape) -> int:
    """Values that the op takes in plus products that it sums up, for one image."""
    taken, terms = model.tensors[op.input].shape, 1
    if op.name in schema.CONVOLUTIONS + schema.POOLINGS:
        taken = (*_padded(op, taken), taken[2])
    if "kernel_h" in schema.OPS[op.name].window:
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
