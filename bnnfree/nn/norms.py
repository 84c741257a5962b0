"""What a network has in place of batch normalisation. Imports torch, bnnfree.errors and bnnfree.nn only.

A normaliser is a `Norm`: the layer after each convolution, and how the convolutions and blocks around it
are made. To add one: a `Norm` in NORMS (and its layer's class, in this file or one of its own); models,
recipes and tests pick it up from there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import nn

from bnnfree.errors import pick

Options = MappingProxyType


def _options(**values) -> Options:
    return MappingProxyType(values)


@dataclass(frozen=True)
class Norm:
    """How a network is normalised.

    binary   options of its binary convolutions (BinaryConv2d)
    real     options of its real convolutions (ScaledStdConv2d)
    alpha    factor of a block's branch, beta its mode of expected variance (bnnfree.nn.variance)
    window   the window of the activations' straight-through estimator (bnnfree.nn.sign)
    layer    channels, **options -> the module after each convolution
    agc      the clip factor of adaptive gradient clipping that belongs to the method (None: no clipping)
    """

    summary: str
    binary: Options
    real: Options
    alpha: float = 1.0
    beta: str = "none"
    window: str = "fixed"
    layer: Callable[..., nn.Module] = field(default=lambda channels, **options: nn.Identity())
    agc: float | None = None


_PLAIN = _options(standardize=False, gain=False)

NORMS: dict[str, Norm] = {
    "none": Norm(
        "nothing: mean-abs weight scale, centred latents of unit output variance, alpha 1",
        binary=_options(standardize=False, gain=False, scale="mean_abs"),
        real=_PLAIN,
    ),
    "bn": Norm(
        "batch normalisation after every convolution, with all that `free` has beside it "
        "(standardised weights, per-sample window): the strongest BN twin measured",
        binary=_options(standardize=True, gain=False, scale="fan_in"),
        real=_options(standardize=True, gain=False),
        window="sample",
        layer=nn.BatchNorm2d,
    ),
    "free": Norm(
        "centred binary convolutions with a constant scale: the bits' running mean is taken out through the "
        "weights, the output's deviation is a constant of one calibration pass",
        binary=_options(standardize=True, gain=True, bias=True, scale="fan_in", centre="input", unit_output=True),
        real=_options(standardize=True, gain=True, bias=True, centre="output", unit_output=True),
        window="sample",
    ),
    "free_paper": Norm(
        "the published BN-free block: scaled weight standardisation, alpha 0.2, analytic beta, AGC",
        binary=_options(standardize=True, gain=True, scale="mean_abs"),
        real=_options(standardize=True, gain=True),
        alpha=0.2,
        beta="nf",
        agc=0.02,
    ),
}


def make_norm(name: str, channels: int, **options) -> nn.Module:
    """The layer that the normaliser `name` puts after a convolution of `channels` output channels.

    `none`, `free` and `free_paper` leave nothing there: they live in the convolutions. Shapes: [N, C, H, W]
    -> the same. Errors: an unknown name lists the known ones.
    """
    return pick(NORMS, name, "norm").layer(channels, **options)
