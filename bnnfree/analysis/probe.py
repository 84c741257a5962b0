"""Losses of the binary layers of a network: numbers per layer, at any time of a training.

A layer here is a sign with the binary convolutions (or linear layers) that read its bits. Of t, the values that a sign
compares with 0 (its threshold added), come the numbers about the bits; of the convolutions' outputs and latent weights
those about the weights; of two backward passes how good the estimated gradient is:

    STE      the network as it is trained: forward sign(t), backward the estimator's slope
    smooth   every sign of an activation replaced, forward and backward, by the integral of that slope
             (bnnfree.nn.sign, `smooth`), with a window per sample by smooth(k_n t), k_n held constant as in the
             estimator: this is the exact gradient of a smooth network

Binary weights stay as they are in both, with their own estimator. Imports torch, bnnfree.errors and bnnfree.nn only.
Ref: Yin et al. 2019, "Understanding Straight-Through Estimator in Training Activation Quantized Neural Nets" (why the
angle between the two tells whether the estimator points downhill).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnnfree.analysis.signals import SIGNS, bare_copy, own_random, sample_moments, split_power
from bnnfree.errors import BnnfreeError
from bnnfree.nn import STES, BinaryBlock, BinaryConv2d, BinaryLinear, Clip, Sign, WeightLayer
from bnnfree.nn.sign import sample_window

BINARY = (BinaryConv2d, BinaryLinear)
PASSING = (nn.Identity, nn.Flatten, nn.modules.dropout._DropoutNd)  # what may stand between bits and who reads them
FINITE = ("approx", "clip")  # estimators whose slope is 0 outside a window
TAIL = 0.01  # of its peak: where the slope of the others counts as 0

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class LayerProbe:
    """Numbers of one binary layer; None where there is nothing to measure.

    sign, call      path of the sign, and which of its runs in a forward pass it is, counted from 1
    convs           paths of the binary convolutions and linear layers that read its bits (real weights included)
    pre_sign_mean   mean of t over all values
    pre_sign_std    their deviation
    expected_std    the deviation of the sign's input that the network goes by (threshold not counted):
                    1 at the start of a block whose beta is kept by the book (nf, ref) or measured by calibration;
                    sqrt(mean g^2 + var b) right after a layer that makes its channels 0 and 1 and then applies g and
                    b: batch, group, layer and instance normalisation, and a convolution calibrated to unit output.
                    None elsewhere: a trunk without beta grows freely, what FRN and proxy normalisation make is no
                    deviation, and a standardised convolution alone promises nothing about binary weights.
                    In a training (`Prober`) of a calibrated network without beta (free): what it was at the
                    stage's first probe, right after calibration
    in_window       share of t at which the estimator's slope is not 0; of estimators without end: is larger than 1 %
                    of its peak in size. The window is the sample's where the estimator's is
    positive        share of bits that are +1
    imbalance       mean over channels of |share of +1 - 1/2|; 0.5: every channel is a constant
    constant        share of the power of t that is the same for every sample and pixel (`Power.constant`)
    flips           share of weight bits that changed since `before`
    output_std      mean over output channels of the deviation before gain and bias, divided by the constant that
                    calibration made of it (WeightLayer.output_std), by 1 without one: the drift of the scale
    gain            mean |gain| of the convolutions
    gradient        norm of the latents' gradient divided by the latents' norm
    cosine          between the latents' gradients of the STE and the smooth network. None where a gradient is 0, and
                    in networks without signs (a clip is its own smooth network)
    agc_rate        share of output channels whose gradient AGC would shorten, of these images
    """

    sign: str
    call: int
    convs: tuple[str, ...]
    pre_sign_mean: float
    pre_sign_std: float
    expected_std: float | None
    in_window: float
    positive: float
    imbalance: float
    constant: float
    flips: float | None
    output_std: float | None
    gain: float | None
    gradient: float | None
    cosine: float | None
    agc_rate: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON gives them back."""
        return asdict(self) | {"convs": list(self.convs)}


NUMBERS = tuple(name for name in LayerProbe.__dataclass_fields__ if name not in ("sign", "call", "convs"))


