"""The sign function and its straight-through estimators. Imports torch and bnnfree.errors only.

Forward every estimator is the same sign, +1 at zero, because a bit has no third state. They differ only
in the slope that stands for its derivative in the backward pass:

    forward   s = sign(t)                    sign(0) = +1
    backward  dL/dt = dL/ds * slope(t)

To add one: functions `slope(t, parameter)` and `smooth(t, parameter)`, its integral from 0, and a line in STES; the
tests pick it up from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bnnfree.errors import BnnfreeError, pick
from bnnfree.names import STE_WINDOWS


def per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """A vector [C] shaped to meet x [N, C, ...]."""
    return vector.view(1, -1, *[1] * (x.dim() - 2))


def sign(x: Tensor) -> Tensor:
    """+1 where x >= 0, else -1, in x's dtype. Why: torch.sign(0) is 0, and a bit has no 0."""
    return (x >= 0).to(x.dtype).mul_(2).sub_(1)  # Why not torch.where: it takes several times as long on a CPU


def clip_slope(t: Tensor, width: Tensor) -> Tensor:
    """slope(t) = 1 where |t| <= width, else 0. Ref: Hubara et al. 2016, "Binarized Neural Networks"."""
    return (t.abs() <= width).to(t.dtype)


def clip_smooth(t: Tensor, width: Tensor) -> Tensor:
    """clip(t, -width, width)."""
    return torch.where(t.abs() <= width, t, width * t.sign())  # Why not clamp: its slope at the edges is not 1


def approx_slope(t: Tensor, width: Tensor) -> Tensor:
    """slope(t) = max(0, 2 - 2|t|/width) / width. Ref: Liu et al. 2018, "Bi-Real Net" (width 1)."""
    return (2 - (2 / width) * t.abs()).clamp_min(0) / width


def approx_smooth(t: Tensor, width: Tensor) -> Tensor:
    """u (2 - |u|) with u = clip(t / width, -1, 1): two parabolas between -1 and 1."""
    u = (t / width).clamp(-1, 1)
    return u * (2 - u.abs())


def swish_slope(t: Tensor, steepness: Tensor) -> Tensor:
    """slope(t) = k (2 - k t tanh(k t / 2)) / (1 + cosh(k t)). Ref: Darabi et al. 2018, "BNN+" (k = 5)."""
    u = (steepness * t).clamp(-80, 80)  # beyond, the slope is 0, and infinity over infinity would be NaN
    return steepness * (2 - u * torch.tanh(u / 2)) / (1 + torch.cosh(u))


def swish_smooth(t: Tensor, steepness: Tensor) -> Tensor:
    """2 f (1 + k t (1 - f)) - 1 with f = sigmoid(k t)."""
    u = (steepness * t).clamp(-80, 80)
    return 2 * torch.sigmoid(u) * (1 + u * torch.sigmoid(-u)) - 1


def sigmoid_slope(t: Tensor, steepness: Tensor) -> Tensor:
    """slope(t) = 2 k f (1 - f) with f = sigmoid(k t). Ref: Ma et al. 2024, "A&B BNN" (k = 3)."""
    f = torch.sigmoid(steepness * t)
    return 2 * steepness * f * (1 - f)


def sigmoid_smooth(t: Tensor, steepness: Tensor) -> Tensor:
    """2 sigmoid(k t) - 1."""
    return torch.tanh(steepness * t / 2)


def ede_slope(t: Tensor, steepness: Tensor) -> Tensor:
    """slope(t) = max(1, 1/k) k (1 - tanh(k t)^2), k annealed from 0.1 to 10 over training.

    Ref: Qin et al. 2020, "Forward and Backward Information Retention" (IR-Net), error decay estimator.
    """
    return (1 / steepness).clamp_min(1) * steepness * (1 - torch.tanh(steepness * t).square())


def ede_smooth(t: Tensor, steepness: Tensor) -> Tensor:
    """max(1, 1/k) tanh(k t)."""
    return (1 / steepness).clamp_min(1) * torch.tanh(steepness * t)


def identity_slope(t: Tensor, _: Tensor) -> Tensor:
    """slope(t) = 1: the plain straight-through estimator of latent weights."""
    return torch.ones_like(t)


def identity_smooth(t: Tensor, _: Tensor) -> Tensor:
    """t."""
    return t


def ede_steepness(progress: float, first: float = 0.1, last: float = 10.0) -> float:
    """EDE's k after a share `progress` in [0, 1] of training: log-linear from `first` to `last`."""
    return first * (last / first) ** progress


