"""Batch normalisation, of ghost batches too, and batch renormalisation. Imports torch and bnnfree only.

Ref: Ioffe & Szegedy 2015; Ioffe 2017, "Batch Renormalization: Towards Reducing Minibatch Dependence ...".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnnfree.nn.norms.options import positive_eps
from bnnfree.normalisers import within

PLAIN = 0.03  # share of training that is plain batch normalisation; then r's and d's ranges grow, to these shares
R_GROWN, D_GROWN = 0.25, 0.15


def batch_norm(channels: int, *, eps: float = 1e-5, momentum: float = 0.1, ghost: int = 0) -> nn.Module:
    """torch's BatchNorm2d; with `ghost` a GhostBatchNorm2d of groups of so many images."""
    eps, momentum = positive_eps(eps), within("momentum", momentum, low=0, high=1)
    if ghost:
        return GhostBatchNorm2d(channels, ghost, eps=eps, momentum=momentum)
    return nn.BatchNorm2d(channels, eps=eps, momentum=momentum)


def batch_renorm(
    channels: int, *, rmax: float = 3.0, dmax: float = 5.0, eps: float = 1e-5, momentum: float = 0.01
) -> nn.Module:
    """BatchRenorm2d."""
    return BatchRenorm2d(channels, rmax=rmax, dmax=dmax, eps=eps, momentum=momentum)


class GhostBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation with the statistics of each `ghost` images in a row, as if they were a batch of their own.

    training  y = gamma (x - mu_G) / sqrt(var_G + eps) + beta    of the group G that x is in, gradients through both
    inference batch normalisation with the running statistics, which the groups move one after the other

    A batch of 128 with ghost 2 trains as 64 accumulated batches of 2 do, in one pass. Where the batch is no multiple,
    the last group has what is left. Shapes: [N, C, H, W] -> the same.
    Ref: Hoffer et al. 2017, "Train longer, generalize better".
    """

    def __init__(self, channels: int, ghost: int, *, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__(channels, eps=eps, momentum=momentum)
        self.ghost = int(within("ghost", ghost, low=1))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        whole, places = len(x) // self.ghost * self.ghost, x.permute(0, 2, 3, 1)
        parts = [places[:whole].unflatten(0, (-1, self.ghost))] if whole else []
        parts += [places[whole:][None]] if whole < len(x) else []
        normalised, means, variances = zip(*(self._groups(part) for part in parts), strict=True)
        self._move(torch.cat(means), torch.cat(variances))
        outputs = [y.flatten(0, 1) for y in normalised]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).permute(0, 3, 1, 2)

    def _groups(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(y, mean, unbiased variance) of groups. Shapes: [G, n, H, W, C] -> the same, [G, C], [G, C]."""
        real = x.float() if x.dtype in _LOW else x
        var, mean = torch.var_mean(real, dim=(1, 2, 3), correction=0, keepdim=True)
        factor = self.weight * (var + self.eps).rsqrt()
        y = torch.addcmul(self.bias - mean * factor, real, factor)
        count = x[0, ..., 0].numel()
        unbiased = var.detach() * (count / max(count - 1, 1))
        return y.to(x.dtype), mean.detach().flatten(1), unbiased.flatten(1)

    @torch.no_grad()
    def _move(self, means: Tensor, variances: Tensor) -> None:
        """The running statistics after each group in turn; momentum None: the plain mean of all so far."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        ages = torch.arange(len(means) - 1, -1, -1, device=means.device).to(self.running_mean.dtype)
        self.num_batches_tracked.add_(len(means))
        if self.momentum is None:
            share = torch.ones_like(ages) / self.num_batches_tracked
        else:
            share = self.momentum * (1 - self.momentum) ** ages
        for running, found in ((self.running_mean, means), (self.running_var, variances)):
            running.mul_(1 - share.sum()).add_(share @ found.to(running.dtype))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ghost={self.ghost}"


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