def probe(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    loss: Loss = F.cross_entropy,
    agc: tuple[float, float] | None = None,
    before: Mapping[str, Tensor] | None = None,
) -> list[LayerProbe]:
    """The numbers of every binary layer of `model`, in the order of a forward pass of `images`, all at once.

    model    runs as a copy, in the mode it is in, in the dtype of its weights, layer by layer and without the
             preconditioner; it, its buffers, its gradients and torch's random state stay as they are. Both passes
             draw the same random numbers
    loss     (logits, labels) -> the mean loss, whose gradient is measured
    agc      clip and eps of adaptive gradient clipping; None: off
    before   `weight_signs` of an earlier time; None: flips are None
    Shapes: images [N, C, H, W] normalised as in training, labels [N] or what `loss` takes. Memory: two copies of the
    model, and what a training step with N images keeps.
    Errors: BnnfreeError for fewer than two images, another number of labels, a model in which no sign runs.
    """
    if len(images) < 2:
        raise BnnfreeError(f"images: got {len(images)}, expected 2 or more: shares compare samples with each other.")
    if len(labels) != len(images):
        raise BnnfreeError(f"labels: got {len(labels)} for {len(images)} images, expected one each.")
    net = bare_copy(model)
    with _watched(net) as layers:
        real = _gradients(net, images, labels, loss)
    if not layers:
        names = ", ".join(kind.__name__ for kind in SIGNS)
        raise BnnfreeError(
            f"{type(model).__name__}: no sign ran, expected one at least of {names}: "
            "a network of real activations has no binary layers."
        )
    smooth = None
    if any(isinstance(module, Sign) for module in net.modules()):
        net = bare_copy(model)  # Why anew: the first pass has moved running statistics
        for module in net.modules():
            if isinstance(module, Sign):
                module.forward = functools.partial(_smooth, module)  # type: ignore[method-assign]
        smooth = _gradients(net, images, labels, loss)
    expected = _expected_stds(model)
    return [
        LayerProbe(
            sign=layer.path,
            call=layer.call,
            convs=tuple(layer.convs),
            expected_std=expected.get(layer.path),
            **layer.numbers,
            **_of_weights(layer, before),
            **_of_gradients(layer, real, smooth, agc),
        )
        for layer in layers
    ]


def weight_signs(model: nn.Module) -> dict[str, Tensor]:
    """path -> True where the bit of a weight is +1, of every layer with binary weights."""
    return {name: _weight_signs(m) for name, m in model.named_modules() if isinstance(m, BINARY) and m.binary}


@torch.no_grad()
def _weight_signs(conv: BinaryConv2d | BinaryLinear) -> Tensor:
    return conv.standardized() >= 0


@dataclass
class _Layer:
    """A sign that has run, and the convolutions that have read it, with their outputs' deviations."""

    path: str
    call: int
    numbers: dict[str, Any]
    convs: dict[str, BinaryConv2d | BinaryLinear] = field(default_factory=dict)
    deviations: list[Tensor] = field(default_factory=list)


@contextmanager
def _watched(net: nn.Module) -> Iterator[list[_Layer]]:
    """While it is open: the layers that run, in order."""
    layers: list[_Layer] = []
    bits: dict[int, tuple[Tensor, _Layer]] = {}  # with the tensor, so that no other gets its id
    calls: dict[str, int] = {}

    def read(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, path: str) -> None:
        if isinstance(module, SIGNS):
            calls[path] = calls.get(path, 0) + 1
            layers.append(_Layer(path, calls[path], _of_bits(module, inputs[0].detach())))
            bits[id(output)] = output, layers[-1]
        elif (known := bits.get(id(inputs[0]))) is not None:
            if isinstance(module, BINARY):
                known[1].convs[path] = module
                known[1].deviations.append(_drift(module, output.detach()))
            else:
                bits[id(output)] = output, known[1]

    handles = [
        module.register_forward_hook(functools.partial(read, path=path))
        for path, module in net.named_modules()
        if isinstance(module, SIGNS + BINARY + PASSING)
    ]
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()


