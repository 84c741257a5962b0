"""Proxy normalisation: what an activation does to each channel's mean and deviation is undone by a proxy's.

Imports torch and bnnfree.nn only.
Ref: Labatie et al. 2021, "Proxy-Normalizing Activations to Match Batch Normalization while Removing Batch Dependence".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bnnfree.nn.norms.gaussian import gaussian_moments
from bnnfree.nn.sign import per_channel

EPS = 0.03
FLOOR = 1e-6


class ProxyNorm(nn.Module):
    """out = (phi(gamma y + beta) - mu) / sqrt(var + eps), in place of affine and activation after a norm.

    mu, var   mean and variance of phi(gamma Y + beta) for the proxy Y ~ N(bt, (1 + gt)^2) of each channel:
              functions of parameters alone, so no sample sees another and nothing differs at inference
    gamma, beta, bt, gt   learnable per channel, from 1, 0, 0, 0: `weight`, `bias`, `proxy_shift`, `proxy_gain`

    `activation` is phi, a module (None: the identity; then beta cancels, and so does an output shift of phi).
    Closed forms for ReLU, PReLU, RPReLU, TLU, Sign and RSign, else 256 points (norms.gaussian). The deviation of
    gamma Y + beta is sqrt((gamma (1 + gt))^2 + 1e-6): a gamma of 0 divides nothing by 0. Gradients flow through
    mu and var; statistics are float32 at least. Put it after a norm without affine: y of mean 0 and deviation 1.
    Trainings here do not decay bt and gt.

    Shapes: [N, C, ...] -> the same.
    Why eps is as large as 0.03: where phi is nearly dead (a far negative beta), it limits what is amplified.
    """

    def __init__(self, channels: int, activation: nn.Module | None = None, eps: float = EPS):
        super().__init__()
        self.eps = float(eps)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.proxy_shift = nn.Parameter(torch.zeros(channels))
        self.proxy_gain = nn.Parameter(torch.zeros(channels))
        self.activation = nn.Identity() if activation is None else activation

    def moments(self) -> tuple[Tensor, Tensor]:
        """mu and var, [C] each."""
        m = self.weight * self.proxy_shift + self.bias
        s = torch.sqrt((self.weight * (1 + self.proxy_gain)).square() + FLOOR)
        return gaussian_moments(self.activation, m, s)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, self.weight.dtype))
            z = self.activation(x * per_channel(self.weight, x) + per_channel(self.bias, x))
            mean, var = self.moments()
            return (z - per_channel(mean, x)) * per_channel(torch.rsqrt(var + self.eps), x)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps:g}"
