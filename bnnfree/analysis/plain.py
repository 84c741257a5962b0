"""A network in the plain formulation, and its training step: one tensor operation after the other, nothing fused.

How the papers' released code is built: masks of float32 that autograd keeps, estimators as f(t) + (value - f(t)) with
the difference detached, shifts as modules of their own, weights standardised at each forward pass, alpha and beta as
products of whole maps; gradients clipped and weights moved tensor by tensor. It is the readable reference of what the
layers compute, and the baseline of their speed and memory. Imports torch, bnnfree.errors and bnnfree.nn only.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnnfree.errors import BnnfreeError
from bnnfree.nn import (
    BinaryBlock,
    BinaryConv2d,
    CentredLinear,
    Clip,
    GhostBatchNorm2d,
    RPReLU,
    RSign,
    ScaledStdConv2d,
    Sign,
)
from bnnfree.nn.centring import GROUP, taken_alone
from bnnfree.nn.standard import EPS, tap_coverage

KEPT = (nn.Linear, nn.ReLU, nn.Identity, nn.BatchNorm2d, GhostBatchNorm2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, Clip)


def plain(model: nn.Module) -> nn.Module:
    """A copy of `model` in the plain formulation: the same keys and values of its state, the same function.

    Outputs and gradients are the model's but for rounding. Two differences from the released code, for that: a sign
    is +1 at 0 and not 0, and estimators are summed so that values are exactly +-1 times their scale. One from the
    model: a binary weight beyond +-1 gets no gradient, as there; standardised weights never come so far.
    The running input means of `free` follow by `move_input_means`, not by bnnfree.nn.update_input_means.

    Takes networks of norm none, free, free_paper or bn with ste "approx", binary or real.
    Errors: BnnfreeError for a layer whose plain formulation is not here.
    """
    found = copy.deepcopy(model)
    for module in found.modules():
        if getattr(module, "fusion", None) is not None:  # how a network fuses its blocks (bnnfree.nn.fused)
            module.fusion = None  # type: ignore[assignment]
    return _replaced(found, "")


def _replaced(module: nn.Module, path: str) -> nn.Module:
    """`module` or what stands for it, its children likewise."""
    if type(module) in KEPT:
        return module
    if type(module) in PLAIN:
        module = PLAIN[type(module)](module)
    elif any(True for _ in module.parameters(recurse=False)) or not any(True for _ in module.children()):
        raise BnnfreeError(
            f"plain: got a {type(module).__name__} at {path or 'the root'}, expected a network of norm none, free, "
            "free_paper or bn."
        )
    for name, child in list(module.named_children()):
        setattr(module, name, _replaced(child, f"{path}.{name}".lstrip(".")))
    return module


def _take_over(new: nn.Module, old: nn.Module, *optional: str) -> None:
    """Give `new` the parameters and buffers of `old` under their names; the `optional` ones may be None."""
    for name, parameter in old.named_parameters(recurse=False):
        new.register_parameter(name, parameter)
    for name, buffer in old.named_buffers(recurse=False):
        new.register_buffer(name, buffer, persistent=name not in old._non_persistent_buffers_set)
    for name in optional:
        if not hasattr(new, name):
            new.register_parameter(name, None)


def _shifted(x: Tensor, shift: Tensor) -> Tensor:
    """x + shift_c, the learnable bias of a channel. Shapes: [N, C, ...], [C] -> [N, C, ...]."""
    return x + shift.view(1, -1, *[1] * (x.dim() - 2)).expand_as(x)


@torch.no_grad()
def _signs(x: Tensor) -> Tensor:
    """+-1, +1 at 0. Why not torch.where: on a CPU it takes ten times as long, and the baseline should not."""
    return torch.sign(x).add_(0.5).sign_()


class PlainSign(nn.Module):
    """Sign of x + b, and the piecewise polynomial whose derivative is its estimator.

    f(t) = -1 below -1; 2t + t^2 up to 0; 2t - t^2 up to 1; 1 beyond       slope 2 - 2|t| inside
    value = f(t) + detached (sign(t) - f(t)) up to rounding; window "sample": f(k t), k = 1 / std of the sample.
    """

    bias: Tensor | None

    def __init__(self, layer: Sign):
        super().__init__()
        _take_over(self, layer, "bias")
        if layer.ste != "approx":
            raise BnnfreeError(f"plain: got ste {layer.ste!r}, expected 'approx', the one with a plain formulation.")
        self.window, self.width = layer.window, float(layer.parameter)

    def forward(self, x: Tensor) -> Tensor:
        t = x if self.bias is None else _shifted(x, self.bias)
        value = _signs(t)
        if self.window == "sample":
            std = t.detach().std(dim=tuple(range(1, t.dim())), keepdim=True, correction=0)
            t = t * torch.where(std > 1e-5, 1 / std, torch.ones_like(std))
        t = t if self.width == 1 else t / self.width
        below, negative, inside = t < -1, t < 0, t < 1
        f = -1 * below.float() + (t * t + 2 * t) * (1 - below.float())
        f = f * negative.float() + (-t * t + 2 * t) * (1 - negative.float())
        f = f * inside.float() + 1 * (1 - inside.float())
        return value + (f - f.detach())


class PlainRPReLU(nn.Module):
    """PReLU between two moves."""

    input_shift: Tensor | None
    slope: Tensor
    output_shift: Tensor

    def __init__(self, layer: RPReLU):
        super().__init__()
        _take_over(self, layer, "input_shift")

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.input_shift is None else _shifted(x, self.input_shift)
        return _shifted(F.prelu(x, self.slope), self.output_shift)


class PlainConv(nn.Module):
    """A convolution whose weight is made anew at each forward pass.

    What = (W - mean W) / ((std W + eps) sqrt(fan_in))          where standardised
    W_b  = s sign(What), with the gradient of clip(What, -1, 1)  where binary
    y    = (g W_b * x - c) / sd + b                              as far as the layer has g, c, sd, b
    """

    weight: Tensor
    gain: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    input_mean: Tensor
    input_sum: Tensor
    input_count: Tensor
    output_mean: Tensor
    output_std: Tensor

    def __init__(self, layer: BinaryConv2d | ScaledStdConv2d):
        super().__init__()
        _take_over(self, layer, "gain", "bias", "scale")
        self.kernel_size, self.stride, self.padding = layer.kernel_size, layer.stride, layer.padding
        self.dilation, self.groups, self.pad_value = layer.dilation, layer.groups, layer.pad_value
        self.standardize, self.centre, self.unit_output = layer.standardize, layer.centre, layer.unit_output
        self.fan_in, self.exact = layer.fan_in, layer in SUMMED
        self.binary = isinstance(layer, BinaryConv2d) and layer.binary
        self.scale_rule = layer.scale_rule if isinstance(layer, BinaryConv2d) else "none"
        self.centre_gradient = layer.gradient_centre is not None

    def latent(self) -> Tensor:
        """The weight, standardised if the layer standardises."""
        if not self.standardize:
            return self.weight
        std, mean = torch.std_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        return (self.weight - mean) / (std + EPS) / math.sqrt(self.fan_in)

    def size(self, latent: Tensor) -> Tensor:
        """s [O, 1, 1, 1]: the size of the binary weights."""
        mean = latent.abs().mean((1, 2, 3), keepdim=True).detach()
        if self.scale_rule == "mean_abs":
            return mean
        if self.scale is not None:
            return self.scale.view(-1, 1, 1, 1)
        return torch.full_like(mean, 1 / math.sqrt(self.fan_in) if self.scale_rule == "fan_in" else 1.0)

    def made_weight(self) -> tuple[Tensor, Tensor | None]:
        """(the weight, None), or (+-1 with its gradient, the factor of the outputs) where sums must be exact."""
        latent = self.latent()
        if not self.binary:
            if self.scale_rule == "learned":
                latent = latent * (self.size(latent) / latent.abs().mean((1, 2, 3), keepdim=True).detach())
            return latent if self.gain is None else self.gain.view(-1, 1, 1, 1) * latent, None
        size, bits, clipped = self.size(latent), _signs(latent), latent.clamp(-1, 1)
        passed = clipped - clipped.detach()  # 0, with the latent's gradient
        if self.exact:
            factor = size if self.gain is None else size * self.gain.view(-1, 1, 1, 1)
            return bits + passed / size.detach().abs(), factor.view(1, -1, 1, 1)
        weight = size * bits + (passed * size.detach().sign() if self.scale_rule == "learned" else passed)
        return weight if self.gain is None else self.gain.view(-1, 1, 1, 1) * weight, None

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        padding = self.padding
        if self.pad_value:
            x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]), value=float(self.pad_value))
            padding = (0, 0)
        return F.conv2d(x, weight, None, self.stride, padding, self.dilation, self.groups)

    def expected(self, x: Tensor, weight: Tensor) -> Tensor:
        """c [1, O, 1, 1]: the mean output for inputs equal to their running mean; on padding, to its value."""
        sides = zip(x.shape[2:], self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        rows, columns = (torch.tensor(tap_coverage(*side), dtype=x.dtype, device=x.device) for side in sides)
        inside = rows[:, None] * columns
        taps = self.input_mean.view(self.groups, 1, -1, 1, 1) * inside + self.pad_value * (1 - inside)
        return (weight.view(self.groups, -1, *weight.shape[1:]) * taps).sum((2, 3, 4)).view(1, -1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.centre == "input" and self.training:
            x = _counted(self, x, x.mean((2, 3), keepdim=True))
        weight, factor = self.made_weight()
        y = self.convolve(x, weight)
        if self.centre == "input":
            y = y - self.expected(x, weight)
        if factor is not None:
            y = y * factor
        if self.centre == "output":
            mean = self.output_mean if self.gain is None else self.output_mean * self.gain
            y = y - mean.view(1, -1, 1, 1)
        if self.unit_output:
            y = y / self.output_std.view(1, -1, 1, 1)
        return y if self.bias is None else _shifted(y, self.bias)


def _counted(layer: PlainConv | PlainLinear, x: Tensor, own: Tensor) -> Tensor:
    """x, whose gradient loses that of the other samples where the layer centres it; `own`: each sample's means."""
    with torch.no_grad():
        layer.input_sum += own.sum(0).flatten()
        layer.input_count += len(x)
    if not layer.centre_gradient or len(x) < 2:
        return x
    others = taken_alone(own, GROUP)
    return x - (others - others.detach())