def _gradients(net: nn.Module, images: Tensor, labels: Tensor, loss: Loss) -> dict[str, Tensor]:
    """path -> gradient of the latent weights, of every binary convolution or linear layer that has run."""
    latents = {path: module.weight for path, module in net.named_modules() if isinstance(module, BINARY)}
    net.requires_grad_(False)  # but for these: no time for other gradients
    for latent in latents.values():
        latent.requires_grad_(True)
    with own_random(images.device), torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        value = loss(net(images), labels)
        if not latents or not value.requires_grad:
            return {}
        found = torch.autograd.grad(value, list(latents.values()), allow_unused=True)
    return {path: grad for path, grad in zip(latents, found, strict=True) if grad is not None}


def _scaled(sign: Sign, t: Tensor) -> Tensor:
    """t in units of the estimator's window: k_n t with one per sample."""
    if sign.window != "sample":
        return t
    return sample_window(t.detach()).view(-1, *[1] * (t.dim() - 1)) * t


def _smooth(sign: Sign, x: Tensor) -> Tensor:
    """Output of the smooth function that replaces `sign` in the smooth network."""
    t = sign.compared(x)
    return STES[sign.ste].smooth(_scaled(sign, t), sign.parameter.to(t.dtype))


@torch.no_grad()
def _of_bits(sign: Sign | Clip, x: Tensor) -> dict[str, Any]:
    """The numbers about t and the bits made of it."""
    t = sign.compared(x)
    means, deviations = sample_moments(t)
    power = split_power(means, deviations)
    means, deviations = means.double(), deviations.double()
    variance = deviations.square().mean() + means.var(correction=0)
    positive = (t >= 0).to(t.dtype).mean([d for d in range(t.dim()) if d != 1]).double()
    numbers = [means.mean(), variance.sqrt(), _in_window(sign, t), positive.mean(), (positive - 0.5).abs().mean()]
    names = ("pre_sign_mean", "pre_sign_std", "in_window", "positive", "imbalance")
    values = torch.stack([number.double() for number in numbers]).tolist()
    return dict(zip(names, values, strict=True)) | {"constant": power.constant}


def _in_window(sign: nn.Module, t: Tensor) -> Tensor:
    """Share of t that a gradient passes."""
    if not isinstance(sign, Sign):  # a clip, whose slope is 1 inside
        return (t.abs() <= 1).to(t.dtype).mean()
    rule, parameter = STES[sign.ste], sign.parameter.to(t.dtype)
    slope = rule.slope(_scaled(sign, t), parameter).abs()
    least = 0.0 if sign.ste in FINITE else TAIL * rule.slope(t.new_zeros(()), parameter)
    return (slope > least).to(t.dtype).mean()


@torch.no_grad()
def _drift(conv: BinaryConv2d | BinaryLinear, y: Tensor) -> Tensor:
    """Deviation of each output channel without its gain, over its constant; channels of gain 0 left out."""
    means, deviations = sample_moments(y)
    std = (deviations.square().mean(0) + means.var(0, correction=0)).sqrt()
    if conv.gain is None:
        return std
    return (std / conv.gain.abs())[conv.gain != 0]


@torch.no_grad()
def _of_weights(layer: _Layer, before: Mapping[str, Tensor] | None) -> dict[str, Any]:
    """The numbers about the weights: flips, output_std, gain."""
    binary = {path: conv for path, conv in layer.convs.items() if conv.binary}
    changed = []
    if before is not None:
        known = {path: before[path].to(conv.weight.device) for path, conv in binary.items() if path in before}
        changed = [(_weight_signs(binary[path]) != signs).flatten() for path, signs in known.items()]
    gains = [conv.gain.abs() for conv in layer.convs.values() if conv.gain is not None]
    return {"flips": _mean(changed), "output_std": _mean(layer.deviations), "gain": _mean(gains)}


