"""Setting the constants of layers: from data, and by how far training is. Imports torch and bnnfree.nn only."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bnnfree.nn.standard import WeightLayer


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor) -> None:
    """Set every constant that comes from data, layer by layer, in one forward pass of `images`.

    Each layer sees inputs made by the layers before it with their constants already set: the input means
    of centred layers, output means and deviations, and beta of blocks in mode "measured". Parameters stay
    as they are. Call it on the bare model (not the compiled one), before training or at a stage's start.

    Shapes: images [N, C, H, W], normalised as in training; a few hundred samples suffice.
    """
    parts = [module for module in model.modules() if hasattr(module, "calibrating")]
    was_training = model.training
    model.eval()
    try:
        for part in parts:
            part.calibrating = True  # type: ignore[assignment]
        model(images)
    finally:
        for part in parts:
            part.calibrating = False  # type: ignore[assignment]
        model.train(was_training)


def centred_layers(model: nn.Module) -> Iterator[tuple[str, WeightLayer]]:
    """Name and module of each layer that subtracts the running mean of its inputs."""
    for name, module in model.named_modules():
        if isinstance(module, WeightLayer) and module.centre == "input":
            yield name, module


@torch.no_grad()
def update_input_means(
    model: nn.Module, window: float = 256.0, reduce: Callable[[Tensor], object] | None = None
) -> None:
    """Move the input means of centred layers towards what they saw since the last call; once per step.

        mu <- mu + (1 - exp(-n / window)) (mean - mu)        over the n samples of the step

    `window` counts samples. `reduce` sums a tensor over processes in place (torch.distributed.all_reduce),
    so that N processes with n/N samples each do what one does with n. Never called, the means stay at their
    calibration: the tracking-free variant.
    """
    layers = [module for _, module in centred_layers(model)]
    if not layers:
        return
    if reduce is not None:
        packed = torch.cat([torch.cat([m.input_sum, m.input_count.view(1)]) for m in layers])
        reduce(packed)
        parts = packed.split([m.input_sum.numel() + 1 for m in layers])
        for module, part in zip(layers, parts, strict=True):
            module.input_sum.copy_(part[:-1])
            module.input_count.copy_(part[-1])
    for module in layers:
        share = 1 - torch.exp(-module.input_count / window)
        mean = module.input_sum / module.input_count.clamp_min(1)
        module.input_mean += share * (mean - module.input_mean)
        module.input_sum.zero_()
        module.input_count.zero_()


def anneal(model: nn.Module, progress: float) -> None:
    """Tell every layer that changes with training (a method `anneal`) that a share `progress` in [0, 1] is done."""
    for module in model.modules():
        if callable(move := getattr(module, "anneal", None)):
            move(progress)
