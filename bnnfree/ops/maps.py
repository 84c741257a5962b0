"""Functions of single values, and operations that move, repeat or reduce the values of maps. Imports numpy, its room.

fl(.) rounds to float32; what is not said to be rounded is a comparison, a copy or a whole number.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bnnfree.errors import BnnfreeError
from bnnfree.ops.binary import Window
from bnnfree.ops.real import F32, _float, _sum_along, exp, pool_windows

# -- functions of one value


def sigmoid(x: np.ndarray) -> np.ndarray:
    """fl(1 / fl(1 + exp(-x)))"""
    return F32(1) / (F32(1) + exp(-_float(x)))


def tanh(x: np.ndarray) -> np.ndarray:
    """fl(fl(1 - t) / fl(1 + t)) with t = exp(fl(-2 |x|)), and the sign of x"""
    t = exp(F32(-2) * np.abs(_float(x)))
    return np.copysign((F32(1) - t) / (F32(1) + t), x)


_ERF = [F32(v) for v in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)]


def erf(x: np.ndarray) -> np.ndarray:
    """The error function within 3e-7: 1 - (a1 t + ... + a5 t^5) exp(-x^2), t = 1 / (1 + 0.3275911 |x|), sign of x.

    Ref: Abramowitz & Stegun 1964, 7.1.26. Horner's rule, every step rounded.
    """
    size = np.abs(_float(x))
    t = F32(1) / (F32(1) + F32(0.3275911) * size)
    y = np.full_like(t, _ERF[0])
    for coefficient in _ERF[1:]:
        y = y * t + coefficient
    return np.copysign(F32(1) - y * t * exp(-(size * size)), x)


def gelu(x: np.ndarray) -> np.ndarray:
    """fl(x fl(0.5 fl(1 + erf(fl(x sqrt(0.5))))))"""
    x = _float(x)
    return x * (F32(0.5) * (F32(1) + erf(x * F32(0.70710678))))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """fl(x sigmoid(fl(1.5957691 fl(x + fl(0.044715 fl(fl(x x) x))))))"""
    x = _float(x)
    return x * sigmoid(F32(1.5957691) * (x + F32(0.044715) * (x * x * x)))


def silu(x: np.ndarray) -> np.ndarray:
    """fl(x sigmoid(x))"""
    return _float(x) * sigmoid(x)


def elu(x: np.ndarray) -> np.ndarray:
    """x where x > 0, else fl(exp(x) - 1)"""
    x = _float(x)
    return np.where(x > 0, x, exp(x) - F32(1))


def reciprocal(x: np.ndarray) -> np.ndarray:
    """fl(1 / x)"""
    return F32(1) / _float(x)


FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sigmoid": sigmoid,
    "tanh": tanh,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "silu": silu,
    "elu": elu,
    "exp": exp,
    "sqrt": lambda x: np.sqrt(_float(x)),
    "reciprocal": reciprocal,
}
"""Names of the modes of the op `function`, in the order of their numbers."""


def function(x: np.ndarray, name: str) -> np.ndarray:
    """FUNCTIONS[name] of each value; what is not a number stays so. Shapes: [...] -> [...]."""
    x = _float(x)
    return np.where(np.isnan(x), F32(np.nan), FUNCTIONS[name](np.where(np.isnan(x), F32(0), x)))


# -- over channels


def channel_norm(x: np.ndarray, eps: np.ndarray, centred: bool = True) -> np.ndarray:
    """(x - mean) / sqrt(variance + eps) over the channels of each position; not centred: with a mean of +0.

    The mean is fl(sum / C), the sum channel by channel from +0; d = fl(x - mean); the variance is the mean of fl(d d);
    fl(d fl(1 / fl(sqrt(fl(variance + eps))))). Shapes: x [N, H, W, C], eps [1] -> [N, H, W, C].
    """
    x, count = _float(x), F32(x.shape[-1])
    d = x - (_sum_along(x, -1) / count)[..., None] if centred else x
    power = (_sum_along(d * d, -1) / count)[..., None]
    return d * (F32(1) / np.sqrt(power + _float(eps)))


def reduce_channels(x: np.ndarray, name: str) -> np.ndarray:
    """Over the channels of each position, one after the other: "sum" from +0, "mean" fl(sum / C), "max" the largest.

    A later value replaces the largest only if it is greater. Shapes: [N, H, W, C] -> [N, H, W, 1].
    """
    x = _float(x)
    if name == "max":
        best = x[..., 0]
        for c in range(1, x.shape[-1]):
            best = np.where(x[..., c] > best, x[..., c], best)
        return best[..., None]
    total = _sum_along(x, -1)[..., None]
    return total / F32(x.shape[-1]) if name == "mean" else total


def take_channels(x: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Channels by number; +0 for -1. Shapes: x [..., C], index [O] -> [..., O]."""
    return np.where(index < 0, x.dtype.type(0), x[..., np.maximum(index, 0)])


# -- over positions