@torch.no_grad()
def _of_gradients(
    layer: _Layer, real: Mapping[str, Tensor], smooth: Mapping[str, Tensor] | None, agc: tuple[float, float] | None
) -> dict[str, Any]:
    """The numbers about the latents' gradients: gradient, cosine, agc_rate."""
    paths = [path for path in layer.convs if path in real]
    if not paths:
        return {"gradient": None, "cosine": None, "agc_rate": None}
    weight = torch.cat([layer.convs[path].weight.flatten() for path in paths]).double()
    grad = torch.cat([real[path].flatten() for path in paths]).double()
    cosine = None
    if smooth is not None:
        other = torch.cat([smooth[path].flatten() for path in paths]).double()
        size = (grad.norm() * other.norm()).item()
        cosine = torch.dot(grad, other).item() / size if size else None
    rate = None
    if agc is not None:
        clip, eps = agc
        pairs = [(layer.convs[path].weight.flatten(1).norm(dim=1), real[path].flatten(1).norm(dim=1)) for path in paths]
        rate = _mean([grads > clip * weights.clamp_min(eps) for weights, grads in pairs])
    return {"gradient": (grad.norm() / weight.norm()).item(), "cosine": cosine, "agc_rate": rate}


def _mean(parts: list[Tensor]) -> float | None:
    """The mean over all values; None of none."""
    values = torch.cat(parts) if parts else torch.empty(0)
    return values.double().mean().item() if values.numel() else None


def _expected_stds(model: nn.Module) -> dict[str, Any]:
    """path of a sign -> `expected_std`, of the signs in blocks."""
    blocks = [(path, block) for path, block in model.named_modules() if isinstance(block, BinaryBlock)]
    booked = any(bool(block.beta != 1) for _, block in blocks if not block.measured)
    found: dict[str, float | None] = {}
    for path, block in blocks:
        last: nn.Module | None = None
        for name, module in block.branch.named_children():
            if isinstance(module, SIGNS):
                start = 1.0 if booked or block.measured else None
                found[f"{path}.branch.{name}" if path else f"branch.{name}"] = start if last is None else _unit(last)
            if not isinstance(module, PASSING):
                last = module
    return found


@torch.no_grad()
def _unit(layer: nn.Module) -> float | None:
    """The deviation after a layer that makes its channels 0 and 1, of its gain and bias; None after any other."""
    if isinstance(layer, WeightLayer):
        if not layer.unit_output or layer.centre is None:
            return None
        gain, bias = layer.gain, layer.bias
    elif isinstance(layer, nn.BatchNorm2d | nn.GroupNorm):
        gain, bias = layer.weight, layer.bias
    else:
        return None
    square = 1.0 if gain is None else gain.double().square().mean().item()
    spread = 0.0 if bias is None else bias.double().var(correction=0).item()
    return (square + spread) ** 0.5


class Prober:
    """The probes of one network through a stage of training, on the same images each time.

    pending   records {"step", "layers"} that have not been taken yet; "layers": LayerProbe.to_dict of each
    A record's flips are since the record before. What comes out depends on the state alone, so a training that goes
    on from `state_dict` gives the records of one that was never cut.
    """

    def __init__(self) -> None:
        self.pending: list[dict[str, Any]] = []
        self._signs: dict[str, Tensor] | None = None
        self._expected: dict[str, float] = {}

    def measure(self, model: nn.Module, step: int, images: Tensor, labels: Tensor, **options: Any) -> None:
        """Add a record; the first one is of a network just calibrated. `options` and errors: as in `probe`."""
        layers = probe(model, images, labels, before=self._signs, **options)
        if self._signs is None and any(isinstance(m, WeightLayer) and m.unit_output for m in model.modules()):
            self._expected = {_key(layer): layer.pre_sign_std for layer in layers}
        self._signs = {path: signs.cpu() for path, signs in weight_signs(model).items()}
        layers = [
            layer if layer.expected_std is not None else replace(layer, expected_std=self._expected.get(_key(layer)))
            for layer in layers
        ]
        self.pending.append({"step": step, "layers": [layer.to_dict() for layer in layers]})

    def take(self) -> list[dict[str, Any]]:
        """The records that are pending, which then are not."""
        taken, self.pending = self.pending, []
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors: safe to `torch.load` with weights_only."""
        return {"pending": list(self.pending), "signs": self._signs, "expected": dict(self._expected)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to where `state_dict` was taken."""
        self.pending, self._expected = list(state["pending"]), dict(state["expected"])
        self._signs = None if state["signs"] is None else dict(state["signs"])


def _key(layer: LayerProbe) -> str:
    return f"{layer.sign}:{layer.call}"
