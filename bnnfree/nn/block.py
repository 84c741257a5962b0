"""The residual block that every model here is made of. Imports torch, bnnfree.errors and bnnfree.nn only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnnfree.errors import BnnfreeError, pick
from bnnfree.nn.binary import SCALES, BinaryConv2d
from bnnfree.nn.norms import NORMS, Norm, make_norm
from bnnfree.nn.react import RPReLU, RSign
from bnnfree.nn.sign import STE_WINDOWS, STES, Sign
from bnnfree.nn.standard import ScaledStdConv2d
from bnnfree.nn.variance import BETA_MODES

BINARIZE = {
    "none": (False, False),
    "activations": (True, False),
    "weights": (False, True),
    "both": (True, True),
}
SHORTCUTS = ("real", "binary")


@dataclass(frozen=True)
class Design:
    """What all layers of one network share; None where the normaliser decides.

    norm        a name of bnnfree.nn.norms.NORMS
    binarize    "none" | "activations" | "weights" | "both"
    shortcut    weights of the 1x1 shortcut convolutions (their inputs are never signs): "real" | "binary"
    react       learnable thresholds and RPReLU (ReActNet); False: bare sign and identity (Bi-Real, XNOR)
    standardize scaled weight standardisation of all convolutions
    scale       size of the binary weights, a name of bnnfree.nn.SCALES (see BinaryConv2d)
    alpha, beta, ste, ste_window, pad_value, latent_std: see Norm, variance, sign, BinaryConv2d
    """

    norm: str = "free"
    binarize: str = "both"
    shortcut: str = "binary"
    react: bool = True
    standardize: bool | None = None
    scale: str | None = None
    alpha: float | None = None
    beta: str | None = None
    ste: str = "approx"
    ste_window: str | None = None
    pad_value: int = 0
    latent_std: float | None = None

    def __post_init__(self):
        pick(BINARIZE, self.binarize, "binarize")
        pick(dict.fromkeys(SHORTCUTS), self.shortcut, "shortcut")
        pick(BETA_MODES, self.beta_mode, "beta")
        if self.scale is not None:
            pick(dict.fromkeys(SCALES), self.scale, "scale")
        pick(STES, self.ste, "ste")
        pick(dict.fromkeys(STE_WINDOWS), self.window, "ste_window")

    @property
    def rule(self) -> Norm:
        return pick(NORMS, self.norm, "norm")

    @property
    def branch_factor(self) -> float:
        """alpha of every block."""
        return self.rule.alpha if self.alpha is None else self.alpha

    @property
    def beta_mode(self) -> str:
        return self.beta or self.rule.beta

    @property
    def window(self) -> str:
        return self.ste_window or self.rule.window

    @property
    def binary_options(self) -> dict:
        """Options of the binary convolutions."""
        options = self._standardized(self.rule.binary)
        return options if self.scale is None else {**options, "scale": self.scale}

    def _standardized(self, options) -> dict:
        return {**options, **({} if self.standardize is None else {"standardize": self.standardize})}

    def make_norm(self, channels: int) -> nn.Module:
        """The layer after a convolution of `channels` output channels."""
        return make_norm(self.norm, channels)

    def make_sign(self, channels: int) -> nn.Module:
        """The binarisation of a convolution's input: RSign or Sign, or their clipped identity when real.

        Why a clip to [-1, 1]: it is the function whose derivative the sign's estimator stands for.
        """
        if not BINARIZE[self.binarize][0]:
            return Clip(channels if self.react else None)
        return RSign(channels, self.ste, self.window) if self.react else Sign(self.ste, self.window)

    def make_conv(self, cin: int, cout: int, kernel: int, stride: int = 1) -> BinaryConv2d:
        """A binary convolution of signs, padded to keep the size at stride 1."""
        signs, binary = BINARIZE[self.binarize]
        return BinaryConv2d(
            cin,
            cout,
            kernel,
            stride=stride,
            padding=kernel // 2,
            pad_value=self.pad_value,
            binary=binary,
            binary_input=signs,
            latent_std=self.latent_std,
            **self.binary_options,
        )

    def make_shortcut(self, cin: int, cout: int) -> nn.Sequential:
        """The 1x1 convolution (and its normaliser) of a transition's shortcut; its input is real."""
        conv = BinaryConv2d(
            cin,
            cout,
            1,
            binary=BINARIZE[self.binarize][1] and self.shortcut == "binary",
            latent_std=self.latent_std,
            **{**self.binary_options, "bias": False},
        )
        return nn.Sequential(conv, self.make_norm(cout))

    def make_stem(self, channels: int, cout: int, kernel: int, stride: int) -> nn.Sequential:
        """The real convolution on the image, and its normaliser."""
        options = self._standardized(self.rule.real)
        conv = ScaledStdConv2d(channels, cout, kernel, stride=stride, padding=kernel // 2, **options)
        return nn.Sequential(conv, self.make_norm(cout))


class Clip(nn.Module):
    """clip(x + b, -1, 1): the real stand-in of RSign (b [C] learnable from 0) or of Sign (channels None)."""

    def __init__(self, channels: int | None = None):
        super().__init__()
        self.bias = None if channels is None else nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.bias is None else x + self.bias.view(1, -1, 1, 1)
        return x.clamp(-1, 1)


def _note_factors(block: BinaryBlock, _: object = None) -> None:
    """After a checkpoint is loaded: which of its beta and alpha must be multiplied by."""
    block.scaled = block.measured or bool(block.beta != 1)
    block.damped = bool(block.alpha != 1)


class BinaryBlock(nn.Module):
    """A residual block around one or more binary convolutions.

        u   = beta x
        h   = u, then h <- norm(conv(sign(h))) for each convolution of the block (the stride is the first's)
        id  = x                              same shape
              pool(u)                        stride above 1; average over stride x stride
              shortcut_conv(pool(u))         other width
              [x, x] along the channels      duplicate: twice the width without a convolution (ReActNet-A)
        out = act(alpha h + id)              act: RPReLU, or the identity where design.react is False

    alpha and beta are buffers, so a checkpoint determines the network. With beta mode "measured",
    `bnnfree.nn.calibrate` sets beta = 1 / std(x) over all values of the calibration images.

    Shapes: [N, Cin, H, W] -> [N, Cout, ceil(H/stride), ceil(W/stride)].
    Ref: Liu et al. 2020 (ReActNet); Chen et al. 2021 ("BNN - BN = ?"), figure 2; Liu et al. 2018 (Bi-Real).
    """

    alpha: Tensor
    beta: Tensor

    def __init__(
        self,
        cin: int,
        cout: int,
        design: Design,
        *,
        kernel: int = 3,
        stride: int = 1,
        convs: int = 1,
        beta: float = 1.0,
        duplicate: bool = False,
    ):
        super().__init__()
        if duplicate and cout != 2 * cin:
            raise BnnfreeError(f"duplicate: got {cin} -> {cout} channels, expected twice the width.")
        self.stride, self.duplicate = stride, duplicate
        self.measured = design.beta_mode == "measured"
        self.calibrating = False
        self.register_buffer("alpha", torch.tensor(float(design.branch_factor)))
        self.register_buffer("beta", torch.tensor(float(beta)))
        self.scaled = self.measured or beta != 1
        self.damped = design.branch_factor != 1
        self.register_load_state_dict_post_hook(_note_factors)
        branch: list[nn.Module] = []
        for i in range(convs):
            width = cin if i == 0 else cout
            conv = design.make_conv(width, cout, kernel, stride if i == 0 else 1)
            # the next sign reads this output alone: a sum that is 0 must not be rounded to either side of it
            conv.exact = i + 1 < convs and conv.binary and conv.binary_input
            branch += [design.make_sign(width), conv, design.make_norm(cout)]
        self.branch = nn.Sequential(*branch)
        self.shortcut = design.make_shortcut(cin, cout) if cin != cout and not duplicate else None
        biased = bool(design.binary_options.get("bias"))
        self.act = RPReLU(cout, input_shift=not biased) if design.react else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.calibrating and self.measured:
            self.beta.copy_(1 / x.detach().std(correction=0).clamp_min(1e-5))
        u = x * self.beta if self.scaled else x
        h = self.branch(u)
        if self.damped:
            h = h * self.alpha
        return self.act(h + self._identity(x, u))

    def _identity(self, x: Tensor, u: Tensor) -> Tensor:
        transition = self.stride > 1 or self.shortcut is not None
        y = u if transition else x
        if self.stride > 1:
            y = F.avg_pool2d(y, self.stride, ceil_mode=True, count_include_pad=False)
        if self.shortcut is not None:
            return self.shortcut(y)
        return torch.cat([y, y], dim=1) if self.duplicate else y
