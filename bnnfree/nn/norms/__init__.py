"""Normalisers: the layers in place of batch normalisation. Imports torch, bnnfree.errors, normalisers and bnnfree.nn.

A normaliser is a row of facts in bnnfree.normalisers.NORMS, and here the builder of its layer.

    file         norms
    batch        bn, brn
    group        gn, ln, in; ln_pn, gn_pn, in_pn with
    proxy        ... proxy normalisation (gaussian: its closed forms)
    response     frn
    independent  ic, ic_gn, ic_frn
    kalman       kn

To add one: a builder (channels, *, options with types and defaults) -> module in one of these files or a new one, its
line in LAYERS, and a row of NORMS that says what it is. Models, recipes and tests pick it up from there; its options
are keys of model.norm_options.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from bnnfree.errors import BnnfreeError, pick
from bnnfree.nn.norms import batch, group, independent, kalman, response
from bnnfree.nn.norms.batch import BatchRenorm2d, GhostBatchNorm2d
from bnnfree.nn.norms.gaussian import gaussian_moments
from bnnfree.nn.norms.group import GroupNorm
from bnnfree.nn.norms.independent import make_dropout
from bnnfree.nn.norms.kalman import Belief, KalmanNorm2d, first_belief, run_believing
from bnnfree.nn.norms.proxy import ProxyNorm
from bnnfree.nn.norms.response import FilterResponseNorm, ThresholdedLinear
from bnnfree.normalisers import NORMS, Norm, check_options


def _nothing(channels: int) -> nn.Module:
    return nn.Identity()


LAYERS: dict[str, Callable[..., nn.Module]] = {
    "none": _nothing,
    "bn": batch.batch_norm,
    "free": _nothing,
    "free_paper": _nothing,
    "ab": _nothing,
    "brn": batch.batch_renorm,
    "gn": group.group_norm,
    "ln": group.layer_norm,
    "in": group.instance_norm,
    "frn": response.filter_response,
    "ic": independent.independent,
    "ic_gn": independent.independent_group,
    "ic_frn": independent.independent_response,
    "kn": kalman.kalman_norm,
    "ln_pn": group.proxied_layer_norm,
    "gn_pn": group.proxied_group_norm,
    "in_pn": group.proxied_instance_norm,
}
"""Each: channels, **options -> the module that stands after each convolution, or (Norm.before) before each sign."""

RELUS: dict[str, Callable[..., nn.Module]] = {"frn": ThresholdedLinear}
"""Each: channels, tau -> what has the place of ReLU in networks of real weights."""


def make_norm(name: str, channels: int, activation: nn.Module | None = None, /, **options) -> nn.Module:
    """The layer of the normaliser `name` for a map of `channels` channels.

    It stands after a convolution, or (Norm.before) before a sign. `none`, `free` and `free_paper` leave nothing
    there: they live in the convolutions. `activation` is for those that take it in (Norm.proxy). `options` are
    keyword arguments of the builder. Shapes: [N, C, H, W] -> the same.
    Errors: an unknown name or option lists the known ones; BnnfreeError for a value out of range.
    """
    builder = pick(LAYERS, name, "norm")
    check_options(name, options)
    if activation is not None:
        if not NORMS[name].proxy:
            raise BnnfreeError(f"make_norm: got an activation for {name!r}, expected none: put it after the layer.")
        options["activation"] = activation
    try:
        return builder(channels, **options)
    except BnnfreeError as error:
        raise BnnfreeError(f"norm_options.{error}") from None


__all__ = [
    "LAYERS",
    "NORMS",
    "RELUS",
    "BatchRenorm2d",
    "Belief",
    "FilterResponseNorm",
    "GhostBatchNorm2d",
    "GroupNorm",
    "KalmanNorm2d",
    "Norm",
    "ProxyNorm",
    "ThresholdedLinear",
    "first_belief",
    "gaussian_moments",
    "make_dropout",
    "make_norm",
    "run_believing",
]
