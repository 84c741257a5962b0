"""How the engine computes an op in numpy, twice: as bnnfree.ops says it, and fast. Imports numpy, ops and format.

A kernel takes the op, its input [N, H, W, ...] and its constants by field, and returns what the epilogue starts
from: whole numbers or float32 (a pooling, concat and softmax return their result). REFERENCE calls bnnfree.ops and
nothing else; FAST replaces what is worth it, and tests/test_engine.py holds the two equal to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bnnfree import ops
from bnnfree.format import Op, window_of

F32 = np.float32
Constants = dict[str, Any]  # arrays by field; "channels" of the input; "other", an activation
Kernel = Callable[[Op, np.ndarray, Constants], np.ndarray]
CACHED = 1 << 16  # values of a block that the fast kernels keep in the processor's cache


def _as_float(x: np.ndarray, channels: int) -> np.ndarray:
    """Bits as +1 and -1, pixels as 0 to 255, floats as they are."""
    if x.dtype == np.uint64:
        return ops.signs(ops.unpack_bits(x, channels)).astype(F32)
    return x.astype(F32, copy=False)


def _real_weights(op: Op, constants: Constants, channels: int) -> np.ndarray:
    """Weights of conv2d as float32; bits as +1 and -1."""
    return _as_float(constants["weights"], channels // op.groups)


def _pointwise(op: Op, x: np.ndarray, constants: Constants) -> np.ndarray:
    return _as_float(x, constants["channels"])


def _binary_conv2d(op: Op, x: np.ndarray, constants: Constants) -> np.ndarray:
    channels = constants["channels"]
    return ops.binary_conv2d(
        x,
        constants["weights"],
        channels,
        window_of(op),
        groups=op.groups,
        pad_value=op.pad_value,
    )


def _pixel_conv2d(op: Op, x: np.ndarray, constants: Constants) -> np.ndarray:
    return ops.pixel_sums(x, constants["weights"], window_of(op))


def _conv2d(op: Op, x: np.ndarray, constants: Constants) -> np.ndarray:
    w = _real_weights(op, constants, x.shape[3])
    return ops.conv2d(x, w, None, window_of(op), groups=op.groups, pad_value=op.pad_value)


REFERENCE: dict[str, Kernel] = {
    "pointwise": _pointwise,
    "binary_conv2d": _binary_conv2d,
    "pixel_conv2d": _pixel_conv2d,
    "conv2d": _conv2d,
    "max_pool2d": lambda op, x, _: ops.max_pool2d(x, window_of(op), ceil_mode=bool(op.ceil)),
    "avg_pool2d": lambda op, x, _: ops.avg_pool2d(x, window_of(op), ceil_mode=bool(op.ceil)),
    "concat": lambda op, x, constants: ops.concat([x, constants["other"]]),
    "softmax": lambda op, x, _: ops.softmax(x),
}


# -- fast


def _columns(padded: np.ndarray, op: Op, height: int, width: int) -> np.ndarray:
    """What each output position sees, tap by tap. Shapes: [N, H + 2p, W + 2p, K] -> [N H' W', taps K]."""
    taps = [values for _, _, values in window_of(op).taps(padded, height, width)]
    return np.stack(taps, axis=3).reshape(-1, len(taps) * padded.shape[3])


def _fast_binary_conv2d(op: Op, x: np.ndarray, constants: Constants) -> np.ndarray:
    """xor and bit counts over blocks of positions; taps on zero padding are taken out per border class."""
    weights: np.ndarray = constants["weights"]
    channels: int = constants["channels"]
    size, part = channels // op.groups, len(weights) // op.groups
    if op.groups == 1:
        return _binary_sums(op, x, weights, channels)
    bits = None if size % ops.WORD == 0 else ops.unpack_bits(x, channels)
    sums = []
    for g in range(op.groups):
        if bits is None:
            words = x[..., g * size // ops.WORD : (g + 1) * size // ops.WORD]
        else:
            words = ops.pack_bits(bits[..., g * size : (g + 1) * size])
        sums.append(_binary_sums(op, words, weights[g * part : (g + 1) * part], size))
    return np.concatenate(sums, axis=-1)


def _binary_sums(op: Op, x: np.ndarray, weights: np.ndarray, channels: int) -> np.ndarray:
    window, (n, height, width, words) = window_of(op), x.shape
    padded = window.pad(x, 0)
    if op.pad_value < 0:
        inside = window.pad(np.ones((1, height, width), bool), False)[0]
        padded[:, ~inside] = ops.pack_bits(np.ones(channels, bool))
    columns = _columns(padded, op, height, width)
    taps, outputs = op.kernel_h * op.kernel_w, len(weights)
    table = np.ascontiguousarray(weights.reshape(outputs, -1).T)
    terms = taps * channels
    differing = np.zeros((len(columns), outputs), np.uint16 if terms < 1 << 16 else np.uint32)
    block = max(1, CACHED // outputs)
    xor, count = np.empty((block, outputs), np.uint64), np.empty((block, outputs), np.uint8)
    for first in range(0, len(columns), block):
        part = columns[first : first + block]
        for k in range(taps * words):
            np.bitwise_xor(part[:, k, None], table[k], out=xor[: len(part)])
            np.bitwise_count(xor[: len(part)], out=count[: len(part)])
            differing[first : first + block] += count[: len(part)]
    sums = (terms - 2 * differing.astype(np.int32)).reshape(n, *window.output(height, width), outputs)
    if op.pad_value == 0 and any(window.padding):
        signs = channels - 2 * np.bitwise_count(weights).sum(3, dtype=np.int32)  # [O, kh, kw]: a tap on words of 0
        sides = zip((height, width), window.size, window.stride, window.padding, window.dilation, strict=True)
        (rows, in_row), (cols, in_col) = (ops.border_classes(*side) for side in sides)
        outside = ~(in_row[:, None, :, None] & in_col[None, :, None, :])  # [row classes, column classes, kh, kw]
        sums -= np.einsum("abij,oij->abo", outside.astype(np.int32), signs)[rows[:, None], cols]
    return sums


def _fast_pixel_conv2d(op: Op, x: np.ndarray, constants: Constants) -> np.ndarray:
    """A float matrix product, exact: every partial sum is a whole number that the type holds."""
    weights = constants["weights"]
    terms = weights[0].size
    exact = F32 if terms * 255 * 128 <= 1 << 24 else np.float64
    window, (n, height, width, _) = window_of(op), x.shape
    columns = _columns(window.pad(x, 0), op, height, width).astype(exact)
    sums = columns @ weights.reshape(len(weights), -1).T.astype(exact)
    return sums.astype(np.int32).reshape(n, *window.output(height, width), -1)


def _fast_conv2d(op: Op, x: np.ndarray, constants: Constants) -> np.ndarray:
    """The stated order with all groups and a block of positions at once."""
    window, (n, height, width, channels) = window_of(op), x.shape
    w = _real_weights(op, constants, channels)
    groups, outputs = op.groups, len(w)
    size, part = channels // groups, outputs // groups
    columns = _columns(window.pad(x, op.pad_value), op, height, width).reshape(
        -1, w.shape[1] * w.shape[2], groups, size
    )
    table = np.ascontiguousarray(w.reshape(groups, part, -1, size).transpose(2, 3, 0, 1))  # [taps, size, groups, part]
    acc = np.zeros((len(columns), groups, part), F32)
    block = max(1, CACHED // outputs)
    product = np.empty((block, groups, part), F32)
    for first in range(0, len(columns), block):
        sums, values = acc[first : first + block], columns[first : first + block]
        term = product[: len(values)]
        for tap in range(columns.shape[1]):
            for c in range(size):
                np.multiply(values[:, tap, :, c, None], table[tap, c], out=term)
                sums += term
    return acc.reshape(n, *window.output(height, width), outputs)


FAST: dict[str, Kernel] = {
    **REFERENCE,
    "binary_conv2d": _fast_binary_conv2d,
    "pixel_conv2d": _fast_pixel_conv2d,
    "conv2d": _fast_conv2d,
}
