"""Learnable thresholds and activations of ReActNet. Imports torch and bnnfree.nn only.

Ref: Liu et al. 2020, "ReActNet: Towards Precise Binary Neural Network with Generalized Activation Functions".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnnfree.nn.sign import Sign, per_channel


class RSign(Sign):
    """Sign with a learnable threshold per channel: s = sign(x + b), b [C] starts at 0.

    backward  through the estimator of `Sign` at t = x + b; dL/db sums dL/dt over samples and positions.
    Shapes: [N, C, ...] -> the same.
    """

    def __init__(self, channels: int, ste: str = "approx", window: str = "fixed", parameter: float | None = None):
        super().__init__(ste, window, parameter)
        self.bias = nn.Parameter(torch.zeros(channels))

    def compared(self, x: Tensor) -> Tensor:
        return x + per_channel(self.bias, x)


class RPReLU(nn.Module):
    """y = PReLU_c(x + b1) + b2 with a slope and two shifts per channel.

    Slopes start at 0.25, shifts at 0. input_shift=False leaves b1 out, for where the layer before has a
    bias of its own. Shapes: [N, C, ...] -> the same.
    """

    def __init__(self, channels: int, input_shift: bool = True):
        super().__init__()
        self.input_shift = nn.Parameter(torch.zeros(channels)) if input_shift else None
        self._make_slope(channels)
        self.output_shift = nn.Parameter(torch.zeros(channels))

    def _make_slope(self, channels: int) -> None:
        self.slope = nn.Parameter(torch.full((channels,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        # Why: autocast on a CPU would round the trunk to bfloat16 here, and signs near 0 would change
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.slope.dtype)
            if self.input_shift is not None:
                x = x + per_channel(self.input_shift, x)
            return F.prelu(x, self.slope) + per_channel(self.output_shift, x)


class PowerRPReLU(RPReLU):
    """RPReLU whose slopes are powers of two, so that inference can shift instead of multiply.

        slope = 2^round(e)      e [C] learnable from -3, a slope of 1/8

    backward  round passes its gradient on as the identity does.
    Ref: Ma et al. 2024, "A&B BNN", quantised RPReLU.
    """

    def _make_slope(self, channels: int) -> None:
        self.exponent = nn.Parameter(torch.full((channels,), -3.0))

    @property
    def slope(self) -> Tensor:  # type: ignore[override]
        """The slopes [C]."""
        return torch.exp2(self.exponent + (self.exponent.round() - self.exponent).detach())
