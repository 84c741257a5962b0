"""Layers with 1-bit weights. Imports torch, bnnfree.errors and bnnfree.nn only.

    What = standardize_weight(W) or W                      W: the latent weight that is trained
    W_b  = scale_o sign(What)                              forward; sign(0) = +1
    dL/dWhat = dL/dW_b                                     backward: identity estimator (times -1 where a
                                                           learned scale is negative: downhill)

The scale of output channel o is one of SCALES. What follows (gain, bias, centring, unit output) is
`bnnfree.nn.standard.WeightLayer`; with binary=False the same layer runs on What itself, so that a stage
with real weights and one with binary weights hold the same parameters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bnnfree.errors import BnnfreeError, pick
from bnnfree.names import SCALES
from bnnfree.nn.sign import sign_of_weight
from bnnfree.nn.standard import ConvLayer, LinearLayer, WeightLayer


class _BinaryWeight(WeightLayer):
    """Base of the binary convolution and linear layer: start of the latents, their sign and scale."""

    scale: nn.Parameter | None
    binary: bool
    binary_input: bool | None

    def _init_binary(self, scale: str, binary: bool, binary_input: bool | None, latent_std: float | None) -> None:
        pick(dict.fromkeys(SCALES), scale, "scale")
        self.scale_rule, self.binary, self.binary_input = scale, binary, binary_input
        # Why: a sum of signs that is 0 must be +1 for a sign that reads it; scaled ones are rounded to either side of 0
        self.exact = binary and binary_input is not False
        # without standardisation the latents' own size is the scale: start at mean|W| = 1/sqrt(fan_in)
        unit = math.sqrt(math.pi / 2 / self.fan_in)
        std = latent_std if latent_std is not None and self.standardize else unit
        if std <= 0:
            raise BnnfreeError(f"latent_std: got {std}, expected a number above 0.")
        nn.init.normal_(self.weight, std=std)
        learned = torch.full((self.weight.shape[0],), 1 / math.sqrt(self.fan_in))
        self.scale = nn.Parameter(learned) if scale == "learned" else None

    def _mean_abs(self, latent: Tensor) -> Tensor:
        return latent.detach().abs().flatten(1).mean(1)

    def unit_weight(self) -> tuple[Tensor, Tensor | None]:
        """(sign(What), scale [O]) when binary; (What, its scale) when real, of the same mean size."""
        latent = self.standardized()
        if not self.binary:
            if self.scale is None:
                return latent, None
            return latent, self.scale / self._mean_abs(latent).clamp_min(1e-12)
        scale = self._mean_abs(latent) if self.scale_rule == "mean_abs" else self.known_scale()
        if scale is None:
            return sign_of_weight(latent, latent.new_ones(())), None
        undo = scale.detach().abs().clamp_min(1e-12)
        return sign_of_weight(latent, undo.view(-1, *[1] * (latent.dim() - 1))), scale

    def known_scale(self) -> Tensor | None:
        """The scale [O] of binary weights, as far as it does not come from them (mean_abs); None: 1."""
        if self.scale is not None:
            return self.scale
        if self.scale_rule == "fan_in" and self.binary:
            return self.weight.new_full((self.weight.shape[0],), 1 / math.sqrt(self.fan_in))
        return None

    def low_precision(self) -> bool:
        """Autocast may run +-1 times +-1 in its dtype: sums up to 256 (512 when even) are exact in bfloat16.

        The layer cannot see whether its input is signs; who builds it says so by `binary_input`. Real weights
        (binary=False) on signs are rounded to the dtype, as autocast does everywhere.
        """
        return bool(self.binary_input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, binary={self.binary}, scale={self.scale_rule}"


class BinaryConv2d(_BinaryWeight, ConvLayer):
    """A two-dimensional convolution with 1-bit weights (the input is whatever it is given, usually signs).

    forward   y_o = g_o (scale_o sign(What_o) * x - c_o) / sd_o + b_o
    backward  dL/dWhat = dL/d(scale sign(What)): the identity estimator, then through the standardisation

    scale: "fan_in" 1/sqrt(fan_in) | "mean_abs" mean|What_o|, no gradient | "learned" | "none" 1.
    Further options: stride=1, padding=0, dilation=1, groups=1, pad_value=0 (what padding carries: 0, +1 or -1), and
    standardize=True, gain=True, bias=False, centre=None, centre_gradient=False, unit_output=False as in WeightLayer.
    binary=False keeps What instead of its sign. latent_std: deviation of the initial latents, for
    standardised ones (None, and without standardisation: the value at which the output has unit variance).
    binary_input: the input is signs, so autocast may use its exact low-precision product; False: it is not; None: it
    may be, so that sums of signs are exact in float32.

    Shapes: [N, I, H, W] -> [N, O, H', W']; weight [O, I/groups, kh, kw].
    Ref: Rastegari et al. 2016 (XNOR-Net, mean_abs); Chen et al. 2021 ("BNN - BN = ?", standardisation).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        scale: str = "fan_in",
        binary: bool = True,
        binary_input: bool | None = None,
        latent_std: float | None = None,
        **options,
    ):
        super().__init__(in_channels, out_channels, kernel_size, **options)
        self._init_binary(scale, binary, binary_input, latent_std)


class BinaryLinear(_BinaryWeight, LinearLayer):
    """A linear layer with 1-bit weights; formulas and options as BinaryConv2d. Shapes: [N, I] -> [N, O]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        scale: str = "fan_in",
        binary: bool = True,
        binary_input: bool | None = None,
        latent_std: float | None = None,
        **options,
    ):
        super().__init__(in_features, out_features, **options)
        self._init_binary(scale, binary, binary_input, latent_std)
