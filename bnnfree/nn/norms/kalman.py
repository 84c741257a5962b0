"""Batch Kalman normalisation: batch statistics corrected by what the layers before predict. Imports torch, bnnfree.

A trunk of blocks hands a `Belief` about its map from block to block (values, beside x; nothing is kept on a layer):

    belief     act(N(m, v)) per channel: m, v of the residual sum, act the activation that followed it
    predict    one sample of the belief goes through the very layers between two normalisers (sign and shared
               convolution, same stride); mean and variance of the result over positions are the prior (mp, vp)
    correct    mean = p mp + (1 - p) mean_B
               var  = p vp + (1 - p) var_B + p (1 - p) (mean_B - mp)^2         the moments of the mixture
    normalise  y = gamma (x - mean) / sqrt(var + eps) + beta
    pass on    by these moments y has mean beta and variance gamma^2 (but for eps); a residual sum adds means and
               variances of branch and shortcut, a pool keeps them, a shortcut's activation changes them in closed form

Where this differs from the authors' code: there the un-normalised moments go on, although what the next layer reads is
normalised; a sign would make one bit of that. One sample map is drawn a pass, there one for each group of 2.
Gradients flow through prior, sample and shared weights.
Outside a trunk (models.stem.Trunk) nobody hands a belief, and the layer is batch normalisation.
Ref: Wang et al. 2018, "Kalman Normalization: Normalizing Internal Representations Across Network Layers".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from bnnfree.nn.norms.gaussian import Pair, gaussian_moments
from bnnfree.nn.norms.options import positive_eps
from bnnfree.nn.sign import per_channel
from bnnfree.normalisers import within

WORTH = 16  # samples that a prior counts as where its share is not given
TRUSTED = 100.0  # the prior's variance may differ from the batch's by this factor, on average over channels


class Belief(NamedTuple):
    """Assumed distribution of a map, [C] each: activation(N(mean, var)); activation None or Identity: a Gaussian."""

    mean: Tensor
    var: Tensor
    activation: nn.Module | None = None

    def sample(self, x: Tensor) -> Tensor:
        """One map of independent values [1, C, H, W], of the positions of x [N, C, H, W]."""
        noise = torch.randn(1, len(self.mean), *x.shape[2:], dtype=self.mean.dtype, device=x.device)
        map_ = noise * per_channel(self._std(), noise) + per_channel(self.mean, noise)
        return map_ if self.activation is None else self.activation.forward(map_)  # forward: hooks are for real maps

    def moments(self) -> Pair:
        """Mean and variance after the activation."""
        return gaussian_moments(self.activation, self.mean, self._std())

    def _std(self) -> Tensor:
        return (self.var + 1e-6).sqrt()  # Why 1e-6: at a gain of 0 the root has no finite slope


def kalman_norm(channels: int, *, prior: float | None = None, eps: float = 1e-5, momentum: float = 0.1) -> nn.Module:
    """KalmanNorm2d."""
    return KalmanNorm2d(channels, prior=prior, eps=eps, momentum=momentum)


class KalmanNorm2d(nn.BatchNorm2d):
    """Batch normalisation by the moments of a mixture: a predicted prior and the batch (formulas above).

    prior   the prior's share p = 1 - gain. 0: batch normalisation to the bit. None: the prior counts as 16 samples,
            p = 16 / (16 + N), which is 0.89 for statistics of 2 samples and 0.11 for 128, where the authors
            set 0.9 and 0.05 by hand; between these (0.33 at 32) it is a guess
    Running mean and variance follow the fused moments (`momentum` 0.1; the batch's part of the variance unbiased, as
    torch's); inference is batch normalisation with them. Where the prior's variance is more than 100 times the
    batch's on average over channels, or less than a hundredth of it (a 1x1 map has none), the batch decides alone.

    Shapes: [N, C, H, W] -> the same.
    """

    def __init__(self, channels: int, *, prior: float | None = None, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__(channels, eps=positive_eps(eps), momentum=within("momentum", momentum, low=0, high=1))
        self.prior = None if prior is None else within("prior", prior, low=0, high=1)

    def share(self, samples: int) -> float:
        """p for statistics of so many samples."""
        return WORTH / (WORTH + samples) if self.prior is None else self.prior

    def output_moments(self) -> Pair:
        """Mean and variance of the output, by the moments it was normalised with."""
        return self.bias, self.weight.square()

    def correct(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """The training output for the prior (mean, var) [C]; `forward` is the one without a prior."""
        share = self.share(x.shape[0])
        if share == 0 or not self.training:
            return self.forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return self._fused(x.to(self.weight.dtype), Belief(mean, var), share)

    def _fused(self, x: Tensor, prior: Belief, share: float) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        with torch.no_grad():
            ratio = (prior.var / var.clamp_min(self.eps)).mean()
            trusted = (ratio < TRUSTED) & (ratio > 1 / TRUSTED)
            p = share * trusted.to(x.dtype)
        # Why where: 0 times a prior that is not finite would not be 0
        prior_mean, prior_var = torch.where(trusted, prior.mean, mean), torch.where(trusted, prior.var, var)
        fused_mean, fused_var = mixture(p, prior_mean, prior_var, mean, var)
        with torch.no_grad():
            count = x.numel() / x.shape[1]
            unbiased = fused_var + (1 - p) * var / max(count - 1, 1)
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(fused_mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
        scale = self.weight * torch.rsqrt(fused_var + self.eps)
        return (x - per_channel(fused_mean, x)) * per_channel(scale, x) + per_channel(self.bias, x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, prior={self.prior}"


def mixture(p: Tensor | float, mean_a: Tensor, var_a: Tensor, mean_b: Tensor, var_b: Tensor) -> Pair:
    """Mean and variance of what is distribution a with probability p, else b. Both means are those before fusing."""
    cross = p * (1 - p) * (mean_b - mean_a).square()
    return p * mean_a + (1 - p) * mean_b, p * var_a + (1 - p) * var_b + cross


def run_believing(layers: nn.Sequential, x: Tensor, ghost: Tensor) -> tuple[Tensor, Pair]:
    """layers(x), and the moments of that; each KalmanNorm2d corrects by what becomes of `ghost` on its way there.

    Shapes: x [N, C, H, W]; ghost [1, C, H, W], a sample of what x is believed to be. After the last normaliser at most
    an activation may come: the moments returned are those behind it. Why forward(): a hook on a shared layer is for
    the real map.
    """
    moments = None
    for layer in layers:
        if isinstance(layer, KalmanNorm2d):
            var, mean = torch.var_mean(ghost.to(layer.weight.dtype), dim=(0, 2, 3), correction=0)
            x = layer.correct(x, mean, var)
            moments = layer.output_moments()
            ghost = Belief(*moments).sample(x)
        else:
            x, ghost = layer(x), layer.forward(ghost)
    assert moments is not None
    last = layers[-1]
    return x, moments if isinstance(last, KalmanNorm2d) else Belief(*moments, last).moments()


def first_belief(layers: nn.Module) -> Belief | None:
    """Belief about the output of a stem: its KalmanNorm2d's moments, and the activation that follows it.

    None where there is no such layer, or its prior counts for nothing: then no belief is threaded.
    """
    modules = [module for module in layers.modules() if not isinstance(module, nn.Sequential | nn.MaxPool2d)]
    for i, module in enumerate(modules):
        if isinstance(module, KalmanNorm2d) and module.prior != 0:
            return Belief(*module.output_moments(), *modules[i + 1 : i + 2])
    return None
