"""Products of signs as 8-bit whole numbers, exact, where the CPU has instructions for them. Imports torch only.

Signs are stored as s + 1 in {0, 2} with zero point 1, because torch's quantised convolution takes unsigned inputs; what
lies on padding of zeros is the zero point. Sums come back as float32, exact up to 2^24.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bnnfree.nn.fused.place import Place

SIGNS, WEIGHTS = torch.uint8, torch.int8
ZERO = 1
TRIALS = 5


def pack(weight: Tensor, place: Place) -> Tensor:
    """Weights of +-1 in the order that the convolution wants. Shapes: int8 [O, I, kh, kw] -> opaque."""
    ones = torch.ones(weight.shape[0])
    padding = place.padding if not place.pad_value else (0, 0)
    return torch.ops.onednn.qconv_prepack(
        weight, ones, 1.0, ZERO, list(place.stride), list(padding), list(place.dilation), place.groups, None
    )


def convolve(s: Tensor, packed: Tensor, channels: int, place: Place) -> Tensor:
    """Sums of products. Shapes: uint8 [N, I, H, W] in channels_last, `channels` outputs -> float32 [N, O, H', W']."""
    s, padding = place.padded(s, ZERO)
    scale, zero = torch.ones(channels), torch.zeros(channels, dtype=torch.int64)
    geometry = list(place.stride), list(padding), list(place.dilation), place.groups
    return torch.ops.onednn.qconv2d_pointwise(
        s, 1.0, ZERO, packed, scale, zero, None, *geometry, 1.0, 0, torch.float32, "none", [], ""
    )


@functools.cache
def is_faster() -> bool:
    """Does one middling convolution give the same sums as float32, in less time? A few milliseconds, asked once."""
    place = Place((1, 1), (1, 1), (1, 1), 1, 0)
    generator = torch.Generator().manual_seed(0)
    s, weight = (torch.randint(0, 2, shape, generator=generator) * 2 - 1 for shape in ((4, 64, 16, 16), (64, 64, 3, 3)))
    dense = {"memory_format": torch.channels_last}
    floats = s.float().contiguous(**dense), weight.float().contiguous(**dense)
    small = (s + ZERO).to(SIGNS).contiguous(**dense), weight.to(WEIGHTS).contiguous(**dense)

    def exact() -> Tensor:
        return convolve(small[0], pack(small[1], place), 64, place)

    def rounded() -> Tensor:
        return F.conv2d(*floats, padding=1)

    try:
        if not torch.equal(exact(), rounded()):
            return False
    except (RuntimeError, AttributeError, NotImplementedError):  # a torch without these operations
        return False
    return _seconds(exact) < _seconds(rounded)


def _seconds(call: Callable[[], Tensor]) -> float:
    taken = []
    for _ in range(TRIALS):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)
