"""Scaled weight standardisation, and convolutions made of it. Imports torch, bnnfree.errors, bnnfree.nn.

`WeightLayer` is what binary and real layers share: a weight that may be standardised, a gain, a bias,
the centring of the layer's input or output, and the constant that gives its output unit deviation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnnfree.errors import BnnfreeError, pick
from bnnfree.nn.centring import GradientCentre

EPS = 1e-5
CENTRES = ("input", "output")

# (weight, factor [O], bias [O], is the factor to stay apart) -> the same values, whose gradients it changes
Preconditioner = Callable[[Tensor, Tensor | None, Tensor | None, bool], tuple[Tensor, Tensor | None, Tensor | None]]


def standardize_weight(weight: Tensor, eps: float = EPS) -> Tensor:
    """Standardised weight (W - mean_o W) / ((std_o W + eps) sqrt(fan_in)), gradient through mean and std.

    Every output channel o gets mean 0 and (biased) deviation 1/sqrt(fan_in), so that inputs of unit
    second moment give outputs of unit variance. Shapes: [O, ...] -> [O, ...], fan_in = values per row.
    Ref: Qiao et al. 2019 (weight standardisation); Brock et al. 2021, eq. 1; Chen et al. 2021 (BNN - BN).
    """
    rows = weight.flatten(1)
    std, mean = torch.std_mean(rows, dim=1, correction=0, keepdim=True)
    return ((rows - mean) / ((std + eps) * math.sqrt(rows.shape[1]))).view_as(weight)


def tap_coverage(size: int, kernel: int, stride: int, padding: int, dilation: int) -> list[float]:
    """Share of output positions at which each of the `kernel` taps lies inside `size`, not on padding."""
    positions = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    starts = range(-padding, -padding + positions * stride, stride)
    return [sum(0 <= s + k * dilation < size for s in starts) / positions for k in range(kernel)]


class WeightLayer(nn.Module):
    """A linear map y_o = g_o (W_o * x - c_o) / sd_o + b_o whose parts are options; base of all our layers.

    W_o   `unit_weight()` times its scale: what the subclass makes of the latent `weight`
    c_o   centre "input": sum_i W_oi mu_i, mu the running mean of the inputs (buffer `input_mean`), taps on
          padding counted at the padding value; the gradient flows to W and not to mu.
          centre "output": a constant, the mean of channel o over the calibration images.
    sd_o  unit_output: a constant, the deviation of channel o over the calibration images; else 1
    g, b  learnable per channel, init 1 and 0, where `gain` and `bias` are set

    All of it folds into one weight and one bias per output channel: nothing remains at inference.
    centre_gradient: the gradient with respect to the inputs of a layer with centre "input" is centred too, in
    training, over groups of samples; see `bnnfree.nn.centring`.
    mu follows the inputs only when `update_input_means` is called after an optimiser step (see
    `bnnfree.nn.calibrate`), so micro-batches and processes see one and the same mu within a step.
    `preconditioner` stands between the effective weight and the map in training (`bnnfree.optim.Precondition`).
    """

    input_mean: Tensor
    input_sum: Tensor
    input_count: Tensor
    output_mean: Tensor
    output_std: Tensor

    def __init__(
        self,
        weight: Tensor,
        in_channels: int,
        *,
        standardize: bool = True,
        gain: bool = True,
        bias: bool = False,
        centre: str | None = None,
        centre_gradient: bool = False,
        unit_output: bool = False,
    ):
        super().__init__()
        if centre is not None:
            pick(dict.fromkeys(CENTRES), centre, "centre")
        out_channels = weight.shape[0]
        self.weight = nn.Parameter(weight)
        self.gain = nn.Parameter(torch.ones(out_channels)) if gain else None
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.standardize, self.centre, self.unit_output = standardize, centre, unit_output
        self.gradient_centre = GradientCentre() if centre_gradient and centre == "input" else None
        self.fan_in = weight[0].numel()
        self.calibrating = False
        self.exact = False  # True: the scale multiplies the product, so that the sums of signs are whole numbers
        self.preconditioner: Preconditioner | None = None
        if centre == "input":
            self.register_buffer("input_mean", torch.zeros(in_channels))
            self.register_buffer("input_sum", torch.zeros(in_channels), persistent=False)
            self.register_buffer("input_count", torch.zeros(()), persistent=False)
        if centre == "output":
            self.register_buffer("output_mean", torch.zeros(out_channels))
        if unit_output:
            self.register_buffer("output_std", torch.ones(out_channels))

    def unit_weight(self) -> tuple[Tensor, Tensor | None]:
        """The weight without its scale, and the scale per output channel [O] (None: 1)."""
        return self.standardized(), None

    def standardized(self) -> Tensor:
        """The latent weight after standardisation, if the layer has it."""
        return standardize_weight(self.weight) if self.standardize else self.weight

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The map itself: a convolution or a matrix product."""
        raise NotImplementedError

    def channel_shape(self, y: Tensor) -> tuple[int, ...]:
        """The shape in which numbers per output channel meet the output y of `linear`."""
        raise NotImplementedError

    def expected_output(self, weight: Tensor, x: Tensor) -> Tensor:
        """[O]: the mean over positions of `linear` for inputs that equal `input_mean` everywhere."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        low = None
        if torch.is_autocast_enabled(x.device.type) and self.low_precision():
            low = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            return self._forward(x, low)

    def _forward(self, x: Tensor, low: torch.dtype | None) -> Tensor:
        x = x.to(self.weight.dtype) if x.dtype in (torch.bfloat16, torch.float16) else x
        weight, scale = self.unit_weight()
        if self.calibrating:
            self._calibrate(x)
        elif self.centre == "input" and self.training:
            count = self.counted(len(x))
            with torch.no_grad():
                self.input_sum += sum_of_sample_means(x[len(x) - count :])
                self.input_count += count
            if self.gradient_centre is not None:
                x = self.gradient_centre(x)
        if low is None and self.exact:
            low = x.dtype
        factor = self.output_factor(scale)
        bias: Tensor | None = self.bias
        if self.preconditioner is not None and self.training:
            weight, factor, bias = self.preconditioner(weight, factor, bias, low is not None)
        bias = self._folded_bias(x, weight, factor, bias)
        if low is None:
            folded = weight if factor is None else weight * _per_row(factor, weight)
            return self.linear(x, folded, bias)
        y = self.linear(x.to(low), weight.to(low), None).to(x.dtype)
        shape = self.channel_shape(y)
        y = y if factor is None else y * factor.view(shape)
        return y if bias is None else y + bias.view(shape)

    def counted(self, samples: int) -> int:
        """Number of the last samples that move the running mean of inputs: images of an earlier pass do not."""
        if self.centre != "input":
            return 0
        part = None if self.gradient_centre is None else self.gradient_centre.part
        return samples if part is None else part.counted

    def low_precision(self) -> bool:
        """May autocast run the map in its dtype? Real layers are thin, and feed signs: they stay float32."""
        return False

    def fold(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(W, factor [O], bias [O]) such that y = linear(x, W) factor + bias; None: 1 and 0. Of x the shape counts."""
        weight, scale = self.unit_weight()
        factor = self.output_factor(scale)
        return weight, factor, self._folded_bias(x, weight, factor, self.bias)

    def output_factor(self, factor: Tensor | None) -> Tensor | None:
        """The scale [O] of `unit_weight`, times what multiplies the output."""
        if self.gain is not None:
            factor = self.gain if factor is None else factor * self.gain
        if self.unit_output:
            factor = 1 / self.output_std if factor is None else factor / self.output_std
        return factor

    def _folded_bias(self, x: Tensor, weight: Tensor, factor: Tensor | None, bias: Tensor | None) -> Tensor | None:
        """`bias` less what the layer centres by."""
        centre = None
        if self.centre == "input":
            centre = self.expected_output(weight, x)
            centre = centre if factor is None else centre * factor
        elif self.centre == "output":
            divisor = self.output_std if self.unit_output else 1.0
            centre = self.output_mean / divisor * (1.0 if self.gain is None else self.gain)
        if centre is None:
            return bias
        return -centre if bias is None else bias - centre

    @torch.no_grad()
    def output_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(deviation, mean) [O] of W * x, without gain and constants; the deviation of a constant channel counts as 1.

        This is what `output_std` and `output_mean` hold once x was calibrated with.
        """
        weight, scale = self.unit_weight()
        folded = weight if scale is None else weight * _per_row(scale, weight)
        y = self.linear(x, folded, None)
        std, mean = torch.std_mean(y, dim=[d for d in range(y.dim()) if d != 1], correction=0)
        return torch.where(std > EPS, std, torch.ones_like(std)), mean

    @torch.no_grad()
    def _calibrate(self, x: Tensor) -> None:
        """Set the constants from this input: mean of the inputs, mean and deviation of the outputs."""
        if self.centre == "input":
            self.input_mean.copy_(sum_of_sample_means(x) / x.shape[0])
            self.input_sum.zero_()  # what was collected before belongs to other constants
            self.input_count.zero_()
        if self.centre == "output" or self.unit_output:
            std, mean = self.output_moments(x)
            if self.centre == "output":
                self.output_mean.copy_(mean)
            if self.unit_output:
                self.output_std.copy_(std)

    def extra_repr(self) -> str:
        parts = [f"weight={list(self.weight.shape)}"]
        parts += [name for name in ("standardize", "unit_output") if getattr(self, name)]
        parts += [name for name in ("gain", "bias") if getattr(self, name) is not None]
        parts += [f"centre={self.centre}"] if self.centre else []
        return ", ".join(parts + (["centre_gradient"] if self.gradient_centre else []))


def _per_row(vector: Tensor, weight: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (weight.dim() - 1))


def sum_of_sample_means(x: Tensor) -> Tensor:
    """[C]: the sum over samples of each sample's mean over positions."""
    return (x.flatten(2).mean(2) if x.dim() > 2 else x).sum(0)


