"""Signs, bits, and the products of signs. Imports numpy and bnnfree.errors only.

A sign is stored as one bit, 1 meaning negative. sign(0) = +1, and so is sign(-0.0); what is not a number
counts as negative, because it is not >= 0. Channel c of a pixel is bit c % 64 of its word c // 64; the bits
above the last channel are 0. Two signs multiply to -1 where their bits differ, so for C channels

    sum_c a_c w_c = C - 2 popcount(a xor w)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bnnfree.errors import BnnfreeError

WORD = 64  # bits


class Side(NamedTuple):
    """A window along one axis of an image: `size` is the image's."""

    size: int
    kernel: int
    stride: int
    padding: int
    dilation: int
    after: int

    @property
    def span(self) -> int:
        """Rows from the first tap to the last, both included."""
        return self.dilation * (self.kernel - 1) + 1

    @property
    def padded(self) -> int:
        return self.size + self.padding + self.after

    @property
    def positions(self) -> int:
        """Number of windows; none below 1 fits."""
        return (self.padded - self.span) // self.stride + 1


@dataclass(frozen=True)
class Window:
    """Geometry of a kernel over an image: (rows, columns) each of size, stride, padding and dilation.

    padding: above and on the left. after: below and on the right; None: as much as on the other side.
    """

    size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    after: tuple[int, int] | None = None

    def __post_init__(self):
        if self.after is None:
            object.__setattr__(self, "after", self.padding)
        for name, least in (("size", 1), ("stride", 1), ("padding", 0), ("dilation", 1), ("after", 0)):
            if min(getattr(self, name)) < least:
                raise BnnfreeError(f"window: got {name} {getattr(self, name)}, expected {least} or more.")

    def sides(self, height: int, width: int) -> list[Side]:
        """The same along each axis, with the size of the image: rows, then columns."""
        fields = (self.size, self.stride, self.padding, self.dilation, self.after)
        return [Side(*side) for side in zip((height, width), *fields, strict=True)]  # type: ignore[arg-type]

    def output(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the output for an image of height x width."""
        out = [side.positions for side in self.sides(height, width)]
        if min(out) < 1:
            raise BnnfreeError(f"window: got an image of {height}x{width}, smaller than a kernel of {self}.")
        return out[0], out[1]

    def taps(self, padded: np.ndarray, height: int, width: int):
        """(i, j, values) of each tap, row by row: what tap (i, j) sees at every output position.

        Shapes: padded [N, padded H, padded W, ...] -> values [N, H', W', ...]. height, width: of the image alone.
        """
        rows, columns = self.output(height, width)
        for i in range(self.size[0]):
            for j in range(self.size[1]):
                top, left = i * self.dilation[0], j * self.dilation[1]
                yield (
                    i,
                    j,
                    padded[
                        :,
                        top : top + (rows - 1) * self.stride[0] + 1 : self.stride[0],
                        left : left + (columns - 1) * self.stride[1] + 1 : self.stride[1],
                    ],
                )

    def pad(self, image: np.ndarray, value) -> np.ndarray:
        """`image` [N, H, W, ...] with `value` around it."""
        around = list(zip(self.padding, self.after, strict=True))  # type: ignore[arg-type]
        return np.pad(image, [(0, 0), *around, *[(0, 0)] * (image.ndim - 3)], constant_values=value)


def sign_bits(x: np.ndarray) -> np.ndarray:
    """True where x is negative (or not a number): bit = not (x >= 0). Shapes: any -> the same, bool."""
    return ~(x >= 0)


def threshold_bits(x: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    """True where x is below its channel's threshold: bit = not (x >= t). Shapes: [..., C], [C] -> [..., C] bool.

    sign(x + b) is this with t = -b, to the bit: a rounded sum has the sign of the exact one.
    """
    return ~(x >= threshold)


def signs(bits: np.ndarray) -> np.ndarray:
    """+1 for bit 0 and -1 for bit 1, int32."""
    return 1 - 2 * bits.astype(np.int32)


def pack_bits(bits: np.ndarray) -> np.ndarray:
    """Bits along the last axis to words. Shapes: bool [..., C] -> uint64 [..., ceil(C / 64)]."""
    channels = bits.shape[-1]
    words = -(-channels // WORD)
    padded = np.zeros((*bits.shape[:-1], words * WORD), bool)
    padded[..., :channels] = bits
    packed = np.packbits(padded, axis=-1, bitorder="little")
    return np.ascontiguousarray(packed).view("<u8").astype(np.uint64, copy=False)


def unpack_bits(words: np.ndarray, channels: int) -> np.ndarray:
    """The inverse of `pack_bits`. Shapes: uint64 [..., ceil(C / 64)] -> bool [..., C]."""
    if words.shape[-1] != -(-channels // WORD):
        raise BnnfreeError(f"unpack_bits: got {words.shape[-1]} words for {channels} channels.")
    octets = np.ascontiguousarray(words.astype("<u8", copy=False)).view(np.uint8)
    return np.unpackbits(octets, axis=-1, count=channels, bitorder="little").astype(bool)


def _products(a: np.ndarray, w: np.ndarray, channels: int) -> np.ndarray:
    """Sums of products of signs. Shapes: a [..., K], w [O, K] words -> int32 [..., O]."""
    differing = np.bitwise_count(a[..., None, :] ^ w).sum(-1, dtype=np.int32)
    return channels - 2 * differing


def binary_linear(a: np.ndarray, w: np.ndarray, channels: int) -> np.ndarray:
    """sum_c a_c w_oc of signs. Shapes: a uint64 [N, K], w uint64 [O, K], K = ceil(C / 64) -> int32 [N, O]."""
    return _products(a, w, channels)


def binary_conv2d(
    a: np.ndarray, w: np.ndarray, channels: int, window: Window, *, groups: int = 1, pad_value: int = 0
) -> np.ndarray:
    """Convolution of signs with signs, exact.

    y[n, r, q, o] = sum over taps (i, j) and the channels c of o's group of a[n, r', q', c] w[o, i, j, c], where
    r' = r stride - padding + i dilation; a tap outside the image counts as `pad_value`: 0, +1 or -1.

    Shapes: a uint64 [N, H, W, ceil(C / 64)], w uint64 [O, kh, kw, ceil(C / groups / 64)] -> int32 [N, H', W', O].
    Every group's weights start a new word; `channels` is C.
    """
    if pad_value not in (0, 1, -1):
        raise BnnfreeError(f"binary_conv2d: got pad_value {pad_value}, expected 0, 1 or -1.")
    outputs = w.shape[0]
    if channels % groups or outputs % groups:
        raise BnnfreeError(f"binary_conv2d: got {groups} groups for {channels} and {outputs} channels.")
    if groups > 1:
        bits, size, part = unpack_bits(a, channels), channels // groups, outputs // groups
        each = [
            binary_conv2d(
                pack_bits(bits[..., g * size : (g + 1) * size]),
                w[g * part : (g + 1) * part],
                size,
                window,
                pad_value=pad_value,
            )
            for g in range(groups)
        ]
        return np.concatenate(each, axis=-1)
    n, height, width, _ = a.shape
    outside = pack_bits(np.full(channels, pad_value < 0))
    inside = window.pad(np.ones((1, height, width), bool), False)
    padded = window.pad(a, 0)
    padded[:, ~inside[0]] = outside
    y = np.zeros((n, *window.output(height, width), outputs), np.int32)
    here = [values for _, _, values in window.taps(inside, height, width)]
    for tap, (i, j, values) in enumerate(window.taps(padded, height, width)):
        product = _products(values, w[:, i, j], channels)
        y += product if pad_value else product * here[tap][..., None]
    return y
