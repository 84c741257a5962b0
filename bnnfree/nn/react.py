"""Learnable thresholds and activations of ReActNet. Imports torch and bnnfree.nn only.

Ref: Liu et al. 2020, "ReActNet: Towards Precise Binary Neural Network with Generalized Activation Functions".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnnfree.nn.sign import Sign


def _per_channel(vector: Tensor, x: Tensor) -> Tensor:
    return vector.view(1, -1, *[1] * (x.dim() - 2))


class RSign(Sign):
    """Sign with a learnable threshold per channel: s = sign(x + b), b [C] starts at 0.

    backward  through the estimator of `Sign` at t = x + b; dL/db sums dL/dt over samples and positions.
    Shapes: [N, C, ...] -> the same.
    """

    def __init__(self, channels: int, ste: str = "approx", window: str = "fixed"):
        super().__init__(ste, window)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + _per_channel(self.bias, x))


class RPReLU(nn.Module):
    """y = PReLU_c(x + b1) + b2 with a slope and two shifts per channel.

    Slopes start at 0.25, shifts at 0. input_shift=False leaves b1 out, for where the layer before has a
    bias of its own. Shapes: [N, C, ...] -> the same.
    """

    def __init__(self, channels: int, input_shift: bool = True):
        super().__init__()
        self.input_shift = nn.Parameter(torch.zeros(channels)) if input_shift else None
        self.slope = nn.Parameter(torch.full((channels,), 0.25))
        self.output_shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        # Why: autocast on a CPU would round the trunk to bfloat16 here, and signs near 0 would change
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.slope.dtype)
            if self.input_shift is not None:
                x = x + _per_channel(self.input_shift, x)
            return F.prelu(x, self.slope) + _per_channel(self.output_shift, x)
