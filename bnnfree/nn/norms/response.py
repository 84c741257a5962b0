"""Filter response normalisation and its threshold. Imports torch and bnnfree only.

Ref: Singh & Krishnan 2020, "Filter Response Normalization Layer: Eliminating Batch Dependence ...".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bnnfree.nn.norms.options import positive_eps
from bnnfree.nn.sign import per_channel

EPS_START = 1e-4


def filter_response(
    channels: int, *, eps: float = 1e-6, learnable_eps: bool = True, tlu: bool = True, tau: float = -1.0
) -> nn.Module:
    """FilterResponseNorm, then (tlu) a ThresholdedLinear whose thresholds start at tau.

    Unlike the class, eps is learned unless told otherwise: maps of 1x1, where it must be, are common at the end of
    networks for small images, and elsewhere 1e-4 beside a mean square near 1 changes nothing.
    Why tau is not 0, the paper's start: a sign that reads max(y, 0) is +1 everywhere, and says nothing. In networks
    of real weights the threshold stands in ReLU's place and starts at 0, unless tau is given.
    """
    norm = FilterResponseNorm(channels, positive_eps(eps), learnable_eps)
    return nn.Sequential(norm, ThresholdedLinear(channels, tau)) if tlu else norm


class FilterResponseNorm(nn.Module):
    """y = gamma x / sqrt(mean(x^2) + e) + beta, the mean over the positions of one sample's channel.

    forward   xhat = x / sqrt(nu2 + e),  nu2 [N, C] = mean of x^2 over positions; no mean is taken off
              e = |eps|, or |eps| + |eps_l| with one learnable eps_l for the layer (starts at 1e-4)
    backward  dL/dx = (g - xhat mean(xhat g)) / sqrt(nu2 + e),  g = gamma dL/dy: orthogonal to x but for e

    No sample sees another and nothing differs between training and inference. On 1x1 maps (and on features
    [N, C]) xhat is a soft sign of width sqrt(e): with e = 1e-6 hardly any gradient passes, so learn eps there.
    Statistics are float32 at least, under autocast too. gamma, beta: per channel, from 1 and 0. Adam moves eps_l by
    its step size at once, so with large steps e wanders (to 0.1 and more at 2e-2, beside a mean square near 1).

    Shapes: [N, C, ...] -> the same.
    Why the absolute value: an eps_l that a step takes below 0 must not make the root imaginary.
    Ref: Singh & Krishnan 2020, section 3.
    """

    def __init__(self, channels: int, eps: float = 1e-6, learnable_eps: bool = False):
        super().__init__()
        self.eps = float(eps)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps_l = nn.Parameter(torch.tensor(EPS_START)) if learnable_eps else None

    def effective_eps(self) -> Tensor:
        """Term added to the mean square: a scalar, never below 0."""
        if self.eps_l is None:
            return self.weight.new_tensor(abs(self.eps))
        return abs(self.eps) + self.eps_l.abs()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, self.weight.dtype))
            # Why not mean() of no dims: features [N, C] have one position each
            square = x.square()
            nu2 = square.flatten(2).mean(2) if x.dim() > 2 else square
            scale = torch.rsqrt(nu2 + self.effective_eps()) * self.weight
            return x * scale.view(*scale.shape, *[1] * (x.dim() - 2)) + per_channel(self.bias, x)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps:g}, learnable_eps={self.eps_l is not None}"


class ThresholdedLinear(nn.Module):
    """TLU: y = max(x, tau), tau per channel. Shapes: [N, C, ...] -> the same.

    backward  dL/dx passes where x > tau; dL/dtau sums the gradient of the other places, which ReLU discards
              (at a tie each gets half)
    """

    def __init__(self, channels: int, tau: float = 0.0):
        super().__init__()
        self.tau = nn.Parameter(torch.full((channels,), float(tau)))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, self.tau.dtype))
            return torch.maximum(x, per_channel(self.tau, x))
