"""Normalisers: the layers in place of batch normalisation. Imports torch, bnnfree.errors and bnnfree.nn only.

A normaliser is a `Norm`: the layer, where it stands, and how the convolutions and blocks around it are made.

    file         norms
    batch        bn, brn
    group        gn, ln, in; ln_pn, gn_pn, in_pn with
    proxy        ... proxy normalisation (gaussian: its closed forms)
    response     frn
    independent  ic, ic_gn, ic_frn
    kalman       kn

To add one: a builder (channels, *, options with types and defaults) -> module in one of these files or a new one, and
a `Norm` in NORMS. Models, recipes and tests pick it up from there; its options are keys of model.norm_options.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnnfree.errors import BnnfreeError, pick
from bnnfree.nn.norms import batch, group, independent, kalman, response
from bnnfree.nn.norms.batch import BatchRenorm2d, GhostBatchNorm2d
from bnnfree.nn.norms.gaussian import gaussian_moments
from bnnfree.nn.norms.group import GroupNorm
from bnnfree.nn.norms.independent import make_dropout
from bnnfree.nn.norms.kalman import Belief, KalmanNorm2d, first_belief, run_believing
from bnnfree.nn.norms.options import check_options, options_of
from bnnfree.nn.norms.proxy import ProxyNorm
from bnnfree.nn.norms.response import FilterResponseNorm, ThresholdedLinear

Options = MappingProxyType


def _options(**values) -> Options:
    return MappingProxyType(values)


def _nothing(channels: int) -> nn.Module:
    return nn.Identity()


@dataclass(frozen=True)
class Norm:
    """A normaliser: its layer, its place, and the options of the layers around it.

    binary   options of its binary convolutions (BinaryConv2d)
    real     options of its real convolutions (ScaledStdConv2d)
    alpha    factor of a block's branch, beta its mode of expected variance (bnnfree.nn.variance)
    window   the window of the activations' straight-through estimator (bnnfree.nn.sign)
    layer    channels, **options -> the module after each convolution
    centre_head  the classifier's inputs are centred (CentredLinear), for no layer after it would take a mean out
    agc      the clip factor of adaptive gradient clipping that belongs to the method (None: no clipping)
    before   the layer stands before each sign instead, with dropout after the sign (independent); the stem has
             none, and one stands before the head's pool
    proxy    the layer takes the activation in (option `activation`): a block then has it at the end of its
             branch, and nothing after the residual sum
    ste      the straight-through estimator of the activations that belongs to the method
    power_slopes     the slopes of RPReLU are powers of two
    scaled_shortcut  beta multiplies the shortcuts of transitions too, not the branch alone
    relu     channels, tau -> what has the place of ReLU in networks of real weights (None: ReLU)
    """

    summary: str
    binary: Options
    real: Options
    alpha: float = 1.0
    beta: str = "none"
    window: str = "fixed"
    layer: Callable[..., nn.Module] = _nothing
    centre_head: bool = False
    agc: float | None = None
    before: bool = False
    proxy: bool = False
    ste: str = "approx"
    power_slopes: bool = False
    scaled_shortcut: bool = True
    relu: Callable[..., nn.Module] | None = None


def _twin(summary: str, layer: Callable[..., nn.Module], **places) -> Norm:
    """A normaliser that is a layer, with all that `free` has beside it: standardised weights, per-sample window."""
    binary = _options(standardize=True, gain=False, scale="fan_in")
    return Norm(summary, binary, _options(standardize=True, gain=False), window="sample", layer=layer, **places)


NORMS: dict[str, Norm] = {
    "none": Norm(
        "nothing: mean-abs weight scale, centred latents of unit output variance, alpha 1",
        binary=_options(standardize=False, gain=False, scale="mean_abs"),
        real=_options(standardize=False, gain=False),
    ),
    "bn": _twin(
        "batch normalisation after every convolution, with all that `free` has beside it "
        "(standardised weights, per-sample window): the strongest BN twin measured",
        batch.batch_norm,
    ),
    "free": Norm(
        "centred binary convolutions with a constant scale: the bits' running mean is taken out through the weights, "
        "the others' mean out of the bits' gradient; the output's deviation is a constant of calibration passes, which "
        "gains make up for",
        binary=_options(
            standardize=True,
            gain=True,
            bias=True,
            scale="fan_in",
            centre="input",
            centre_gradient=True,
            unit_output=True,
        ),  # fmt: skip
        real=_options(standardize=True, gain=True, bias=True, centre="output", unit_output=True),
        window="sample",
        centre_head=True,
    ),
    "free_paper": Norm(
        "the published BN-free block: scaled weight standardisation, alpha 0.2, analytic beta, AGC",
        binary=_options(standardize=True, gain=True, scale="mean_abs"),
        real=_options(standardize=True, gain=True),
        alpha=0.2,
        beta="nf",
        agc=0.02,
    ),
    "ab": Norm(
        "the BN-free block of A&B BNN: as free_paper, with slopes that are powers of two, the sigmoid estimator, alpha "
        "0.25, and beta before signs alone (its mask layer), where inference folds it away",
        binary=_options(standardize=True, gain=True, scale="mean_abs"),
        real=_options(standardize=True, gain=True),
        alpha=0.25,
        beta="ref",
        agc=0.02,
        ste="sigmoid",
        power_slopes=True,
        scaled_shortcut=False,
    ),
    "brn": _twin("batch renormalisation: clipped corrections towards the running statistics", batch.batch_renorm),
    "gn": _twin("group normalisation, groups of 16 channels", group.group_norm),
    "ln": _twin("layer normalisation: over channels and positions of a sample", group.layer_norm),
    "in": _twin(
        "instance normalisation: over the positions of each channel of a sample; without an activation on the trunk "
        "(Bi-Real, XNOR) the pooled features are constants, and 1x1 maps are constants everywhere",
        group.instance_norm,
    ),
    "frn": _twin(
        "filter response normalisation and thresholded linear units, eps learned",
        response.filter_response,
        relu=ThresholdedLinear,
    ),
    "ic": _twin(
        "independent components: batch norm before each sign, dropout after it", independent.independent, before=True
    ),
    "ic_gn": _twin("ic with group normalisation (ours)", independent.independent_group, before=True),
    "ic_frn": _twin("ic with filter response normalisation (ours)", independent.independent_response, before=True),
    "kn": _twin("batch Kalman: batch statistics fused with a prior from the layers before", kalman.kalman_norm),
    "ln_pn": _twin(
        "layer normalisation, then proxy normalisation of the activation; without one (Bi-Real, XNOR) nothing follows",
        group.proxied_layer_norm,
        proxy=True,
    ),
    "gn_pn": _twin(
        "group normalisation, then proxy normalisation of the activation; without one (Bi-Real, XNOR) nothing follows",
        group.proxied_group_norm,
        proxy=True,
    ),
    "in_pn": _twin(
        "instance normalisation, then proxy normalisation of the activation; constants where `in` gives them",
        group.proxied_instance_norm,
        proxy=True,
    ),
}


def make_norm(name: str, channels: int, activation: nn.Module | None = None, /, **options) -> nn.Module:
    """The layer of the normaliser `name` for a map of `channels` channels.

    It stands after a convolution, or (Norm.before) before a sign. `none`, `free` and `free_paper` leave nothing
    there: they live in the convolutions. `activation` is for those that take it in (Norm.proxy). `options` are
    keyword arguments of the builder. Shapes: [N, C, H, W] -> the same.
    Errors: an unknown name or option lists the known ones; BnnfreeError for a value out of range.
    """
    rule = pick(NORMS, name, "norm")
    check_options(rule.layer, options, "norm_options")
    if activation is not None:
        if not rule.proxy:
            raise BnnfreeError(f"make_norm: got an activation for {name!r}, expected none: put it after the layer.")
        options["activation"] = activation
    try:
        return rule.layer(channels, **options)
    except BnnfreeError as error:
        raise BnnfreeError(f"norm_options.{error}") from None


def check_norm(name: str, options: Mapping[str, Any]) -> None:
    """Does the normaliser `name` take these options, for some number of channels? Errors: as `make_norm`."""
    groups = options.get("groups")
    channels = groups if type(groups) is int and 0 < groups < 2**31 else 16  # a number that the groups divide
    with torch.device("meta"):
        make_norm(name, channels, None, **options)


def of_batch(name: str) -> bool:
    """Has the normaliser `name` statistics of a batch, so that in training a sample's output depends on the others?"""
    with torch.device("meta"):
        return any(isinstance(module, _BatchNorm) for module in make_norm(name, 16).modules())


__all__ = [
    "NORMS",
    "BatchRenorm2d",
    "Belief",
    "FilterResponseNorm",
    "GhostBatchNorm2d",
    "GroupNorm",
    "KalmanNorm2d",
    "Norm",
    "ProxyNorm",
    "ThresholdedLinear",
    "check_norm",
    "first_belief",
    "gaussian_moments",
    "make_dropout",
    "make_norm",
    "of_batch",
    "options_of",
    "run_believing",
]
