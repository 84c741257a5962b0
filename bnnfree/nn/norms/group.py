"""Normalisers over the channels and positions of one sample: torch's GroupNorm in its three shapes.

    y = (x - mean) / sqrt(var + eps) gamma + beta      mean, var per sample and group, over channels and positions

Imports torch and bnnfree only.
Ref: Wu & He 2018 (group); Ba et al. 2016 (layer: one group); Ulyanov et al. 2016 (instance: a group per channel).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bnnfree.errors import BnnfreeError
from bnnfree.nn.norms.options import positive_eps
from bnnfree.nn.norms.proxy import EPS as PROXY_EPS
from bnnfree.nn.norms.proxy import ProxyNorm

GROUP_SIZE = 16


class GroupNorm(nn.GroupNorm):
    """torch's, for one value in a group too: the output is beta there. Why: torch refuses it when a sample comes alone
    and takes it in a batch, and here no sample's output may depend on the others."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def default_groups(channels: int) -> int:
    """Groups of 16 channels, or a few more where 16 does not divide: the most groups with at least 16 each."""
    groups = max(1, channels // GROUP_SIZE)
    while channels % groups:
        groups -= 1
    return groups


def group_norm(channels: int, *, groups: int | None = None, eps: float = 1e-5) -> nn.Module:
    """GroupNorm of `groups` groups (None: `default_groups`), affine per channel."""
    return _grouped(channels, default_groups(channels) if groups is None else groups, eps)


def layer_norm(channels: int, *, eps: float = 1e-5) -> nn.Module:
    """GroupNorm of one group: over all channels and positions of a sample."""
    return _grouped(channels, 1, eps)


def instance_norm(channels: int, *, eps: float = 1e-5) -> nn.Module:
    """GroupNorm of a group per channel. A 1x1 map has nothing but its mean: its output is beta, whatever it says."""
    return _grouped(channels, channels, eps)


def proxied_group_norm(
    channels: int,
    *,
    groups: int | None = None,
    eps: float = 1e-5,
    proxy_eps: float = PROXY_EPS,
    activation: nn.Module | None = None,
) -> nn.Module:
    """GroupNorm without affine, then ProxyNorm of `activation`. Without one GroupNorm alone: there PN has no work."""
    return _proxied(channels, default_groups(channels) if groups is None else groups, eps, proxy_eps, activation)


def proxied_layer_norm(
    channels: int, *, eps: float = 1e-5, proxy_eps: float = PROXY_EPS, activation: nn.Module | None = None
) -> nn.Module:
    """`proxied_group_norm` of one group."""
    return _proxied(channels, 1, eps, proxy_eps, activation)


def proxied_instance_norm(
    channels: int, *, eps: float = 1e-5, proxy_eps: float = PROXY_EPS, activation: nn.Module | None = None
) -> nn.Module:
    """`proxied_group_norm` of a group per channel."""
    return _proxied(channels, channels, eps, proxy_eps, activation)


def _grouped(channels: int, groups: int, eps: float, affine: bool = True) -> GroupNorm:
    if not 1 <= groups <= channels or channels % groups:
        raise BnnfreeError(f"groups: got {groups} for {channels} channels, expected a whole number that divides them.")
    return GroupNorm(groups, channels, eps=positive_eps(eps), affine=affine)


def _proxied(channels: int, groups: int, eps: float, proxy_eps: float, activation: nn.Module | None) -> nn.Module:
    norm = _grouped(channels, groups, eps, affine=False)
    if activation is None:
        return norm
    return nn.Sequential(norm, ProxyNorm(channels, activation, positive_eps(proxy_eps, "proxy_eps")))
