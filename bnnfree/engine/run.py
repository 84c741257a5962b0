"""Walking the ops of a packed model with a table of kernels. Imports numpy, bnnfree.ops and bnnfree.format."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np

from bnnfree import ops
from bnnfree.engine.kernels import Constants, Kernel, border_bias
from bnnfree.format import Op, PackedModel, lifetimes
from bnnfree.format.schema import FLOAT_FIELDS, OPS

Watch = Callable[[int, float], None]
UNPACKED = 1 << 18  # words of bits that are made at a time


def run_ops(
    model: PackedModel,
    kernels: Mapping[str, Kernel],
    images: np.ndarray,
    *,
    keep: bool = False,
    watch: Watch | None = None,
) -> dict[int, np.ndarray]:
    """Activations by tensor: the output alone, or with `keep` all of them; bits as uint64 words.

    `watch(number, seconds)` is told how long each op took. Shapes: images uint8 [N, H, W, C].
    """
    spans = lifetimes(model)
    values = {model.input: images}
    for number, op in enumerate(model.ops):
        start = time.perf_counter()
        for index, value in run_op(model, op, kernels, values).items():
            values[index] = value
        if watch is not None:
            watch(number, time.perf_counter() - start)
        if not keep:
            for index in op.reads():
                if index in values and spans.get(index, (0, -1))[1] == number:
                    del values[index]
    return values if keep else {model.output: values[model.output]}


def constants_of(model: PackedModel, op: Op, values: Mapping[int, np.ndarray]) -> Constants:
    """Values that a kernel of `op` needs beside its input."""
    constants: Constants = {name: model.tensors[index].data for name, index in op.constants().items()}
    constants["channels"] = model.tensors[op.input].shape[2]
    for name in ("other", "factor"):
        if (index := op.fields[name]) is not None:
            constants[name] = values[index]
            constants[f"{name}_channels"] = model.tensors[index].shape[2]
    return constants


def first_values(
    model: PackedModel, op: Op, kernels: Mapping[str, Kernel], values: Mapping[int, np.ndarray]
) -> np.ndarray:
    """Values that the epilogue of `op` starts from: for a binary or a pixel convolution its whole numbers."""
    return kernels[op.name](op, values[op.input], constants_of(model, op, values))


def run_op(
    model: PackedModel, op: Op, kernels: Mapping[str, Kernel], values: Mapping[int, np.ndarray]
) -> dict[int, np.ndarray]:
    """Run one op on the activations that it reads; returns those that it writes."""
    x, constants = values[op.input], constants_of(model, op, values)
    with np.errstate(all="ignore"):  # what an infinity or no number becomes is part of an op's meaning
        return _finish(op, x, kernels[op.name](op, x, constants), constants)


def _finish(op: Op, x: np.ndarray, v: np.ndarray, constants: Constants) -> dict[int, np.ndarray]:
    """The epilogue: what an op writes, given its input and what its kernel returned."""
    if "scale" not in OPS[op.name].may + OPS[op.name].needs:
        return {op.writes()[0]: v}
    bias = constants.get("bias")
    if bias is not None and bias.ndim == 3:
        constants["bias"] = border_bias(constants["bias"], op, *x.shape[1:3])
    threshold = constants.get("threshold")
    if threshold is None or threshold.dtype != np.int32:
        for name in ("other", "factor"):  # as often as the epilogue repeats it, in one step
            if name in constants:
                constants[name] = np.tile(constants[name], v.shape[-1] // constants[name].shape[-1])
        parts = {name: constants.get(name) for name in ("other", "factor", *FLOAT_FIELDS)}
        v = ops.epilogue(v, **parts, other_last=bool(op.other_last))
    written = {}
    if op.real is not None:
        written[op.real] = v
    if op.bits is not None:
        written[op.bits] = _bits(v, threshold, constants.get("flip"))
    return written


def _bits(v: np.ndarray, threshold: np.ndarray | None, flip: np.ndarray | None) -> np.ndarray:
    """Words of the signs of v, a block of positions at a time: unpacked, a word takes 64 bytes."""
    flat = v.reshape(-1, v.shape[-1])
    words = np.empty((len(flat), -(-v.shape[-1] // ops.WORD)), np.uint64)
    flips = None if flip is None else ops.unpack_bits(flip, v.shape[-1])
    step = max(1, UNPACKED // words.shape[1])
    for at in range(0, len(flat), step):
        part = flat[at : at + step]
        bits = ops.sign_bits(part) if threshold is None else ops.threshold_bits(part, threshold)
        words[at : at + step] = ops.pack_bits(bits if flips is None else bits ^ flips)
    return words.reshape(*v.shape[:-1], words.shape[1])
