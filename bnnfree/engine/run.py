"""Walking the ops of a packed model with a table of kernels. Imports numpy, bnnfree.ops and bnnfree.format."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np

from bnnfree import ops
from bnnfree.engine.kernels import Constants, Kernel
from bnnfree.format import Op, PackedModel, lifetimes, window_of
from bnnfree.format.schema import OPS

Watch = Callable[[int, float], None]


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


def run_op(
    model: PackedModel, op: Op, kernels: Mapping[str, Kernel], values: Mapping[int, np.ndarray]
) -> dict[int, np.ndarray]:
    """What one op writes, given the activations it reads."""
    x = values[op.input]
    constants: Constants = {name: model.tensors[index].data for name, index in op.constants().items()}
    constants["channels"] = model.tensors[op.input].shape[2]
    if op.other is not None:
        constants["other"] = values[op.other]
    v = kernels[op.name](op, x, constants)
    if "scale" not in OPS[op.name].may + OPS[op.name].needs:
        return {op.real: v}
    if op.name == "pixel_conv2d":
        constants["bias"] = ops.border_bias(constants["bias"], window_of(op), *x.shape[1:3])
    threshold = constants.get("threshold")
    if threshold is None or threshold.dtype != np.int32:
        parts = ("scale", "bias", "other", "slope", "low", "high")
        v = ops.epilogue(v, *(constants.get(name) for name in parts))
    written = {}
    if op.real is not None:
        written[op.real] = v
    if op.bits is not None:
        bits = ops.sign_bits(v) if threshold is None else ops.threshold_bits(v, threshold)
        flip = constants.get("flip")
        if flip is not None:
            bits = bits ^ ops.unpack_bits(flip, v.shape[-1])
        written[op.bits] = ops.pack_bits(bits)
    return written
