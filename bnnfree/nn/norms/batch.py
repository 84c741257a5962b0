"""Batch normalisation and batch renormalisation. Imports torch and bnnfree only.

Ref: Ioffe & Szegedy 2015; Ioffe 2017, "Batch Renormalization: Towards Reducing Minibatch Dependence ...".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnnfree.nn.norms.options import positive_eps, within

PLAIN = 0.03  # share of training that is plain batch normalisation; then r's and d's ranges grow, to these shares
R_GROWN, D_GROWN = 0.25, 0.15


def batch_norm(channels: int, *, eps: float = 1e-5, momentum: float = 0.1) -> nn.Module:
    """torch's BatchNorm2d."""
    return nn.BatchNorm2d(channels, eps=positive_eps(eps), momentum=within("momentum", momentum, low=0, high=1))


def batch_renorm(
    channels: int, *, rmax: float = 3.0, dmax: float = 5.0, eps: float = 1e-5, momentum: float = 0.01
) -> nn.Module:
    """BatchRenorm2d."""
    return BatchRenorm2d(channels, rmax=rmax, dmax=dmax, eps=eps, momentum=momentum)


class BatchRenorm2d(nn.BatchNorm2d):
    """Batch normalisation whose training output is pulled towards what inference will give.

    training  y = gamma ((x - mu_B) / sd_B r + d) + beta        mu_B, sd_B of the batch, gradients through both
              r = clip(sd_B / sd, 1/rmax, rmax)                 no gradient; mu, sd the running statistics
              d = clip((mu_B - mu) / sd, -dmax, dmax)           no gradient
    inference batch normalisation with mu, sd

    Unclipped, training gives exactly the output of inference. The ranges open with training: `anneal(progress)`
    keeps r = 1 and d = 0 up to 3% of it, then widens r to rmax at 25% and d to dmax at 15%, linearly. Who never
    calls it (bnnfree.nn.anneal) trains with plain batch normalisation. Smaller batches want smaller limits.
    The running statistics are the plain mean over all batches until that moves slower than `momentum` (0.01): an
    average that starts at 0 and 1 would still be cold when r and d first use it. The first batch has r = 1, d = 0.

    Shapes: [N, C, H, W] -> the same. sd is sqrt(var + eps); the running variance is unbiased, as torch's.
    """

    rmax: Tensor
    dmax: Tensor

    def __init__(
        self, channels: int, *, rmax: float = 3.0, dmax: float = 5.0, eps: float = 1e-5, momentum: float = 0.01
    ):
        super().__init__(channels, eps=positive_eps(eps), momentum=within("momentum", momentum, low=0, high=1))
        self.limits = within("rmax", rmax, low=1), within("dmax", dmax, low=0)
        self.register_buffer("rmax", torch.tensor(1.0), persistent=False)
        self.register_buffer("dmax", torch.tensor(0.0), persistent=False)

    def anneal(self, progress: float) -> None:
        """Open the ranges of r and d as a share `progress` in [0, 1] of training wants them."""
        r_share, d_share = (min(max((progress - PLAIN) / (end - PLAIN), 0.0), 1.0) for end in (R_GROWN, D_GROWN))
        self.rmax.fill_(1 + r_share * (self.limits[0] - 1))
        self.dmax.fill_(d_share * self.limits[1])

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        with torch.no_grad():
            var, mean = torch.var_mean(x.float() if x.dtype in _LOW else x, dim=(0, 2, 3), correction=0)
            sd = (self.running_var + self.eps).sqrt()
            known = self.num_batches_tracked > 0
            r = ((var + self.eps).sqrt() / sd).clamp(1 / self.rmax, self.rmax)
            d = ((mean - self.running_mean) / sd).clamp(-self.dmax, self.dmax)
            r, d = torch.where(known, r, 1.0), torch.where(known, d, 0.0)
            self.num_batches_tracked.add_(1)
            share = (1 / self.num_batches_tracked).clamp_min(self.momentum)
            count = x.numel() / x.shape[1]
            self.running_mean += share * (mean - self.running_mean)
            self.running_var += share * (var * (count / max(count - 1, 1)) - self.running_var)
        # the correction is affine, so it folds into gamma and beta and the normalisation stays one operation
        return F.batch_norm(x, None, None, self.weight * r, self.weight * d + self.bias, True, 0.0, self.eps)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rmax={self.limits[0]:g}, dmax={self.limits[1]:g}"


_LOW = (torch.bfloat16, torch.float16)
