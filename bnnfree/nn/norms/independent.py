"""The independent-component layer: a normaliser before the sign, dropout after it. Imports torch and bnnfree only.

    x -> normaliser -> sign -> dropout -> convolution        nothing after the convolution

Each channel of a convolution's input is normalised and then cut at random, which takes correlation out of the inputs:
with keep rate q, corr(s_i g_i, s_j g_j) = q corr(s_i, s_j) for values of mean 0. In training the kept signs are scaled
by 1/(1 - p), so the convolution's expected output is that of inference, where there is no dropout. Products of scaled
signs are rounded under bf16 autocast like any others.
Why dropout after the sign and not with the normaliser, as in networks of real values: before it, a dropped 0 would
become +1, a bit that says something.
The stem has no normaliser of its own: the first block's does it; the head has one before it, for the trunk has none.
ic rests on batch statistics; ic_gn and ic_frn, a variant of ours, on no other sample.
Ref: Chen et al. 2019, "Rethinking the Usage of Batch Normalization and Dropout in the Training of Deep Networks".
"""

from __future__ import annotations

from torch import nn

from bnnfree.nn.norms.batch import batch_norm
from bnnfree.nn.norms.group import group_norm
from bnnfree.nn.norms.options import positive_eps
from bnnfree.nn.norms.response import FilterResponseNorm
from bnnfree.normalisers import within

DROP = 0.05


def independent(channels: int, *, drop: float = DROP, eps: float = 1e-5, momentum: float = 0.1) -> nn.Module:
    """The normaliser of `ic`. `drop` is the dropout's probability, which `make_dropout` reads."""
    _check(drop)
    return batch_norm(channels, eps=eps, momentum=momentum)


def independent_group(channels: int, *, drop: float = DROP, groups: int | None = None, eps: float = 1e-5) -> nn.Module:
    """The normaliser of `ic_gn`."""
    _check(drop)
    return group_norm(channels, groups=groups, eps=eps)


def independent_response(
    channels: int, *, drop: float = DROP, eps: float = 1e-6, learnable_eps: bool = True
) -> nn.Module:
    """The normaliser of `ic_frn`: no threshold, for the sign follows."""
    _check(drop)
    return FilterResponseNorm(channels, positive_eps(eps), learnable_eps)


def make_dropout(drop: float = DROP) -> nn.Module | None:
    """The dropout between sign and convolution; None at probability 0. Element by element, not whole channels."""
    return nn.Dropout(drop) if _check(drop) else None


def _check(drop: float) -> float:
    return within("drop", drop, low=0, high=0.99)
