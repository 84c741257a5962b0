"""Setting the constants of layers: from data, and by how far training is.

Imports torch, bnnfree.errors and bnnfree.nn only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from bnnfree.nn.norms import GhostBatchNorm2d
from bnnfree.nn.standard import WeightLayer, sum_of_sample_means


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor, keep: Collection[str] = ()) -> None:
    """Set every constant that comes from data, layer by layer, in one forward pass of `images`.

    Each layer sees inputs made by the layers before it with their constants already set: the input means
    of centred layers, output means and deviations, and beta of blocks in mode "measured". Parameters stay
    as they are. Call it on the bare model (not the compiled one), before training or at a stage's start.

    keep: names of layers that stay as they are, such as those that started from weights.

    Shapes: images [N, C, H, W], normalised as in training; a few hundred samples suffice.
    """
    changing = [module for name, module in model.named_modules() if name not in keep]
    parts = [module for module in changing if hasattr(module, "calibrating")]
    with _evaluating(model):
        try:
            for part in parts:
                part.calibrating = True  # type: ignore[assignment]
            model(images)
        finally:
            for part in parts:
                part.calibrating = False  # type: ignore[assignment]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def rescaled_layers(model: nn.Module) -> Iterator[tuple[str, WeightLayer]]:
    """Name and module of each layer whose constant deviation has a gain beside it, that can make up for another.

    Not those whose gain is frozen (requires no gradient).
    """
    for name, module in model.named_modules():
        if isinstance(module, WeightLayer) and module.unit_output and module.gain is not None:
            if module.gain.requires_grad:
                yield name, module


@torch.no_grad()
def measure_deviations(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """{layer: [O]}: what `output_std` would be after a calibration with `images`, of `rescaled_layers`.

    The model stays as it is. Shapes of images: [N, C, H, W].
    """
    found: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda layer, args: found.update({name: layer.output_moments(args[0])[0]})

    hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in rescaled_layers(model)]
    try:
        with _evaluating(model):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def rescale(model: nn.Module, deviations: Mapping[str, Tensor]) -> list[tuple[nn.Parameter, Tensor]]:
    """Give layers the constant deviations that `measure_deviations` found; the network's function stays the same.

        g <- g r,  sd <- sd r,  r = deviation / sd           so g / sd, by which the output is multiplied, stays

    What is centred by stays too. So the gain's gradient is divided by r, and a step of the same size moves the
    function by another amount: as after a calibration of today's network. Returns: each gain and its r [O].
    """
    scaled: list[tuple[nn.Parameter, Tensor]] = []
    for name, deviation in deviations.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, WeightLayer) and layer.gain is not None
        ratio = deviation / layer.output_std
        layer.gain.mul_(ratio)
        layer.output_std.copy_(deviation)
        scaled.append((layer.gain, ratio))
    return scaled


@torch.no_grad()
def settle(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set what was averaged along the way to the plain mean over these batches, weights as they are.

    These are the running statistics of all nn.BatchNorm2d, which normalise by each batch's own meanwhile, and the input
    means of centred layers, which are those of the batches so far. Why: at momentum 0.1 the former are of some ten
    batches, the latter of two, and a network loses up to two points by that (recipes/NOTES.md, sections 4 and 7). All
    else runs as in evaluation, batch renormalisation and its like too, which train with their statistics. Training
    that goes on needs what was before: see `settled`. Shapes: batches of [N, C, H, W].
    """
    norms = _plain_norms(model)
    momenta = [norm.momentum for norm in norms]
    sums = {layer: torch.zeros_like(layer.input_mean) for _, layer in centred_layers(model)}

    def add(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        sums[layer] += sum_of_sample_means(args[0])  # type: ignore[index]

    if not norms and not sums:
        return  # and no batch is read
    hooks, samples = [layer.register_forward_pre_hook(add) for layer in sums], 0
    with _evaluating(model):
        try:
            for norm in norms:
                norm.train().reset_running_stats()
                norm.momentum = None  # torch: the mean over all batches
            for images in batches:
                model(images)
                samples += len(images)
                for layer, total in sums.items():
                    layer.input_mean.copy_(total / samples)
        finally:
            for hook in hooks:
                hook.remove()
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


@contextmanager
def settled(model: nn.Module, batches: Iterable[Tensor]) -> Iterator[None]:
    """Within it the model is settled (`settle`); afterwards all is as it was, for training to go on."""
    buffers = [layer.input_mean for _, layer in centred_layers(model)]
    buffers += [buffer for norm in _plain_norms(model) for buffer in norm.buffers()]
    kept = [buffer.clone() for buffer in buffers]
    settle(model, batches)
    try:
        yield
    finally:
        for buffer, old in zip(buffers, kept, strict=True):
            buffer.copy_(old)


def _plain_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    """Those that keep statistics and do not train by them."""
    kinds = (nn.BatchNorm2d, GhostBatchNorm2d)
    return [norm for norm in model.modules() if isinstance(norm, nn.BatchNorm2d) and type(norm) in kinds]


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
    so that N processes with n/N samples each do what one does with n. For a DistributedDataParallel it is the sum over
    its processes, if none is given; of any other module the caller knows whether there are others.
    Never called, the means stay at their calibration: the tracking-free variant. So do those of layers of which no
    parameter requires a gradient: they are frozen.
    """
    layers = []
    for _, module in centred_layers(model):
        if any(param.requires_grad for param in module.parameters()):
            layers.append(module)
        else:
            module.input_sum.zero_()
            module.input_count.zero_()
    if not layers:
        return
    if reduce is None and isinstance(model, DistributedDataParallel):
        reduce = partial(distributed.all_reduce, group=model.process_group)
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
