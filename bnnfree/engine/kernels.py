"""Kernels of the ops in numpy, each twice: as bnnfree.ops defines it, and fast. Imports numpy, ops and format.

A kernel takes the op, its input [N, H, W, ...] and its constants by field, and returns what the epilogue starts
from: whole numbers or float32 (a pooling, concat and softmax return their result). REFERENCE calls bnnfree.ops and
nothing else; FAST replaces what is worth it, and tests/test_engine.py holds the two equal to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bnnfree import ops
from bnnfree.format import Op, window_of
from bnnfree.format.schema import OPS
from bnnfree.format.shapes import inside_taps

F32 = np.float32
Constants = dict[str, Any]  # arrays by field; "other", "factor": activations; "channels", "other_channels": of those
Kernel = Callable[[Op, np.ndarray, Constants], np.ndarray]
CACHED = 1 << 16  # values of a block that the fast kernels keep in the processor's cache
COLUMNS = 1 << 20  # values of the matrix that a pixel convolution makes of a block
PADDED = 1 << 28  # bytes of padded images that one call of a kernel makes


def _as_float(x: np.ndarray, channels: int) -> np.ndarray:
    """Bits as +1 and -1, pixels as 0 to 255, floats as they are."""
    if x.dtype == np.uint64:
        return ops.signs(ops.unpack_bits(x, channels)).astype(F32)
    return x.astype(F32, copy=False)


def _real_weights(op: Op, constants: Constants, channels: int) -> np.ndarray:
    """Weights of conv2d as float32; bits as +1 and -1."""
    return _as_float(constants["weights"], channels // op.groups)


def mode_of(op: Op) -> str:
    """Name of an op's mode."""
    return OPS[op.name].modes[op.mode]


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


def _moved(kernel: Kernel) -> Kernel:
    """A kernel that copies values, for floats as they are and for words of bits one by one."""

    def run(op: Op, x: np.ndarray, constants: Constants) -> np.ndarray:
        if x.dtype != np.uint64:
            return kernel(op, x, constants)
        others = dict(constants)
        if "other" in constants:
            others["other"] = ops.unpack_bits(constants["other"], constants["other_channels"])
        return ops.pack_bits(kernel(op, ops.unpack_bits(x, constants["channels"]), others))

    return run


def _max_pool2d(op: Op, x: np.ndarray, _: Constants) -> np.ndarray:
    pool = ops.max_pool_bits if x.dtype == bool else ops.max_pool2d
    return pool(x, window_of(op), ceil_mode=bool(op.ceil))


def _pad(op: Op, x: np.ndarray, _: Constants) -> np.ndarray:
    value = op.pad_value < 0 if x.dtype == bool else op.pad_value
    return ops.pad(x, ops.Window((1, 1), (1, 1), *_around(op)), mode_of(op), value)