class PlainLinear(nn.Module):
    """y = W (x - mu) + b, mu the running mean of the inputs."""

    weight: Tensor
    bias: Tensor
    input_mean: Tensor
    input_sum: Tensor
    input_count: Tensor
    centre = "input"

    def __init__(self, layer: CentredLinear):
        super().__init__()
        _take_over(self, layer)
        self.centre_gradient = layer.gradient_centre is not None

    def forward(self, x: Tensor) -> Tensor:
        x = _counted(self, x, x) if self.training else x
        return F.linear(x - self.input_mean, self.weight) + self.bias


class PlainBlock(nn.Module):
    """The residual block; alpha and beta are products of whole maps, whatever they are."""

    alpha: Tensor
    beta: Tensor

    def __init__(self, block: BinaryBlock):
        super().__init__()
        _take_over(self, block)
        self.stride, self.duplicate = block.stride, block.duplicate
        layers = [layer for layer in block.branch if not isinstance(layer, nn.Identity)]
        SUMMED.update(layer for layer, after in zip(layers, layers[1:], strict=False) if isinstance(after, Sign))
        self.branch, self.shortcut, self.act = block.branch, block.shortcut, block.act

    def forward(self, x: Tensor) -> Tensor:
        u = x * self.beta
        h = self.branch(u)
        identity = x if self.stride == 1 and self.shortcut is None else u
        if self.stride > 1:
            identity = F.avg_pool2d(identity, self.stride, ceil_mode=True, count_include_pad=False)
        if self.shortcut is not None:
            identity = self.shortcut(identity)
        if self.duplicate:
            identity = torch.cat([identity, identity], dim=1)
        return self.act(h * self.alpha + identity)


