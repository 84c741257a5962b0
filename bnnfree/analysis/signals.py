"""Inputs of each activation of a network: their power, and the parts that it consists of.

Imports torch, bnnfree.errors and bnnfree.nn only.

The power E[x^2] of a map [N, C, H, W] is split, per channel, by the mean m_n and the deviation s_n of each sample:

    constant         mean(m_n)^2      the same for every sample and pixel: it says nothing about an image
    sample_mean      var(m_n)         differs from sample to sample
    spatial          mean(s_n)^2      differs from pixel to pixel
    sample_spatial   var(s_n)         its size differs from sample to sample

The four add up to the power. Layer normalisation lets `constant` grow with depth; instance normalisation leaves no
sample_mean and no sample_spatial.
Ref: Labatie et al. 2021 (proxy normalisation), the power decomposition of section 3.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor, nn

from bnnfree.errors import BnnfreeError
from bnnfree.nn import Clip, RPReLU, RSign, Sign, ThresholdedLinear, WeightLayer

SIGNS = (Sign, RSign, Clip)  # a clip stands where a sign will
ACTIVATIONS = (*SIGNS, RPReLU, ThresholdedLinear, nn.ReLU, nn.PReLU)


@dataclass(frozen=True, kw_only=True)
class Power:
    """Shares of a map's power, each the mean over its channels divided by the power of the map: they add up to 1.

    Of a map that is 0 throughout all of it counts as constant. rms: the root of the power.
    """

    rms: float
    constant: float
    sample_mean: float
    spatial: float
    sample_spatial: float


@dataclass(frozen=True, kw_only=True)
class Signal(Power):
    """Input of the activation at `path`; `type` is its class, `call` counts from 1 where it runs several times."""

    path: str
    type: str
    call: int
    channels: int

    def to_dict(self) -> dict[str, str | int | float]:
        return asdict(self)


FIGURES = tuple(field.name for field in fields(Power))  # rms and the shares
SHARES = FIGURES[1:]


def split_power(means: Tensor, deviations: Tensor) -> Power:
    """The shares of the formula above, of the mean and the (biased) deviation of each sample and channel, [N, C]."""
    means, deviations = means.double(), deviations.double()
    parts = {
        "constant": means.mean(0).square(),
        "sample_mean": means.var(0, correction=0),
        "spatial": deviations.mean(0).square(),
        "sample_spatial": deviations.var(0, correction=0),
    }
    sizes = {name: part.mean().item() for name, part in parts.items()}
    power = sum(sizes.values())
    if not power:
        sizes["constant"] = 1.0
    return Power(rms=power**0.5, **{name: size / (power or 1) for name, size in sizes.items()})


def trace_signals(model: nn.Module, images: Tensor, batch: int | None = None) -> list[Signal]:
    """Inputs of each activation in the order of a forward pass, over all `images` [N, C, H, W], `batch` at once.

    The model is copied and runs in the mode it is in: in training mode a batch is what batch statistics see, and
    random numbers are drawn (from a copy of torch's state). Memory: two floats per sample and channel beside one
    batch's forward pass. Errors: BnnfreeError for fewer than two images, or no activation of ACTIVATIONS.
    """
    if len(images) < 2:
        raise BnnfreeError(f"images: got {len(images)}, expected 2 or more: shares compare samples with each other.")
    model = bare_copy(model)
    taps: dict[tuple[str, int], tuple[str, list[tuple[Tensor, Tensor]]]] = {}
    with own_random(images.device), torch.no_grad():
        for part in images.split(batch or len(images)):
            with _tapped(model) as found:
                model(part)
            for path, call, kind, pair in found:
                taps.setdefault((path, call), (kind, []))[1].append(pair)
    if not taps:
        names = ", ".join(kind.__name__ for kind in ACTIVATIONS)
        raise BnnfreeError(f"{type(model).__name__}: no activation ran, expected one at least of {names}.")
    signals = []
    for (path, call), (kind, moments) in taps.items():
        means, deviations = (torch.cat(each) for each in zip(*moments, strict=True))
        power = split_power(means, deviations)
        signals.append(Signal(path=path, type=kind, call=call, channels=means.shape[1], **asdict(power)))
    return signals


def bare_copy(model: nn.Module) -> nn.Module:
    """A copy in the same mode that runs layer by layer: not fused, gradients as they are, without anybody's hooks."""
    fusions = [fusion for m in model.modules() if (fusion := getattr(m, "fusion", None)) is not None]
    copied = copy.deepcopy(model, {id(fusion): fusion for fusion in fusions})  # they hold what cannot be copied
    for module in copied.modules():
        if getattr(module, "fusion", None) is not None:
            module.fusion = None  # type: ignore[assignment]
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            hooks.clear()
        if isinstance(module, WeightLayer):
            module.preconditioner = None
    return copied


def own_random(device: torch.device) -> AbstractContextManager:
    """Context that draws from a copy of torch's random state: the same numbers each time, none taken from outside."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def sample_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) deviation over positions of each sample and channel. Shapes: [N, C, ...] -> [N, C] each."""
    x = x.flatten(2).float() if x.ndim > 2 else x.float().unsqueeze(2)
    means = x.mean(2)
    # Why not torch.std: it takes ten times as long on a CPU
    return means, (x - means.unsqueeze(2)).square_().mean(2).sqrt()


@contextmanager
def _tapped(model: nn.Module) -> Iterator[list[tuple[str, int, str, tuple[Tensor, Tensor]]]]:
    """While it is open: (path, call, type, moments) of what enters each activation, in order."""
    found: list[tuple[str, int, str, tuple[Tensor, Tensor]]] = []
    calls: dict[str, int] = {}

    def tap(path: str, module: nn.Module):
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            calls[path] = calls.get(path, 0) + 1
            found.append((path, calls[path], type(module).__name__, sample_moments(inputs[0])))

        return module.register_forward_pre_hook(hook)

    handles = [tap(path, module) for path, module in model.named_modules() if isinstance(module, ACTIVATIONS)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def by_depth(signals: list[Signal]) -> list[Signal]:
    """Those that enter signs, if the network has any; else all: a network's course from image to classes."""
    signs = {kind.__name__ for kind in SIGNS}
    chosen = [signal for signal in signals if signal.type in signs]
    return chosen or signals