def _around(op: Op) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Padding before, dilation and padding after, of an op that has no window."""
    return (op.padding_h, op.padding_w), (1, 1), (op.after_h, op.after_w)


def _crop(op: Op, x: np.ndarray, _: Constants) -> np.ndarray:
    return ops.crop(x, (op.padding_h, op.padding_w), (op.stride_h, op.stride_w), (op.size_h, op.size_w))


def _pixel_shuffle(op: Op, x: np.ndarray, _: Constants) -> np.ndarray:
    return (ops.pixel_unshuffle if op.mode else ops.pixel_shuffle)(x, (op.stride_h, op.stride_w))


def _conv_transpose2d(op: Op, x: np.ndarray, constants: Constants) -> np.ndarray:
    size = (op.size_h, op.size_w)
    return ops.conv_transpose2d(x, constants["weights"], window_of(op), size, groups=op.groups)


REFERENCE: dict[str, Kernel] = {
    "pointwise": _pointwise,
    "binary_conv2d": _binary_conv2d,
    "pixel_conv2d": _pixel_conv2d,
    "conv2d": _conv2d,
    "max_pool2d": _moved(_max_pool2d),
    "avg_pool2d": lambda op, x, _: ops.avg_pool2d(x, window_of(op), ceil_mode=bool(op.ceil)),
    "concat": _moved(lambda op, x, constants: ops.concat([x, constants["other"]])),
    "softmax": lambda op, x, _: ops.softmax(x),
    "group_norm": lambda op, x, constants: ops.group_norm(x, constants["weights"]),
    "rms_norm": lambda op, x, constants: ops.rms_norm(x, constants["weights"]),
    "channel_norm": lambda op, x, constants: ops.channel_norm(x, constants["weights"], op.mode == 0),
    "function": lambda op, x, _: ops.function(x, mode_of(op)),
    "conv_transpose2d": _conv_transpose2d,
    "take": _moved(lambda op, x, constants: ops.take_channels(x, constants["weights"])),
    "crop": _moved(_crop),
    "pad": _moved(_pad),
    "resize": lambda op, x, _: ops.resize(x, (op.size_h, op.size_w), mode_of(op)),
    "pixel_shuffle": _pixel_shuffle,
    "reduce_channels": lambda op, x, _: ops.reduce_channels(x, mode_of(op)),
    "xor": lambda op, x, constants: x ^ constants["other"],
}


# -- fast: nothing takes more memory than the padded input and the result do


def _seen(padded: np.ndarray, op: Op) -> np.ndarray:
    """Windows that the output positions see, as a view. Shapes: [N, H + p, W + p, K] -> [N, H', W', kh, kw, K]."""
    window = window_of(op)
    (rows, columns), (down, across) = window.stride, window.dilation
    span = [d * (k - 1) + 1 for d, k in zip(window.dilation, window.size, strict=True)]
    view = np.lib.stride_tricks.sliding_window_view(padded, span, axis=(1, 2))  # type: ignore[call-overload]
    return view[:, ::rows, ::columns, :, ::down, ::across].transpose(0, 1, 2, 4, 5, 3)


def _tiles(shape: tuple[int, int, int], positions: int) -> Iterator[tuple[slice, slice, slice]]:
    """Cuts [N, H', W'] into parts of up to `positions`, whole rows and images where they fit."""
    n, height, width = shape
    across = min(width, positions)
    down = min(height, max(1, positions // width))
    deep = max(1, positions // (width * height))
    for image in range(0, n, deep):
        for top in range(0, height, down):
            for left in range(0, width, across):
                yield slice(image, image + deep), slice(top, top + down), slice(left, left + across)


def _images_in_parts(kernel: Kernel) -> Kernel:
    """The kernel on so many images at a time that what padding adds stays within bounds."""

    def run(op: Op, x: np.ndarray, constants: Constants) -> np.ndarray:
        height, width = (side.padded for side in window_of(op).sides(*x.shape[1:3]))
        together = max(1, PADDED // (height * width * x.shape[3] * x.itemsize))
        if len(x) <= together:
            return kernel(op, x, constants)
        return np.concatenate([kernel(op, x[i : i + together], constants) for i in range(0, len(x), together)])

    return run


def border_index(side: ops.Side) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`ops.border_classes` in time and memory of the positions: the class of each position along one axis, and of
    each class the first tap inside and the first behind. Shapes: [H'], [classes], [classes]."""
    first, behind = inside_taps(side, np.arange(side.positions))
    kernel = side.kernel
    keys, at, index = np.unique(first * (kernel + 1) + behind, return_index=True, return_inverse=True)
    order = np.argsort(at)  # classes are numbered as they first occur
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank[index], keys[order] // (kernel + 1), keys[order] % (kernel + 1)