SUMMED: WeakSet[nn.Module] = WeakSet()  # layers whose sums a sign reads, so that they must be exact there too
PLAIN: dict[type, type] = {
    Sign: PlainSign,
    RSign: PlainSign,
    RPReLU: PlainRPReLU,
    BinaryConv2d: PlainConv,
    ScaledStdConv2d: PlainConv,
    BinaryBlock: PlainBlock,
    CentredLinear: PlainLinear,
}


@torch.no_grad()
def move_input_means(model: nn.Module, window: float = 256.0) -> None:
    """Counterpart of bnnfree.nn.update_input_means for a plain model: mu <- mu + (1 - exp(-n / window)) (mean - mu)."""
    for layer in model.modules():
        if isinstance(layer, PlainConv | PlainLinear) and layer.centre == "input" and layer.input_count > 0:
            mean = layer.input_sum / layer.input_count
            layer.input_mean += (1 - torch.exp(-layer.input_count / window)) * (mean - layer.input_mean)
            layer.input_sum.zero_()
            layer.input_count.zero_()


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], clip: float, eps: float = 1e-3) -> None:
    """Adaptive gradient clipping, tensor by tensor, for every parameter given that has a gradient.

    G_u <- G_u limit / max(||G_u||, 1e-6) where ||G_u|| >= limit = clip max(||W_u||, eps); u is a row of a tensor with
    two or more dims, the whole of a vector. As released; bnnfree.optim.adaptive_grad_clip is ours.
    """
    for weight in parameters:
        if weight.grad is None:
            continue
        dims = tuple(range(1, weight.dim())) or None
        limit = torch.linalg.vector_norm(weight, dim=dims, keepdim=weight.dim() > 1).clamp(min=eps) * clip
        norm = torch.linalg.vector_norm(weight.grad, dim=dims, keepdim=weight.dim() > 1)
        scaled = weight.grad * (limit / norm.clamp(min=1e-6))
        weight.grad.copy_(torch.where(norm < limit, weight.grad, scaled))


def two_group_adam(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Adam:
    """torch's Adam as released: tensors of four dims, and those with "conv" in their name, decay; others do not."""
    named = list(model.named_parameters())
    decays = [parameter for name, parameter in named if parameter.dim() == 4 or "conv" in name]
    chosen = set(decays)
    others = [parameter for _, parameter in named if parameter not in chosen]
    groups: list[dict] = [{"params": others}, {"params": decays, "weight_decay": weight_decay}]
    return torch.optim.Adam(groups, lr=lr)
