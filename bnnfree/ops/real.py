"""Operations on float32. Imports numpy, bnnfree.errors and bnnfree.ops.binary only.

The order of float operations is part of what they mean. Here fl(.) rounds to float32, to nearest, ties to
even; every product and every sum is rounded on its own, nothing is fused. A sum starts at +0 and takes its
terms one after the other: over a kernel row by row, then column by column, then channel by channel; over an
image row by row. Different outputs are independent, so a backend is free to compute many at once.
"""

from __future__ import annotations

import numpy as np

from bnnfree.errors import BnnfreeError
from bnnfree.ops.binary import Side, Window

F32 = np.float32


def _float(x) -> np.ndarray:
    x = np.asarray(x)
    if x.dtype != F32:
        raise BnnfreeError(f"ops: got {x.dtype}, expected float32.")
    return x


def conv2d(
    x: np.ndarray, w: np.ndarray, bias: np.ndarray | None, window: Window, *, groups: int = 1, pad_value: int = 0
) -> np.ndarray:
    """Real convolution; outside the image is `pad_value`; the bias is added last.

    y = fl(acc + bias), acc <- fl(acc + fl(x w)) over (row, column, channel of the group).
    Shapes: x [N, H, W, C], w [O, kh, kw, C / groups] float32 or int8, bias [O] -> [N, H', W', O].
    """
    x, w = _float(x), w.astype(F32) if w.dtype == np.int8 else _float(w)
    n, height, width, channels = x.shape
    outputs = w.shape[0]
    if channels % groups or outputs % groups or w.shape[3] * groups != channels:
        raise BnnfreeError(f"conv2d: got {groups} groups for {channels} channels and weights {w.shape}.")
    size, part = channels // groups, outputs // groups
    y = np.zeros((n, *window.output(height, width), outputs), F32)
    for i, j, values in window.taps(window.pad(x, pad_value), height, width):
        for g in range(groups):
            out = y[..., g * part : (g + 1) * part]
            for c in range(size):
                out += values[..., g * size + c, None] * w[g * part : (g + 1) * part, i, j, c]
    return y if bias is None else y + _float(bias)


def linear(x: np.ndarray, w: np.ndarray, bias: np.ndarray | None, scale: np.ndarray | None = None) -> np.ndarray:
    """Linear layer with float32 or int8 weights.

    acc <- fl(acc + fl(x_i w_oi)) over i; then fl(acc scale_o) where there is a scale; then fl(. + bias_o).
    Shapes: x [N, I], w [O, I] float32 or int8, scale [O], bias [O] -> [N, O].
    """
    x = _float(x)
    w = w.astype(F32) if w.dtype == np.int8 else _float(w)
    y = np.zeros((len(x), len(w)), F32)
    for i in range(x.shape[1]):
        y += x[:, i, None] * w[:, i]
    y = y if scale is None else y * _float(scale)
    return y if bias is None else y + _float(bias)


def border_classes(side: Side) -> tuple[np.ndarray, np.ndarray]:
    """Taps that lie inside the image, along one axis.

    Returns (index, patterns): output position r sees the taps patterns[index[r]]; patterns are in the order in
    which they first occur. Shapes: index [H'], patterns bool [classes, kernel].
    """
    at = np.arange(side.positions)[:, None] * side.stride - side.padding + np.arange(side.kernel) * side.dilation
    inside = (at >= 0) & (at < side.size)
    patterns: list[tuple] = []
    index = []
    for row in map(tuple, inside.tolist()):
        if row not in patterns:
            patterns.append(row)
        index.append(patterns.index(row))
    return np.array(index), np.array(patterns, bool)