@dataclass(frozen=True)
class STE:
    """A slope, its parameter's default, and how the parameter moves with training progress (None: fixed).

    smooth: the integral of the slope from 0, the function that the sign stands for in the backward pass.
    """

    slope: Callable[[Tensor, Tensor], Tensor]
    smooth: Callable[[Tensor, Tensor], Tensor]
    parameter: float = 1.0
    anneal: Callable[[float], float] | None = None


STES: dict[str, STE] = {
    "approx": STE(approx_slope, approx_smooth),
    "clip": STE(clip_slope, clip_smooth),
    "swish": STE(swish_slope, swish_smooth, 5.0),
    "sigmoid": STE(sigmoid_slope, sigmoid_smooth, 3.0),
    "ede": STE(ede_slope, ede_smooth, ede_steepness(0.0), ede_steepness),
    "identity": STE(identity_slope, identity_smooth),
}


def _positive(value: float, name: str) -> float:
    if not 0 < value < math.inf:
        raise BnnfreeError(f"{name}: got {value!r}, expected a finite number above 0.")
    return float(value)


def sample_window(t: Tensor) -> Tensor:
    """k_n = 1 / std of sample n's own values, 1 for a constant sample. Shapes: [N, ...] -> [N]."""
    rows = (t.permute(0, 2, 3, 1) if t.dim() == 4 else t).reshape(len(t), -1)  # channels_last: no copy
    # Why not torch.std: it takes ten times as long on a CPU
    std = torch.linalg.vector_norm(rows - rows.mean(1, keepdim=True), dim=1) / math.sqrt(rows.shape[1])
    return torch.where(std > 1e-5, 1 / std, torch.ones_like(std))


class _Sign(torch.autograd.Function):
    """Forward sign; backward the named slope. Keeps its input only: 4 bytes per activation in float32."""

    @staticmethod
    def forward(ctx, x: Tensor, parameter: Tensor, ste: str, per_sample: bool) -> Tensor:
        ctx.save_for_backward(x, parameter)
        ctx.ste, ctx.per_sample = ste, per_sample
        return sign(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, parameter = ctx.saved_tensors
        slope = STES[ctx.ste].slope
        if not ctx.per_sample:
            return grad * slope(x, parameter), None, None, None
        t = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        k = sample_window(t).view(-1, *[1] * (x.dim() - 1))
        return (grad * (slope(k * t, parameter.to(t.dtype)) * k)).to(x.dtype), None, None, None


class Sign(nn.Module):
    """Sign of each value, with a straight-through estimator.

    forward   s = sign(x)
    backward  window "fixed":  dL/dx = dL/ds slope(x)
              window "sample": dL/dx = dL/ds k_n slope(k_n x), k_n = 1 / std of sample n's own values

    The per-sample window keeps the slope's window as wide as the values are, whatever their scale, and
    looks at no other sample; only the backward pass sees it. A constant sample has k_n = 1. `parameter`
    is the slope's width or steepness (None: the estimator's default).

    Shapes: any [N, ...] -> the same. Errors: BnnfreeError for a parameter that is not above 0.
    """

    parameter: Tensor

    def __init__(self, ste: str = "approx", window: str = "fixed", parameter: float | None = None):
        super().__init__()
        rule = pick(STES, ste, "ste")
        pick(dict.fromkeys(STE_WINDOWS), window, "ste_window")
        self.ste, self.window = ste, window
        first = _positive(rule.parameter if parameter is None else parameter, "parameter")
        self.register_buffer("parameter", torch.tensor(first), persistent=False)

    def anneal(self, progress: float) -> None:
        """Move the parameter to where it belongs after a share `progress` in [0, 1] of training."""
        rule = STES[self.ste]
        if rule.anneal is not None:
            self.parameter.fill_(rule.anneal(progress))

    def compared(self, x: Tensor) -> Tensor:
        """t: what is compared with 0, of the layer's input x."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        t = self.compared(x)
        return _Sign.apply(t, self.parameter.to(t.dtype), self.ste, self.window == "sample")

    def extra_repr(self) -> str:
        return f"ste={self.ste}, window={self.window}"


class _SignOfWeight(torch.autograd.Function):
    """Forward sign(w); backward dL/dw = dL/d(scale * sign(w)), whatever the scale: the scale is undone."""

    @staticmethod
    def forward(ctx, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return sign(weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (scale,) = ctx.saved_tensors
        return grad / scale, None


def sign_of_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """Sign of latent weights that will be multiplied by `scale` afterwards.

    forward   b = sign(w)
    backward  dL/dw = dL/d(scale b), that is (dL/db) / scale

    Why: the papers write w_b = scale * sign(w) with an identity estimator around the product, so the
    gradient of a latent does not shrink with the scale. `scale` broadcasts against `weight`; detached.
    """
    return _SignOfWeight.apply(weight, scale.detach())
