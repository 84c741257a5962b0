"""Checks of a packed model: fields, graph, limits; of shapes by shapes.py. Imports numpy and bnnfree.format.

`check_model` is what a reader trusts a file by: after it, an engine may run the ops without a look at their
numbers. Each rule has one named error. Its time and memory are in proportion to the file's size, whatever that says.
"""

from __future__ import annotations

import math

import numpy as np

from bnnfree.format import schema
from bnnfree.format.errors import ConstantError, GraphError, LimitError, OpError, TensorError
from bnnfree.format.packed import Op, PackedModel
from bnnfree.format.plan import check_plan
from bnnfree.format.shapes import check_shapes, work_of


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
        shape = check_shapes(model, op, where)
        _check_values(op, where, special)
        work += work_of(model, op, shape)
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
    if not op.writes() or (rule.moves and len(op.writes()) > 1):
        raise OpError(f"{where}: writes {'two results' if op.writes() else 'nothing'}.")
    if op.real is not None and op.real == op.bits:
        raise OpError(f"{where}: writes two results to one tensor.")
    if op.bits is None and (op.threshold is not None or op.flip is not None):
        raise OpError(f"{where}: has a threshold but writes no bits.")
    dtypes = {"input": rule.inputs, "bits": ("bits",), "weights": rule.weights, "flip": ("bits",)}
    dtypes |= {"threshold": ("f32", "i32") if op.name == "binary_conv2d" else ("f32",)}
    if op.name in ("concat", "xor"):
        dtypes["other"] = (model.tensors[op.input].dtype,)
    for name in schema.TENSOR_FIELDS:
        index = op.fields[name]
        if index is not None and model.tensors[index].dtype not in dtypes.get(name, ("f32",)):
            raise OpError(f"{where}: its {name} is {model.tensors[index].dtype}.")
    if rule.moves and (op.bits is None) == (model.tensors[op.input].dtype == "bits"):
        raise OpError(f"{where}: writes another dtype than that of its input, {model.tensors[op.input].dtype}.")
    if op.threshold is not None and model.tensors[op.threshold].dtype == "i32":
        alone = ("input", "weights", "bits", "threshold", "flip")
        extra = [n for n in schema.TENSOR_FIELDS if n not in alone and op.fields[n] is not None]
        if extra:
            raise OpError(f"{where}: has a threshold of its sum, and {', '.join(extra)} as well.")
    _check_options(op, where, rule)
    _check_window(op, where, rule)


def _check_options(op: Op, where: str, rule: schema.Op) -> None:
    """The fields of a record that are neither tensors nor a window."""
    if op.other_last > 1 or (op.other_last and (op.other is None or "factor" not in rule.may)):
        raise OpError(f"{where}: got other_last {op.other_last}, expected 0, or 1 where the epilogue adds an other.")
    if op.mode >= max(1, len(rule.modes)):
        raise OpError(f"{where}: got mode {op.mode}, expected 0 to {max(1, len(rule.modes)) - 1}.")
    for name in ("size_h", "size_w"):
        if not rule.sized and op.fields[name]:
            raise OpError(f"{where}: has a {name}, which this op does not take.")
        if rule.sized and not 1 <= op.fields[name] <= schema.MAX_SIDE:  # type: ignore[operator]
            raise OpError(f"{where}: got {name} {op.fields[name]}, expected 1 to {schema.MAX_SIDE}.")


def _check_window(op: Op, where: str, rule: schema.Op) -> None:
    values = {name: op.fields[name] or 0 for name in schema.WINDOW_FIELDS}
    for name, value in values.items():
        if name not in rule.window:
            if value:
                raise OpError(f"{where}: has a {name}, which this op does not take.")
            continue
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
    around = [(values[f"{side}_{d}"], values[f"kernel_{d}"]) for side in ("padding", "after") for d in "hw"]
    if pooling and any(2 * padding > kernel for padding, kernel in around):
        raise OpError(f"{where}: its padding is more than half its kernel.")
    if values["ceil"] and not pooling:
        raise OpError(f"{where}: has ceil, which a convolution does not take.")
    if op.name == "pixel_conv2d" and (values["groups"] != 1 or values["pad_value"]):
        raise OpError(f"{where}: has groups or a pad value, which this op does not take.")
    if op.name == "pad" and op.mode and values["pad_value"]:
        raise OpError(f"{where}: has a pad value, which its mode does not take.")