def pixel_sums(pixels: np.ndarray, w: np.ndarray, window: Window) -> np.ndarray:
    """Sums of uint8 pixels times int8 weights over the taps inside the image: exact.

    Shapes: pixels [N, H, W, C], w [O, kh, kw, C] -> int32 [N, H', W', O]. Error: a sum that could leave int32.
    """
    if pixels.dtype != np.uint8 or w.dtype != np.int8:
        raise BnnfreeError(f"pixel_conv2d: got {pixels.dtype} and {w.dtype}, expected uint8 and int8.")
    if w[0].size * 255 * 128 >= 2**31:
        raise BnnfreeError(f"pixel_conv2d: got {w[0].size} weights per channel, whose sum could leave int32.")
    n, height, width, _ = pixels.shape
    acc = np.zeros((n, *window.output(height, width), len(w)), np.int32)
    for i, j, values in window.taps(window.pad(pixels, 0), height, width):
        acc += values.astype(np.int32) @ w[:, i, j].astype(np.int32).T
    return acc


def border_bias(bias: np.ndarray, window: Window, height: int, width: int) -> np.ndarray:
    """The bias of every output position, by its border class.

    Shapes: bias [rows, columns, O] as `border_classes` numbers them -> [H', W', O].
    """
    (rows, _), (columns, _) = map(border_classes, window.sides(height, width))
    return _float(bias)[rows[:, None], columns]


def pixel_conv2d(pixels: np.ndarray, w: np.ndarray, scale: np.ndarray, bias: np.ndarray, window: Window) -> np.ndarray:
    """Convolution of uint8 pixels with int8 weights: exact integers, then one scale and one bias.

    y = fl(fl(acc) scale_o) + bias[class of row, class of column, o], acc an exact int32 over the taps inside the
    image. The bias holds what normalising the pixels subtracts, which near a border depends on the taps that
    are inside: `border_classes` numbers the cases. So padding is zero after normalisation, exactly.

    Shapes: pixels uint8 [N, H, W, C], w int8 [O, kh, kw, C], scale [O], bias [rows, columns, O] float32
    -> [N, H', W', O]. Error: an accumulator that could leave int32.
    """
    place = border_bias(bias, window, *pixels.shape[1:3])
    return epilogue(pixel_sums(pixels, w, window), scale, place)


def epilogue(
    v: np.ndarray,
    scale: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    other: np.ndarray | None = None,
    slope: np.ndarray | None = None,
    low: np.ndarray | None = None,
    high: np.ndarray | None = None,
    *,
    factor: np.ndarray | None = None,
    scale_after: np.ndarray | None = None,
    bias_after: np.ndarray | None = None,
    other_last: bool = False,
) -> np.ndarray:
    """Steps after a sum, those that are given, each rounded on its own:

        v <- fl(v scale);  v <- fl(v + bias);  v <- fl(v factor);  v <- fl(v + other)
        v <- v where v >= 0, else fl(v slope);  v <- v where v > low, else low;  v <- v where v < high, else high
        v <- fl(v scale_after);  v <- fl(v + bias_after)

    other_last: `other` is added at the end instead. Where `other` and `factor` have fewer channels they repeat: channel
    c takes their channel c % (their channels); where they have one row and column, all positions take those.
    Shapes: v int32 or float32 [N, H, W, C], other and factor [N, H, W, C / n] or [N, 1, 1, C / n], the rest [C] ->
    float32 [N, H, W, C].
    """
    v = v.astype(F32) if v.dtype == np.int32 else _float(v)
    v = v if scale is None else v * _float(scale)
    v = v if bias is None else v + _float(bias)
    v = v if factor is None else v * _repeated(factor, v)
    v = v if other is None or other_last else add(v, _repeated(other, v))
    v = v if slope is None else prelu(v, slope)
    v = v if low is None else tlu(v, low)
    v = v if high is None else np.where(v < high, v, _float(high))
    v = v if scale_after is None else v * _float(scale_after)
    v = v if bias_after is None else v + _float(bias_after)
    return v if other is None or not other_last else add(v, _repeated(other, v))


