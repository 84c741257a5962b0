"""Mean and variance of an activation of a Gaussian, per channel. Imports torch and bnnfree.nn only.

Y ~ N(m, s^2) for each channel, m and s [C] with s > 0; t = m / s, P = Phi(t), Q = 1 - P, p = pdf(t). For R = max(Y, 0):

    E[R]        = s (t P + p)
    Var[R]      = s^2 (P + t^2 P Q + t p (Q - P) - p^2)
    Cov[Y, R]   = s^2 P

and PReLU, aY + (1 - a) R, follows from these. Why in this form and not as E[R^2] - E[R]^2: the difference of two
large numbers has no digits left where |t| is large; here every term vanishes or stays. Gradients flow to m, s and
the activation's parameters. To add an activation: a function (activation, m, s) -> (mean, var) and a line in
MOMENTS; any other module goes through the 256-point rule.
Ref: Labatie et al. 2021, "Proxy-Normalizing Activations ...", section 5 (the proxy variable and its sampling).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bnnfree.nn.norms.response import ThresholdedLinear
from bnnfree.nn.react import PowerRPReLU, RPReLU, RSign
from bnnfree.nn.sign import Sign

POINTS = 256
Pair = tuple[Tensor, Tensor]


def gaussian_moments(activation: nn.Module | None, m: Tensor, s: Tensor) -> Pair:
    """E and Var of activation(Y), Y ~ N(m, s^2) per channel; None is the identity. Shapes: [C], [C] -> [C], [C].

    Closed form for the types in MOMENTS, else the mean and (biased) variance over the values at the 256 midpoint
    quantiles Y_i = m + s sqrt(2) erfinv(2 (i + 1/2) / 256 - 1). Tails are cut: its variance of Y is 0.995 s^2.
    """
    rule = MOMENTS.get(type(activation), _by_points)  # Why not isinstance: a subclass may compute something else
    return rule(activation, m, s)


def _rectified(m: Tensor, s: Tensor, slope: Tensor | float) -> Pair:
    """PReLU, of slope [C], [1] or a number; ReLU is slope 0."""
    t = m / s
    below, above = _phi(-t), _phi(t)
    density = torch.exp(-t.square() / 2) / math.sqrt(2 * math.pi)
    mean = slope * m + (1 - slope) * s * (t * above + density)
    var = above + t.square() * above * below + t * density * (below - above) - density.square()
    var = slope**2 + 2 * slope * (1 - slope) * above + (1 - slope) ** 2 * var
    return mean, s.square() * var.clamp_min(0)


def _phi(t: Tensor) -> Tensor:
    """The normal distribution function; through erfc, so that the lower tail keeps its digits."""
    return 0.5 * torch.erfc(-t / math.sqrt(2))


def _identity(_: Any, m: Tensor, s: Tensor) -> Pair:
    return m, s.square()


def _relu(_: Any, m: Tensor, s: Tensor) -> Pair:
    return _rectified(m, s, 0.0)


def _prelu(activation: nn.PReLU, m: Tensor, s: Tensor) -> Pair:
    return _rectified(m, s, activation.weight)


def _rprelu(activation: RPReLU, m: Tensor, s: Tensor) -> Pair:
    m = m if activation.input_shift is None else m + activation.input_shift
    mean, var = _rectified(m, s, activation.slope)
    return mean + activation.output_shift, var


def _threshold(activation: ThresholdedLinear, m: Tensor, s: Tensor) -> Pair:
    mean, var = _rectified(m - activation.tau, s, 0.0)
    return mean + activation.tau, var


def _sign(activation: Sign, m: Tensor, s: Tensor) -> Pair:
    """P(Y >= 0) = Phi(t): mean P - Q = erf(t / sqrt(2)), variance 1 - mean^2 = 4 P Q."""
    t = (m + activation.bias if isinstance(activation, RSign) else m) / s
    return torch.erf(t / math.sqrt(2)), 4 * _phi(t) * _phi(-t)


def _by_points(activation: nn.Module, m: Tensor, s: Tensor) -> Pair:
    steps = torch.arange(POINTS, dtype=m.dtype, device=m.device)
    y = math.sqrt(2) * torch.erfinv(2 * (steps + 0.5) / POINTS - 1)
    # one sample of 256 positions: what an activation does per sample, it does to the whole distribution
    # and forward(), for hooks are for real maps
    z = activation.forward((m[:, None] + s[:, None] * y).view(1, -1, POINTS, 1)).view(-1, POINTS)
    var, mean = torch.var_mean(z, dim=1, correction=0)
    return mean, var


MOMENTS: dict[type, Callable[[Any, Tensor, Tensor], Pair]] = {
    type(None): _identity,
    nn.Identity: _identity,
    nn.ReLU: _relu,
    nn.PReLU: _prelu,
    RPReLU: _rprelu,
    PowerRPReLU: _rprelu,
    ThresholdedLinear: _threshold,
    Sign: _sign,
    RSign: _sign,
}
