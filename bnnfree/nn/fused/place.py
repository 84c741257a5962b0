"""Geometry of a convolution: stride, padding, dilation, groups. Imports torch only."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Place(NamedTuple):
    """Geometry of a convolution and the value of its padding."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    pad_value: int

    def padded(self, s: Tensor, zero: int = 0) -> tuple[Tensor, tuple[int, int]]:
        """The map with its padding, where that is not of zeros, and the padding left for the convolution.

        zero: what stands for 0 in the map.
        """
        high, wide = self.padding
        if not self.pad_value or not (high or wide):
            return s, self.padding
        padded = F.pad(s, (wide, wide, high, high), value=self.pad_value + zero)
        return padded.contiguous(memory_format=torch.channels_last), (0, 0)
