"""Float arithmetic that a packed model leaves to the engine, counted from its ops."""

from __future__ import annotations

import math
from collections import Counter

from bnnfree.errors import BnnfreeError
from bnnfree.format import Op, PackedModel, window_of
from bnnfree.format.schema import OPS

# Per value that the op writes, where FORMAT.md has that line: factors and terms one each; slope a comparison and a
# product, which a negative value takes; low, high, a float threshold a comparison each
EPILOGUE = {"slope": 2} | dict.fromkeys(
    ("scale", "bias", "factor", "other", "low", "high", "scale_after", "bias_after"), 1
)
# A value of group_norm: sum, difference, square, sum, product; of rms_norm square, sum, product
NORMS = {
    "group_norm": (5, 5),
    "rms_norm": (3, 4),
    "channel_norm": (5, 5),
}  # and per group: quotients, sum with eps, root, reciprocal
MOVED = ("concat", "take", "crop", "pad", "pixel_shuffle", "xor")
FUNCTIONS = {"sigmoid": 23, "tanh": 25, "gelu": 40, "gelu_tanh": 31, "silu": 24, "elu": 23, "exp": 20, "sqrt": 1,
             "reciprocal": 1}  # fmt: skip
SOFTMAX = 25  # a value: largest, difference, clamp, exponent, reduction, polynomial, power of two, sum, quotient


def float_ops(model: PackedModel) -> int:
    """Float32 additions, products, quotients, roots and comparisons of one image, as FORMAT.md writes each op.

    Counted: a product and a sum per tap of conv2d (those on padding, too, as papers count) and a sum per tap of an
    average; all of the epilogue; a comparison per value whose bit comes from a float. Not counted: sums of signs and
    of pixels, which are whole numbers, their conversion to float, an i32 threshold, and moving values about.
    So it is work and not time: most of these operations wait for memory.
    Errors: BnnfreeError for an op that is not known here.
    """
    return sum(_float_ops(model, op) for op in model.ops)


def _float_ops(model: PackedModel, op: Op) -> int:
    tensors = model.tensors
    values = math.prod(tensors[op.writes()[0]].shape)
    if op.name in MOVED or (op.name == "max_pool2d" and op.bits is not None):
        return 0
    if op.name == "resize":
        return 0 if op.mode == 0 else 9 * values
    if op.name == "reduce_channels":
        return math.prod(tensors[op.input].shape)
    if op.name == "softmax":
        return SOFTMAX * values
    if op.name in ("max_pool2d", "avg_pool2d"):
        window = window_of(op)
        return values * (window.size[0] * window.size[1] + (op.name == "avg_pool2d"))
    total = values * _epilogue(model, op)
    if op.name == "conv2d":
        total += 2 * values * math.prod(tensors[op.weights].shape[1:])
    elif op.name in NORMS:
        each, group = NORMS[op.name]
        groups = (
            values // tensors[op.input].shape[2] if op.name == "channel_norm" else math.prod(tensors[op.weights].shape)
        )
        total += each * values + group * groups
    elif op.name == "conv_transpose2d":
        taps = math.prod(tensors[op.weights].shape[1:]) / (op.stride_h * op.stride_w)  # that one output meets
        total += round(2 * values * taps)
    elif op.name == "function":
        total += FUNCTIONS[OPS["function"].modes[op.mode]] * values
    elif op.name not in ("pointwise", "binary_conv2d", "pixel_conv2d"):
        raise BnnfreeError(f"float_ops: got the op {op.name!r}, whose operations nobody has counted yet.")
    return total


def _epilogue(model: PackedModel, op: Op) -> int:
    count = sum(cost for name, cost in EPILOGUE.items() if getattr(op, name) is not None)
    if op.bits is not None:
        threshold = op.threshold
        whole = threshold is not None and model.tensors[threshold].dtype == "i32"
        signs_alone = op.name == "binary_conv2d" and threshold is None and count == 0
        count += not (whole or signs_alone)
    return count


def op_counts(model: PackedModel) -> dict[str, int]:
    """Number of ops of each name."""
    return dict(Counter(op.name for op in model.ops))