def _pair(value: int | tuple[int, int], name: str, minimum: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(not isinstance(v, int) or v < minimum for v in pair):
        raise BnnfreeError(f"{name}: got {value!r}, expected one or two whole numbers >= {minimum}.")
    return pair


class ConvLayer(WeightLayer):
    """The two-dimensional convolution form of WeightLayer; padding may carry 0, +1 or -1."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        pad_value: int = 0,
        **options,
    ):
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise BnnfreeError(
                f"groups: got {groups} for {in_channels} input and {out_channels} output channels, "
                "expected a whole number that divides both."
            )
        if pad_value not in (0, 1, -1):
            raise BnnfreeError(f"pad_value: got {pad_value!r}, expected 0, 1 or -1.")
        kernel = _pair(kernel_size, "kernel_size", 1)
        super().__init__(torch.empty(out_channels, in_channels // groups, *kernel), in_channels, **options)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel
        self.stride = _pair(stride, "stride", 1)
        self.padding = _pair(padding, "padding", 0)
        self.dilation = _pair(dilation, "dilation", 1)
        self.groups, self.pad_value = groups, pad_value

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.pad_value and any(padding):
            x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]), value=float(self.pad_value))
            padding = (0, 0)
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def channel_shape(self, y: Tensor) -> tuple[int, ...]:
        return (-1, 1, 1)

    def expected_input(self, size: Sequence[int]) -> Tensor:
        """[groups * I, kh, kw]: what each tap sees of `input_mean` on average over positions of a map of this size."""
        sides = zip(size, self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        rows, columns = (self.input_mean.new_tensor(tap_coverage(*side)) for side in sides)
        inside = rows[:, None] * columns
        mean = self.input_mean.view(-1, 1, 1) * inside
        return mean + self.pad_value * (1 - inside) if self.pad_value else mean

    def expected_output(self, weight: Tensor, x: Tensor) -> Tensor:
        mean = self.expected_input(x.shape[2:]).to(x.dtype)
        mean = mean.view(self.groups, -1, *mean.shape[1:])
        taps = weight.view(self.groups, -1, *weight.shape[1:])
        return (taps * mean[:, None]).sum((2, 3, 4)).flatten()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, stride={self.stride}, padding={self.padding}, pad={self.pad_value}"


class LinearLayer(WeightLayer):
    """The matrix-product form of WeightLayer. Shapes: [N, I] -> [N, O]."""

    def __init__(self, in_features: int, out_features: int, **options):
        super().__init__(torch.empty(out_features, in_features), in_features, **options)
        self.in_features, self.out_features = in_features, out_features

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def channel_shape(self, y: Tensor) -> tuple[int, ...]:
        return (-1,)

    def expected_output(self, weight: Tensor, x: Tensor) -> Tensor:
        return weight @ self.input_mean.to(x.dtype)


class CentredLinear(LinearLayer):
    """A real linear layer of centred inputs: y = W (x - mu) + b, mu their running mean (WeightLayer, centre "input").

    W and b start as those of nn.Linear do, and -W mu folds into b. Why: what is common to all inputs acts on the output
    as one more bias does, with a gradient that is larger by the mean and for all weights of a row at once.
    centre_gradient: see `bnnfree.nn.centring`. Shapes: [N, I] -> [N, O].
    """

    def __init__(self, in_features: int, out_features: int, *, centre_gradient: bool = True):
        how = {"standardize": False, "gain": False, "bias": True, "centre": "input"}
        super().__init__(in_features, out_features, centre_gradient=centre_gradient, **how)
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        assert self.bias is not None
        nn.init.uniform_(self.bias, -1 / math.sqrt(in_features), 1 / math.sqrt(in_features))


class ScaledStdConv2d(ConvLayer):
    """A real convolution with scaled weight standardisation.

    y_o = g_o (What_o * x - c_o) / sd_o + b_o, What as in `standardize_weight` (standardize=False: W).

    Latents start at N(0, 1/fan_in). Shapes: [N, I, H, W] -> [N, O, H', W'].
    Options: stride=1, padding=0, dilation=1, groups=1, pad_value=0 (what padding carries: 0, +1 or -1), and
    standardize=True, gain=True, bias=False, centre=None, centre_gradient=False, unit_output=False as in WeightLayer.
    Ref: Brock et al. 2021, "Characterizing signal propagation ..."; Chen et al. 2021, section 3.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int], **options):
        super().__init__(in_channels, out_channels, kernel_size, **options)
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.fan_in))
