"""The residual block that every model here is made of. Imports torch, bnnfree.errors and bnnfree.nn only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnnfree.errors import BnnfreeError
from bnnfree.names import BINARIZE
from bnnfree.nn.binary import BinaryConv2d
from bnnfree.nn.norms import RELUS, Belief, make_dropout, make_norm, run_believing
from bnnfree.nn.react import PowerRPReLU, RPReLU, RSign
from bnnfree.nn.sign import Sign, per_channel
from bnnfree.nn.standard import CentredLinear, ConvLayer, ScaledStdConv2d
from bnnfree.normalisers import NORMS, Norm, check_design, complete

OWN: Any = None  # default of what is the normaliser's own, and has its value once a Design is made


@dataclass(frozen=True)
class Design:
    """Design shared by all layers of one network. What is None when it is made becomes the normaliser's own value.

    norm        a name of bnnfree.normalisers.NORMS; norm_options: keyword arguments of its builder
    binarize    "none" | "activations" | "weights" | "both"
    shortcut    weights of the 1x1 shortcut convolutions (their inputs are never signs): "real" | "binary"
    react       learnable thresholds and RPReLU (ReActNet); False: bare sign and identity (Bi-Real, XNOR)
    activation  place of a block's activation: "trunk", after the residual sum | "branch", before it (proxy
                normalisers: always there)
    real        real convolutions and ReLU in place of all that is binary, whatever binarize and react say
    standardize scaled weight standardisation of all convolutions
    centre      taking out the expected mean: of binary convolutions by their inputs' running mean, of real ones by
                their outputs' at calibration (WeightLayer, centre "input" and "output")
    centre_gradient  taking the mean of a group's other samples out of the gradient of a centred layer's inputs; "head":
                of the classifier's alone
    centre_head  taking the running mean out of the classifier's inputs
    scale       size of the binary weights, a name of bnnfree.nn.SCALES (see BinaryConv2d)
    alpha, beta, ste, ste_window, pad_value, latent_std: see Norm, variance, sign, BinaryConv2d
    """

    norm: str = "free"
    norm_options: Mapping[str, Any] = field(default_factory=dict)
    binarize: str = "both"
    shortcut: str = "binary"
    react: bool = True
    real: bool = False
    activation: str = OWN
    standardize: bool = OWN
    centre: bool = OWN
    centre_gradient: bool | str = OWN
    centre_head: bool = OWN
    scale: str = OWN
    alpha: float = OWN
    beta: str = OWN
    ste: str = OWN
    ste_window: str = OWN
    pad_value: int = 0
    latent_std: float | None = None

    def __post_init__(self):
        for key, value in complete(self.norm, vars(self)).items():
            object.__setattr__(self, key, value)
        check_design(vars(self))

    @property
    def rule(self) -> Norm:
        return NORMS[self.norm]

    def _options(self, centre: str) -> dict[str, Any]:
        """Options of all convolutions; `centre` is the kind of centring that such ones have, where they have it."""
        rule = self.rule
        return {
            "standardize": self.standardize,
            "gain": rule.gain,
            "bias": rule.bias,
            "centre": centre if self.centre else None,
            "unit_output": rule.unit_output,
        }

    @property
    def binary_options(self) -> dict[str, Any]:
        """Options of the binary convolutions."""
        return {**self._options("input"), "scale": self.scale, "centre_gradient": self.centre_gradient is True}

    @property
    def real_options(self) -> dict[str, Any]:
        """Options of the real convolutions."""
        return self._options("output")

    def make_norm(
        self, channels: int, activation: nn.Module | None = None, before_sign: bool = False
    ) -> list[nn.Module]:
        """The normaliser of a map of `channels` channels and what follows it: `activation`, unless it takes that in.

        FRN's threshold is left out before a sign, which it cannot change from below 0, and in real networks,
        where `make_activation` makes it.
        """
        options = dict(self.norm_options)
        if self.rule.proxy:
            return [make_norm(self.norm, channels, activation, **options)]
        if self.norm in RELUS and (self.real or before_sign):
            options["tlu"] = False
        return [make_norm(self.norm, channels, None, **options), *([] if activation is None else [activation])]

    def make_activation(self, channels: int) -> nn.Module | None:
        """The activation of real values: ReLU's kind in real networks, RPReLU with react, else None.

        RPReLU goes without the shift that a bias before it makes superfluous; in a proxy normalisation without
        both, because beta is the one and the other cancels.
        """
        if self.real:
            if self.norm not in RELUS or not self.norm_options.get("tlu", True):
                return nn.ReLU()
            return RELUS[self.norm](channels, **{k: v for k, v in self.norm_options.items() if k == "tau"})
        if not self.react:
            return None
        if self.rule.proxy:
            return nn.PReLU(channels)
        kind = PowerRPReLU if self.rule.power_slopes else RPReLU
        return kind(channels, input_shift=not self.rule.bias)

    def make_tail(self, channels: int) -> nn.Module | None:
        """Normaliser between the last block and the head's pool, where blocks have theirs before signs; else None."""
        return make_norm(self.norm, channels, None, **self.norm_options) if self.rule.before else None

    def make_unit(self, cin: int, cout: int, kernel: int, stride: int, last: bool) -> list[nn.Module]:
        """One convolution of a block's branch with its sign, normaliser, dropout and activation, in their order."""
        rule = self.rule
        before = self.make_norm(cin) if rule.before else []
        if not self.real:
            before.append(self.make_sign(cin))
        if rule.before and (dropout := make_dropout(**{k: v for k, v in self.norm_options.items() if k == "drop"})):
            before.append(dropout)
        conv = self.make_conv(cin, cout, kernel, stride)
        # between convolutions of a branch a sign is the activation
        inside = self.activation == "branch" if last else self.real
        act = self.make_activation(cout) if inside else None
        after = ([] if act is None else [act]) if rule.before else self.make_norm(cout, act, before_sign=not last)
        return [*before, conv, *after]

    def make_sign(self, channels: int) -> nn.Module:
        """The binarisation of a convolution's input: RSign or Sign, or their clipped identity when real.

        Why a clip to [-1, 1]: it is the function whose derivative the sign's estimator stands for.
        """
        if not BINARIZE[self.binarize][0]:
            return Clip(channels if self.react else None)
        return RSign(channels, self.ste, self.ste_window) if self.react else Sign(self.ste, self.ste_window)

    def make_conv(self, cin: int, cout: int, kernel: int, stride: int = 1) -> ConvLayer:
        """A binary convolution of signs, or a real one of real values, padded to keep the size at stride 1."""
        signs, binary = BINARIZE[self.binarize]
        place = {"stride": stride, "padding": kernel // 2, "pad_value": self.pad_value}
        return self._conv(cin, cout, kernel, binary=binary, binary_input=signs, **place)

    def _conv(self, cin: int, cout: int, kernel: int, *, binary: bool, binary_input: bool, **options) -> ConvLayer:
        """A convolution with the normaliser's options and these; in real designs a real one, whatever is binary."""
        if self.real:
            return ScaledStdConv2d(cin, cout, kernel, **{**self.real_options, **options})
        options |= {"binary": binary, "binary_input": binary_input, "latent_std": self.latent_std}
        return BinaryConv2d(cin, cout, kernel, **{**self.binary_options, **options})

    def make_shortcut(self, cin: int, cout: int) -> nn.Sequential:
        """The 1x1 convolution (and its normaliser) of a transition's shortcut; its input is real."""
        binary = BINARIZE[self.binarize][1] and self.shortcut == "binary"
        conv = self._conv(cin, cout, 1, binary=binary, binary_input=False, bias=False)
        return nn.Sequential(conv, *([] if self.rule.before else self.make_norm(cout)))

    def make_stem(self, channels: int, cout: int, kernel: int, stride: int) -> nn.Sequential:
        """The real convolution on the image, its normaliser, and the activation of real networks."""
        conv = ScaledStdConv2d(channels, cout, kernel, stride=stride, padding=kernel // 2, **self.real_options)
        act = self.make_activation(cout) if self.real else None
        if self.rule.before:
            return nn.Sequential(conv, *([] if act is None else [act]))
        return nn.Sequential(conv, *self.make_norm(cout, act))

    def make_head(self, channels: int, classes: int) -> nn.Module:
        """The real linear layer that gives the logits."""
        if self.centre_head:
            return CentredLinear(channels, classes, centre_gradient=bool(self.centre_gradient))
        return nn.Linear(channels, classes)


class Clip(nn.Module):
    """clip(x + b, -1, 1): the real stand-in of RSign (b [C] learnable from 0) or of Sign (channels None)."""

    def __init__(self, channels: int | None = None):
        super().__init__()
        self.bias = None if channels is None else nn.Parameter(torch.zeros(channels))

    def compared(self, x: Tensor) -> Tensor:
        """t: what RSign would compare with 0."""
        return x if self.bias is None else x + per_channel(self.bias, x)

    def forward(self, x: Tensor) -> Tensor:
        return self.compared(x).clamp(-1, 1)


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
              shortcut_conv(pool(u))         other width (both of x for a normaliser without scaled_shortcut)
              [x, x] along the channels      duplicate: twice the width without a convolution (ReActNet-A)
        out = act(alpha h + id)              act: RPReLU, or the identity where design.react is False
              alpha act(h) + id              design.activation "branch", and normalisers that take the activation in
                                             (ln_pn, gn_pn, in_pn)

    A normaliser may stand before the sign instead (ic; bnnfree.nn.norms.Norm). In a real design no sign stands before
    a convolution, and ReLU is what follows norms and sum: the block of an ordinary ResNet.

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
        self.measured = design.beta == "measured"
        self.calibrating = False
        self.register_buffer("alpha", torch.tensor(float(design.alpha)))
        self.register_buffer("beta", torch.tensor(float(beta)))
        self.scaled = self.measured or beta != 1
        self.scales_shortcut = design.rule.scaled_shortcut
        self.damped = design.alpha != 1
        self.register_load_state_dict_post_hook(_note_factors)
        branch: list[nn.Module] = []
        for i in range(convs):
            width, step = (cin, stride) if i == 0 else (cout, 1)
            branch += design.make_unit(width, cout, kernel, step, last=i + 1 == convs)
        self.branch = nn.Sequential(*branch)
        self.shortcut = design.make_shortcut(cin, cout) if cin != cout and not duplicate else None
        act = None if design.activation == "branch" else design.make_activation(cout)
        self.act = nn.Identity() if act is None else act

    def forward(self, x: Tensor, belief: Belief | None = None) -> Tensor | tuple[Tensor, Belief]:
        """out; given a belief about x (norm kn, in training): out and the belief about it."""
        if self.calibrating and self.measured:
            self.beta.copy_(1 / x.detach().std(correction=0).clamp_min(1e-5))
        u = x * self.beta if self.scaled else x
        if belief is not None:
            return self._believing(x, u, belief)
        return self._join(self.branch(u), self._identity(x, u))

    def _join(self, h: Tensor, identity: Tensor) -> Tensor:
        return self.act((h * self.alpha if self.damped else h) + identity)

    def _identity(self, x: Tensor, u: Tensor) -> Tensor:
        scaled = self.scales_shortcut and (self.stride > 1 or self.shortcut is not None)
        return self.widened(self._pooled(u if scaled else x))

    def widened(self, y: Tensor) -> Tensor:
        """The shortcut of the pooled map y."""
        if self.shortcut is not None:
            return self.shortcut(y)
        return torch.cat([y, y], dim=1) if self.duplicate else y

    def _pooled(self, y: Tensor) -> Tensor:
        if self.stride == 1:
            return y
        return F.avg_pool2d(y, self.stride, ceil_mode=True, count_include_pad=False)

    def _believing(self, x: Tensor, u: Tensor, belief: Belief) -> tuple[Tensor, Belief]:
        """The same, with the belief led through branch and shortcut; see bnnfree.nn.norms.kalman."""
        scale = self.beta if self.scaled else 1.0
        ghost = belief.sample(x) * scale
        h, (mean, var) = run_believing(self.branch, u, ghost)
        if self.shortcut is not None:
            identity, (side_mean, side_var) = run_believing(self.shortcut, self._pooled(u), self._pooled(ghost))
        else:
            identity, (side_mean, side_var) = self._identity(x, u), belief.moments()
            if self.stride > 1:
                side_mean, side_var = side_mean * scale, side_var * scale**2
            if self.duplicate:
                side_mean, side_var = torch.cat([side_mean] * 2), torch.cat([side_var] * 2)
        mean, var = self.alpha * mean + side_mean, self.alpha.square() * var + side_var
        return self._join(h, identity), Belief(mean, var, self.act)