def _repeated(x: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The channels of x as often as v has them."""
    return np.concatenate([_float(x)] * (v.shape[-1] // x.shape[-1]), axis=-1)


def prelu(x: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """x where x >= 0, else fl(x slope_c). Shapes: [..., C], [C] -> [..., C]."""
    return np.where(x >= 0, x, _float(x) * _float(slope))


def relu(x: np.ndarray) -> np.ndarray:
    """x where x > 0, else +0."""
    return np.where(x > 0, _float(x), F32(0))


def tlu(x: np.ndarray, tau: np.ndarray) -> np.ndarray:
    """x where x > tau_c, else tau_c. Shapes: [..., C], [C] -> [..., C]."""
    return np.where(x > tau, _float(x), _float(tau))


def hardtanh(x: np.ndarray, low: float = -1.0, high: float = 1.0) -> np.ndarray:
    """low where x < low, high where x > high, else x."""
    return np.where(x < F32(low), F32(low), np.where(x > F32(high), F32(high), _float(x)))


def add(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """fl(x + y)."""
    return _float(x) + _float(y)


def concat(parts: list[np.ndarray]) -> np.ndarray:
    """Channels one after the other. Shapes: [..., C1], [..., C2], ... -> [..., C1 + C2 + ...]."""
    return np.concatenate(parts, axis=-1)


def pool_output(window: Window, height: int, width: int, ceil_mode: bool = False) -> tuple[int, int]:
    """Rows and columns of a pooling's output; with ceil_mode windows may hang over the far edge.

    A window that would start beyond the image and its near padding is left out.
    """
    counts = []
    for side in window.sides(height, width):
        count, stride = side.positions, side.stride
        if ceil_mode and (count - 1) * stride + side.span < side.padded and count * stride < side.size + side.padding:
            count += 1
        counts.append(count)
    if min(counts) < 1:
        raise BnnfreeError(f"window: got an image of {height}x{width}, smaller than a kernel of {window}.")
    return counts[0], counts[1]


def pool_windows(x: np.ndarray, window: Window, ceil_mode: bool):
    """(values, inside) of each tap of a pooling. Shapes: x [N, H, W, C] -> [N, H', W', C], bool [1, H', W', 1]."""
    _, height, width, _ = x.shape
    counts = pool_output(window, height, width, ceil_mode)
    sides = zip(counts, window.sides(height, width), strict=True)
    far = [(0, max(0, (count - 1) * side.stride + side.span - side.padded)) for count, side in sides]
    grown = np.pad(x, [(0, 0), *far, (0, 0)])
    inside = np.pad(np.ones((1, height, width, 1), bool), [(0, 0), *far, (0, 0)])
    size = (height + far[0][1], width + far[1][1])
    values = window.taps(window.pad(grown, 0), *size)
    known = window.taps(window.pad(inside, False), *size)
    for (_, _, v), (_, _, k) in zip(values, known, strict=True):
        yield v, k


def avg_pool2d(x: np.ndarray, window: Window, *, ceil_mode: bool = False) -> np.ndarray:
    """fl(sum / count) over the window's values inside the image, in order. Shapes: [N, H, W, C] -> [N, H', W', C]."""
    total: np.ndarray | None = None
    count: np.ndarray | None = None
    for values, inside in pool_windows(_float(x), window, ceil_mode):
        term = np.where(inside, values, F32(0))
        total = F32(0) + term if total is None else total + term
        count = inside.astype(F32) if count is None else count + inside.astype(F32)
    assert total is not None and count is not None  # a window has a tap
    return total / count


def max_pool2d(x: np.ndarray, window: Window, *, ceil_mode: bool = False) -> np.ndarray:
    """The largest value inside the image; a later one replaces an earlier one only if it is greater.

    Shapes: [N, H, W, C] -> [N, H', W', C].
    """
    best: np.ndarray | None = None
    for values, inside in pool_windows(_float(x), window, ceil_mode):
        term = np.where(inside, values, F32(-np.inf))
        best = term if best is None else np.where(term > best, term, best)
    assert best is not None
    return best


def global_avg_pool(x: np.ndarray) -> np.ndarray:
    """fl(sum / (H W)) over positions, row by row. Shapes: [N, H, W, C] -> [N, C]."""
    n, height, width, channels = x.shape
    total = np.zeros((n, channels), F32)
    for position in range(height * width):
        total += _float(x)[:, position // width, position % width]
    return total / F32(height * width)


def _sum_along(x: np.ndarray, axis: int) -> np.ndarray:
    """Term after term. Why + 0: a sum starts at +0, so that none is -0."""
    return np.add.accumulate(x, axis=axis).take(-1, axis) + F32(0)


def _group_means(x: np.ndarray, groups: int) -> np.ndarray:
    """The mean of each group of channels over all positions: every channel's rows are summed, then its rows' sums, then
    the group's channels; fl(sum / number). Shapes: [N, H, W, C] -> [N, groups, 1]."""
    n, height, width, channels = x.shape
    by_channel = _sum_along(_sum_along(x, 2), 1).reshape(n, groups, channels // groups)
    return _sum_along(by_channel, 2)[..., None] / F32(height * width * (channels // groups))


def _over_deviation(d: np.ndarray, eps: np.ndarray) -> np.ndarray:
    """fl(d r), r = fl(1 / fl(sqrt(fl(p + eps)))), p the mean of fl(d d) of the group."""
    power = _group_means(d * d, len(eps))
    factor = F32(1) / np.sqrt(power + _float(eps)[:, None])
    return d * _per_channel(factor, d)


def _per_channel(values: np.ndarray, x: np.ndarray) -> np.ndarray:
    """One value per group for each of its channels. Shapes: [N, groups, 1], [N, H, W, C] -> [N, 1, 1, C]."""
    return np.repeat(values, x.shape[3] // values.shape[1], axis=2).reshape(len(x), 1, 1, x.shape[3])


def group_norm(x: np.ndarray, eps: np.ndarray) -> np.ndarray:
    """(x - mean) / sqrt(variance + eps) over each group of channels and all positions, image by image.

    d = fl(x - mean); the variance is the mean of fl(d d); see `_group_means` for the order of the sums. One group is
    layer normalisation, a group for each channel instance normalisation.
    Shapes: x [N, H, W, C], eps [groups] -> [N, H, W, C]. Error: groups that do not divide C.
    """
    _check_groups("group_norm", x, eps)
    return _over_deviation(_float(x) - _per_channel(_group_means(_float(x), len(eps)), x), eps)


def rms_norm(x: np.ndarray, eps: np.ndarray) -> np.ndarray:
    """x / sqrt(mean of x^2 + eps) over each group and all positions: `group_norm` with a mean of +0.

    A group for each channel is filter response normalisation (Singh & Krishnan 2020). Shapes, error: as there.
    """
    _check_groups("rms_norm", x, eps)
    return _over_deviation(_float(x), eps)


def _check_groups(name: str, x: np.ndarray, eps: np.ndarray) -> None:
    if not len(eps) or x.shape[3] % len(eps):
        raise BnnfreeError(f"{name}: got {len(eps)} groups for {x.shape[3]} channels.")


_LOG2E = F32(1.44269504)
_LN2_HIGH = F32(0.693359375)  # few bits: its product with a whole number up to 150 is exact
_LN2_LOW = F32(-2.12194440e-4)
_EXP = [F32(v) for v in (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0)]


def exp(x: np.ndarray) -> np.ndarray:
    """e to the x by a fixed sequence of float32 operations, the same bits everywhere; within 2 ulp.

    n = x / ln 2 rounded to the nearest whole number (ties to even); r = x - n ln 2 in two parts; Horner's rule of
    degree 7 in r; times 2^n. x is taken as -87 below and 88 above that.
    """
    x = np.clip(_float(x), F32(-87), F32(88))
    n = np.rint(x * _LOG2E)
    r: np.ndarray = x - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    y = np.full_like(r, _EXP[0])
    for coefficient in _EXP[1:]:
        y = y * r + coefficient
    return np.ldexp(y, n.astype(np.int32))


def softmax(x: np.ndarray) -> np.ndarray:
    """exp(x - max) over its sum in order, by division. Shapes: [N, C] -> [N, C]."""
    e = exp(_float(x) - x.max(axis=-1, keepdims=True))
    total = np.zeros(e.shape[:-1], F32)
    for c in range(e.shape[-1]):
        total += e[..., c]
    return e / total[..., None]