def crop(x: np.ndarray, start: tuple[int, int], step: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Every step-th row and column from `start` on, `size` of them. Shapes: [N, H, W, ...] -> [N, *size, ...]."""
    rows, columns = (slice(a, a + s * (n - 1) + 1, s) for a, s, n in zip(start, step, size, strict=True))
    return x[:, rows, columns]


PADS = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
"""Names of the modes of the op `pad`, in the order of their numbers, and what numpy calls them."""


def pad(x: np.ndarray, window: Window, name: str, value: float = 0.0) -> np.ndarray:
    """Rows and columns around a map: of `value`, mirrored without the edge, of the edge, or of the other side.

    Shapes: [N, H, W, ...] -> [N, padded H, padded W, ...].
    """
    around = [(0, 0), *zip(window.padding, window.after, strict=True), *[(0, 0)] * (x.ndim - 3)]  # type: ignore[arg-type]
    more = {"constant_values": x.dtype.type(value)} if name == "constant" else {}
    return np.pad(x, around, PADS[name], **more)  # type: ignore[call-overload]


def resize_positions(size: int, out: int, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each position of a resized axis: two rows of the input, and the float32 weight of the second."""
    r = np.arange(out, dtype=np.int64)
    if name == "nearest":
        first = r * size // out
        return first, first, np.zeros(out, F32)
    if name == "bilinear":  # centres of pixels: (r + 1/2) size / out - 1/2
        above, below = np.maximum((2 * r + 1) * size - out, 0), np.full(out, 2 * out)
    else:  # corners onto corners
        above, below = r * (size - 1), np.full(out, max(out - 1, 1))
    first = above // below
    weight = (above - first * below).astype(F32) / below.astype(F32)
    return first, np.minimum(first + 1, size - 1), weight


RESIZES = ("nearest", "bilinear", "bilinear_corners")
"""Names of the modes of the op `resize`, in the order of their numbers."""


def resize(x: np.ndarray, size: tuple[int, int], name: str) -> np.ndarray:
    """Maps of another size.

    nearest: row floor(r H / H'). bilinear: between two rows with weight w of the second, fl(fl(a fl(1 - w)) + fl(b w)),
    first along columns, then along rows; w is the fraction of (r + 1/2) H / H' - 1/2, at least 0, or (bilinear_corners)
    of r (H - 1) / (H' - 1), as a quotient of whole numbers.
    Shapes: [N, H, W, C] -> [N, *size, C].
    """
    x = _float(x)
    (top, bottom, down), (left, right, across) = (
        resize_positions(n, out, name) for n, out in zip(x.shape[1:3], size, strict=True)
    )
    if name == "nearest":
        return x[:, top[:, None], left]
    down, across = down[:, None, None], across[:, None]
    above, below = (x[:, r][:, :, left] * (F32(1) - across) + x[:, r][:, :, right] * across for r in (top, bottom))
    return above * (F32(1) - down) + below * down


def pixel_shuffle(x: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Channels to positions: channel c b_h b_w + i b_w + j of a position is channel c of its place (i, j) in a block.

    Shapes: [N, H, W, C b_h b_w] -> [N, H b_h, W b_w, C].
    """
    n, height, width, channels = x.shape
    (rows, columns), rest = block, channels // (block[0] * block[1])
    parts = x.reshape(n, height, width, rest, rows, columns).transpose(0, 1, 4, 2, 5, 3)
    return np.ascontiguousarray(parts).reshape(n, height * rows, width * columns, rest)


def pixel_unshuffle(x: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Positions to channels, the inverse of `pixel_shuffle`. Shapes: [N, H b_h, W b_w, C] -> [N, H, W, C b_h b_w]."""
    n, height, width, channels = x.shape
    rows, columns = block
    parts = x.reshape(n, height // rows, rows, width // columns, columns, channels).transpose(0, 1, 3, 5, 2, 4)
    return np.ascontiguousarray(parts).reshape(n, height // rows, width // columns, channels * rows * columns)


def conv_transpose2d(
    x: np.ndarray, w: np.ndarray, window: Window, size: tuple[int, int], *, groups: int = 1
) -> np.ndarray:
    """Transposed convolution: output row r takes input row q by tap i where q stride - padding + i dilation = r.

    The sum starts at +0 and takes its terms by kernel row, kernel column and channel, each product and sum rounded.
    Shapes: x [N, H, W, C], w [O, kh, kw, C / groups] float32 -> [N, *size, O].
    """
    x, w = _float(x), _float(w)
    n, height, width, channels = x.shape
    outputs, inner = len(w), channels // groups
    part = outputs // groups
    y = np.zeros((n, *size, outputs), F32)
    for i, j in np.ndindex(*window.size):
        rows, q = _sources(size[0], height, i, 0, window)
        columns, p = _sources(size[1], width, j, 1, window)
        if not len(rows) or not len(columns):
            continue
        values, at = x[:, q[:, None], p], np.ix_(np.arange(n), rows, columns)
        for g in range(groups):
            out = slice(g * part, (g + 1) * part)
            for c in range(inner):
                y[..., out][at] += values[..., g * inner + c, None] * w[out, i, j, c]
    return y


def _sources(out: int, size: int, tap: int, axis: int, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Output positions that see a tap along one axis, and the input position that each sees by it."""
    r = np.arange(out)
    reach = r + window.padding[axis] - tap * window.dilation[axis]
    q = reach // window.stride[axis]
    seen = (reach % window.stride[axis] == 0) & (q >= 0) & (q < size)
    return r[seen], q[seen]


# -- bits


def max_pool_bits(x: np.ndarray, window: Window, *, ceil_mode: bool = False) -> np.ndarray:
    """The largest sign of each window inside the image: +1 where any is. Bits: 1 where all are negative.

    Shapes: bool [N, H, W, C] -> bool [N, H', W', C].
    """
    negative: np.ndarray | None = None
    for values, inside in pool_windows(x, window, ceil_mode):
        term = values | ~inside
        negative = term if negative is None else negative & term
    if negative is None:
        raise BnnfreeError("max_pool_bits: got a window without taps.")
    return negative