def border_bias(bias: np.ndarray, op: Op, height: int, width: int) -> np.ndarray:
    """The bias of every output position. Shapes: [row classes, column classes, O] -> [H', W', O]."""
    (rows, *_), (columns, *_) = map(border_index, window_of(op).sides(height, width))
    return bias[rows[:, None], columns]


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
    seen, outputs = _seen(padded, op), len(weights)
    table = np.ascontiguousarray(weights.transpose(1, 2, 3, 0))  # [kh, kw, K, O]
    terms = op.kernel_h * op.kernel_w * channels
    shape = (n, *window.output(height, width))
    sums = np.empty((*shape, outputs), np.int32)
    block = max(1, CACHED // outputs)
    xor, count = np.empty((block, outputs), np.uint64), np.empty((block, outputs), np.uint8)
    for tile in _tiles(shape, block):
        part = seen[tile]
        positions = math.prod(part.shape[:3])
        differing = np.zeros((positions, outputs), np.uint16 if terms < 1 << 16 else np.uint32)
        for i, j in np.ndindex(op.kernel_h, op.kernel_w):
            here = part[:, :, :, i, j].reshape(positions, words)
            for k in range(words):
                np.bitwise_xor(here[:, k, None], table[i, j, k], out=xor[:positions])
                np.bitwise_count(xor[:positions], out=count[:positions])
                differing += count[:positions]
        sums[tile] = (terms - 2 * differing.astype(np.int32)).reshape(*part.shape[:3], outputs)
    if op.pad_value == 0 and any((*window.padding, *window.after)):  # type: ignore[misc]
        sums -= _padding_sums(op, weights, channels, height, width)
    return sums


def _padding_sums(op: Op, weights: np.ndarray, channels: int, height: int, width: int) -> np.ndarray:
    """Sums added by words of 0 on the padding: the weights' over the taps outside, from running sums over rows
    and columns of the kernel. Shapes: weights [O, kh, kw, K] -> [H', W', O]."""
    signs = channels - 2 * np.bitwise_count(weights).sum(3, dtype=np.int32)  # [O, kh, kw]: a tap on a word of 0
    running = np.zeros((op.kernel_h + 1, op.kernel_w + 1, len(weights)), np.int32)
    running[1:, 1:] = signs.cumsum(1, dtype=np.int32).cumsum(2, dtype=np.int32).transpose(1, 2, 0)
    (rows, top, bottom), (columns, left, right) = map(border_index, window_of(op).sides(height, width))
    top, bottom = top[:, None], bottom[:, None]
    inside = running[bottom, right] - running[top, right] - running[bottom, left] + running[top, left]
    return (running[-1, -1] - inside)[rows[:, None], columns]


def _fast_pixel_conv2d(op: Op, x: np.ndarray, constants: Constants) -> np.ndarray:
    """A float matrix product, exact: every partial sum is a whole number that the type holds."""
    weights = constants["weights"]
    terms, outputs = weights[0].size, len(weights)
    exact = F32 if terms * 255 * 128 <= 1 << 24 else np.float64
    window, (n, height, width, _) = window_of(op), x.shape
    seen, table = _seen(window.pad(x, 0), op), weights.reshape(outputs, terms).T.astype(exact)
    shape = (n, *window.output(height, width))
    sums = np.empty((*shape, outputs), np.int32)
    for tile in _tiles(shape, max(1, COLUMNS // terms)):
        part = seen[tile]
        sums[tile] = (part.reshape(-1, terms).astype(exact) @ table).reshape(*part.shape[:3], outputs)
    return sums


def _fast_conv2d(op: Op, x: np.ndarray, constants: Constants) -> np.ndarray:
    """The stated order with all groups and a block of positions at once."""
    window, (n, height, width, channels) = window_of(op), x.shape
    w = _real_weights(op, constants, channels)
    groups, outputs = op.groups, len(w)
    size, part = channels // groups, outputs // groups
    seen = _seen(window.pad(x, op.pad_value), op)
    table = np.ascontiguousarray(
        w.reshape(groups, part, op.kernel_h, op.kernel_w, size).transpose(2, 3, 4, 0, 1)
    )  # [kh, kw, size, groups, part]
    shape = (n, *window.output(height, width))
    acc = np.empty((*shape, outputs), F32)
    block = max(1, CACHED // outputs)
    product = np.empty((block, groups, part), F32)
    for tile in _tiles(shape, block):
        values = seen[tile]
        positions = math.prod(values.shape[:3])
        sums, term = np.zeros((positions, groups, part), F32), product[:positions]
        for i, j in np.ndindex(op.kernel_h, op.kernel_w):
            here = values[:, :, :, i, j].reshape(positions, groups, size)
            for c in range(size):
                np.multiply(here[:, :, c, None], table[i, j, c], out=term)
                sums += term
        acc[tile] = sums.reshape(*values.shape[:3], outputs)
    return acc


def _fast_softmax(_: Op, x: np.ndarray, constants: Constants) -> np.ndarray:
    """The sum in order, by running sums."""
    e = ops.exp(x - x.max(axis=-1, keepdims=True))
    return e / np.add.accumulate(e, axis=-1)[..., -1:]


FAST: dict[str, Kernel] = {
    **REFERENCE,
    "binary_conv2d": _images_in_parts(_fast_binary_conv2d),
    "pixel_conv2d": _images_in_parts(_fast_pixel_conv2d),
    "conv2d": _images_in_parts(_fast_conv2d),
    "max_pool2d": _images_in_parts(REFERENCE["max_pool2d"]),
    "avg_pool2d": _images_in_parts(REFERENCE["avg_pool2d"]),
    "softmax": _fast_softmax,
}
