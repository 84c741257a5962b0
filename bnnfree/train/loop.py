"""One stage of training: the network, what moves it, one epoch of it. Prints nothing.

Imports torch, bnnfree.nn, bnnfree.optim, bnnfree.analysis and its own room; never models, export, engine.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bnnfree.analysis.probe import Prober
from bnnfree.data.datasets import Data
from bnnfree.errors import BnnfreeError, CheckpointError
from bnnfree.nn import (
    BinaryConv2d,
    BinaryLinear,
    anneal,
    calibrate,
    measure_deviations,
    rescale,
    rescaled_layers,
    settled,
    update_input_means,
)
from bnnfree.nn.fused import Shared, choose_speed
from bnnfree.optim import (
    AGC_EPS,
    ClipRate,
    Precondition,
    adaptive_grad_clip,
    make_optimizer,
    parameter_groups,
    rescale_moments,
)
from bnnfree.recipe.resolve import Resolved
from bnnfree.train.checkpoint import load_weights
from bnnfree.train.dist import Dist, data_parallel
from bnnfree.train.losses import LOSSES, main_class
from bnnfree.train.passes import Passes
from bnnfree.train.schedule import lr_factor
from bnnfree.train.start import freeze

OPTIMIZER_OPTIONS = ("betas", "eps", "momentum", "nesterov", "bop_gamma", "bop_threshold")
PROBED_IMAGES = 64  # the first of the run's first epoch, augmented as there, the same in every probe
RESCALING_IMAGES = 128  # a deviation that is some percent off is as good a unit for a gain


class TrainingError(BnnfreeError):
    """Training cannot go on: the loss is not finite."""


class Stage:
    """A stage of a recipe in progress: model, average, optimisers, and the sums of the running epoch.

    index, epoch, step   the stage's number, the epoch within it, the optimiser steps done within that
    first_epoch          epochs of the stages before: with `epoch` it decides order and augmentation

    A step is `recipe.accumulate` forward passes of `data.batch_size` samples over all processes, one
    backward each, the preconditioner, AGC, the optimisers, the running means of centred layers, and the
    weights' average.
    """

    def __init__(self, recipe: Resolved, index: int, model: nn.Module, data: Data, dist: Dist, teacher=None, kept=()):
        self.recipe, self.index, self.data, self.dist, self.teacher = recipe, index, data, dist, teacher
        self.kept = kept  # names of layers whose constants hold from before: calibration leaves them
        self.epoch, self.step = 0, 0
        self.epochs = recipe.stages[index].epochs
        self.first_epoch = sum(stage.epochs for stage in recipe.stages[:index])
        passes = data.train.train_steps(recipe.data.batch_size, dist.world)
        self.steps = math.ceil(passes / recipe.accumulate)
        self.model = model.to(dist.device).to(memory_format=torch.channels_last)
        self.frozen = freeze(self.model, recipe.freeze)
        self.average = copy.deepcopy(self.model).eval() if recipe.ema.decay else None
        self.optimizers = self._make_optimizers()
        self.net: nn.Module = self.model
        if dist.world > 1:  # Why before the preconditioner: it counts what it sees, and this runs blank images
            self.net = data_parallel(self.model, dist, (data.channels, *data.image_size))
        self.precondition: Precondition | None = None
        if recipe.optimizer.precondition == "bnp":
            self.precondition = Precondition(self.model, rho=recipe.optimizer.bnp_rho)
        self.passes = Passes(recipe, self.model, dist)
        self.shared = Shared() if recipe.accumulate > 1 else None
        self.speed = choose_speed(self.model, recipe.speed, dist.device, recipe.precision, self.shared)
        self.compiled = torch.compile(self.net, dynamic=False) if self.speed.compiled else self.net
        self.clip_rate = ClipRate()
        self._constant_images: Tensor | None = None  # on which deviations are measured anew
        self.prober = None if recipe.probe.every is None else Prober()
        self._probed: tuple[Tensor, Tensor, Tensor | None] | None = None  # images, labels, what the teacher says
        self._start_epoch()

    def _make_optimizers(self) -> list[torch.optim.Optimizer]:
        options, stage = self.recipe.optimizer, self.recipe.stages[self.index]
        groups = parameter_groups(
            self.model,
            lr=stage.lr or options.lr,
            weight_decay=options.weight_decay if stage.weight_decay is None else stage.weight_decay,
            affine_lr_mult=options.affine_lr_mult,
            agc=self.recipe.agc.clip is not None,
            lr_mult=options.lr_mult,
            lr_mult_name="optimizer.lr_mult",
        )
        return make_optimizer(groups, options.name, **options.model_dump(include=set(OPTIMIZER_OPTIONS)))

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all optimisers."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def evaluated(self) -> nn.Module:
        """The network whose accuracy counts: the average if there is one."""
        return self.model if self.average is None else self.average

    def calibrate(self) -> None:
        """Set the data-dependent constants from the stage's first training images, augmented as in training."""
        images = self._first_images(self.recipe.free.calibration, self.first_epoch)[0]
        calibrate(self.model, images, self.kept)
        if self.average is not None:
            self.average.load_state_dict(self.model.state_dict())

    def settled(self) -> AbstractContextManager[None]:
        """Within it what is evaluated has means and variances of the first images of the epoch to come."""
        recipe = self.recipe
        if not recipe.settle:
            return nullcontext()
        how = {"seed": recipe.seed, "epoch": self.first_epoch + self.epoch, "device": self.dist.device}
        batches = self.data.train.settling_batches(recipe.settle, recipe.data.batch_size, **how)
        return settled(self.evaluated, batches)

    def _rescales_before(self, done: int) -> bool:
        """Have the samples of `done` steps of the stage just reached a multiple of `free.recalibrate`?"""
        every, samples = self.recipe.free.recalibrate, self.recipe.data.batch_size * self.recipe.accumulate
        return every > 0 and done * samples // every > max(done - 1, 0) * samples // every

    def _rescale(self) -> None:
        """Measure the constant deviations again on images of the stage's calibration; gains make up for it."""
        deviations = {name: torch.zeros_like(layer.output_std) for name, layer in rescaled_layers(self.model)}
        if not deviations:
            return
        if self.dist.main:  # for all: gains are no buffers that are made equal later
            if self._constant_images is None:  # kept: to read a data stream's first images takes long
                wanted = min(self.recipe.free.calibration, RESCALING_IMAGES)
                self._constant_images = self._first_images(wanted, self.first_epoch)[0]
            deviations = measure_deviations(self.model, self._constant_images)
        for name in sorted(deviations):
            self.dist.sum_(deviations[name])
        # Why the average too: its gains and deviations move apart, and their ratio is not the ratios' average
        if self.average is not None:
            rescale(self.average, deviations)
        rescale_moments(self.optimizers, rescale(self.model, deviations))

    def _first_images(self, wanted: int, epoch: int) -> tuple[Tensor, Tensor]:
        """The first `wanted` training images of an epoch and their labels, of all processes together."""
        recipe = self.recipe
        how = {"seed": recipe.seed, "epoch": epoch, "device": self.dist.device}
        parts = self.data.train.first_batches(wanted, recipe.data.batch_size, **how)
        images, labels = (torch.cat(each)[:wanted] for each in zip(*parts, strict=True))
        return images, labels

    def _start_epoch(self) -> None:
        self.step = 0
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.dist.device)  # loss, correct, samples
        self.clip_rate.reset()
        self.signs = {name: m.weight.detach() >= 0 for name, m in self._binary_layers()}

    def _binary_layers(self):
        for name, module in self.model.named_modules():
            if isinstance(module, BinaryConv2d | BinaryLinear) and module.binary:
                yield name, module

    def train_epoch(self, after_step: Callable[[], None]) -> dict[str, Any]:
        """Train what is left of the epoch; `after_step` is called after each optimiser step. Returns its metrics."""
        self.model.train()
        for module in self.frozen:
            module.eval()  # statistics of a frozen batch norm are its own
        recipe = self.recipe
        batches = self.data.train.train_batches(
            recipe.data.batch_size,
            seed=recipe.seed,
            epoch=self.first_epoch + self.epoch,
            start=self.step * recipe.accumulate,
            rank=self.dist.rank,
            world=self.dist.world,
            device=self.dist.device,
        )
        if self.epoch == self.step == 0:
            self._probe()
        while self.step < self.steps:
            lr = self._take_step(list(itertools.islice(batches, recipe.accumulate)))
            self.step += 1
            self._probe()
            if self.step % 50 == 0 or self.step == self.steps or self.dist.device.type == "cpu":
                self._check_finite()
            after_step()
        loss, correct, samples = self.dist.sum_(self.sums.clone()).tolist()
        metrics = {
            "stage": recipe.stages[self.index].name,
            "epoch": self.first_epoch + self.epoch + 1,
            "loss": loss / samples,
            "top1": 100 * correct / samples,
            "lr": lr,
            "flips": self._flips(),
            "agc_rate": self.clip_rate.mean(),
        }
        if self.prober is not None and self.dist.main:
            metrics["probe"] = self.prober.take()
        self.epoch += 1
        self._start_epoch()
        return metrics

    def _take_step(self, group: list[tuple[Tensor, Tensor]]) -> float:
        recipe, done = self.recipe, self.epoch * self.steps + self.step
        total_steps = self.epochs * self.steps
        factor = lr_factor(step=done, **self._course())
        for param_group in self.groups:
            param_group["lr"] = factor * param_group["initial_lr"]
        anneal(self.model, done / total_steps)
        if self._rescales_before(done):
            self._rescale()
        passes, samples = self.passes.of_step(group)
        for i, each in enumerate(passes):
            self.passes.begin(each, first=i == 0)
            with nullcontext() if i == len(passes) - 1 else self._gradients_apart():
                self._backward(each.images, each.labels, samples)
        self.passes.begin(None)
        if self.precondition is not None:
            self.precondition.step(self.dist.sum_)
        if recipe.agc.clip is not None:
            rates = adaptive_grad_clip(self.groups, recipe.agc.clip)
            self.clip_rate.update(self.groups, rates)
        self.part_done("agc")
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if recipe.free.track:
            update_input_means(self.model, recipe.free.window, self.dist.sum_)
        if self.shared is not None:
            self.shared.forget()
        if self.average is not None:
            self._move_average()
        self.part_done("optimizer")
        return factor * (recipe.stages[self.index].lr or recipe.optimizer.lr)

    def next_lr(self) -> float:
        """The learning rate of the step to come, of parameters without a factor on it."""
        return self._lr_at(self.epoch * self.steps + self.step)

    def last_lr(self) -> float:
        """That of the stage's last step."""
        return self._lr_at(self.epochs * self.steps - 1)

    def _lr_at(self, step: int) -> float:
        return (self.recipe.stages[self.index].lr or self.recipe.optimizer.lr) * lr_factor(step=step, **self._course())

    def _course(self) -> dict[str, Any]:
        """Arguments of `lr_factor` beside the step: the schedule, and the steps that it spans."""
        schedule, before, epochs = self.recipe.schedule, 0, self.epochs
        if schedule.over == "run":
            before, epochs = self.first_epoch, sum(stage.epochs for stage in self.recipe.stages)
        span = {"before": before * self.steps, "steps": epochs * self.steps}
        return span | schedule.model_dump(exclude={"over"})

    def _gradients_apart(self) -> AbstractContextManager:
        """Processes sum their gradients in the last backward pass of a step only; the others are within this."""
        return self.net.no_sync() if isinstance(self.net, DistributedDataParallel) else nullcontext()

    def _backward(self, images: Tensor, labels: Tensor, samples: Tensor) -> None:
        """A pass and its gradients; images without a label, which come first, have no loss."""
        recipe, own = self.recipe, slice(len(images) - len(labels), None)
        # a pass of another size would be compiled anew: an epoch's last one runs as it is
        net = self.compiled if len(images) in self.passes.usual_sizes() else self.net
        with torch.autocast(self.dist.device.type, torch.bfloat16, enabled=recipe.precision != "fp32"):
            logits = net(images)[own]
            with torch.no_grad():
                taught = self.teacher(images[own]) if self.teacher is not None and len(labels) else None
        if len(labels):
            loss = LOSSES[recipe.loss.name](logits, labels, taught, recipe.loss.label_smoothing)
        else:  # of none, but a pass backwards
            loss = logits.sum()
        self.part_done("forward")
        (loss * (self.dist.world / samples)).backward()
        with torch.no_grad():
            self.sums[0] += loss
            self.sums[1] += (logits.argmax(1) == main_class(labels)).sum()
            self.sums[2] += len(labels)
        self.part_done("backward")

    def part_done(self, part: str) -> None:
        """Called when a step is done with `part`: forward, backward (of each pass), agc, optimizer. Nothing here.

        forward has the loss in it, agc the preconditioner, optimizer what follows it. Who times steps overrides it.
        """

    def _probe(self) -> None:
        """Measure the binary layers, if it is time, in the main process; an error is one of all processes."""
        done, every = self.epoch * self.steps + self.step, self.recipe.probe.every
        if every is not None and done % every == 0:
            self.dist.together(self._measure if self.dist.main else lambda: None)

    def _measure(self) -> None:
        recipe = self.recipe
        assert self.prober is not None
        if self._probed is None:
            images, labels = self._first_images(PROBED_IMAGES, 0)
            with torch.no_grad():
                self._probed = images, labels, None if self.teacher is None else self.teacher(images)
        images, labels, taught = self._probed

        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            return LOSSES[recipe.loss.name](logits, labels, taught, recipe.loss.label_smoothing) / len(labels)

        agc = None if recipe.agc.clip is None else (recipe.agc.clip, AGC_EPS)
        step = (self.first_epoch + self.epoch) * self.steps + self.step
        self.prober.measure(self.model, step, images, labels, loss=loss, agc=agc)

    def _move_average(self) -> None:
        assert self.average is not None and self.recipe.ema.decay is not None
        old, new = self.average.state_dict(), self.model.state_dict()
        moving = [k for k in old if old[k].is_floating_point()]
        share = 1 - self.recipe.ema.decay
        torch._foreach_lerp_([old[k] for k in moving], [new[k] for k in moving], share)
        for k in old:
            if not old[k].is_floating_point():
                old[k].copy_(new[k])

    def _flips(self) -> dict[str, float]:
        """Share of each layer's weights whose sign is another than at the start of the epoch."""
        layers = list(self._binary_layers())
        changed = [((m.weight.detach() >= 0) != self.signs[name]).float().mean() for name, m in layers]
        values = torch.stack(changed).tolist() if changed else []
        return dict(zip((name for name, _ in layers), values, strict=True))

    def _check_finite(self) -> None:
        if not torch.isfinite(self.sums[0]):
            raise TrainingError(
                f"stage {self.index} epoch {self.epoch + 1}, at step {self.step} of {self.steps}: the loss is not "
                "finite. A lower optimizer.lr, a warm-up (schedule.warmup_steps) or agc.clip=0.02 may help."
            )

    def state(self) -> dict[str, Any]:
        """All that `load` needs to go on as if nothing had happened."""
        return {
            "stage": self.index,
            "epoch": self.epoch,
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": None if self.average is None else self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "precondition": None if self.precondition is None else self.precondition.state_dict(),
            "sums": self.sums,
            "clip_rate": self.clip_rate.state_dict(),
            "signs": self.signs,
            "recent": self.passes.recent,
            "probe": None if self.prober is None else self.prober.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go back to where `state` was taken."""
        self.epoch, self.step = state["epoch"], state["step"]
        if self.epoch > self.epochs or self.step >= self.steps:
            at, allowed = f"epoch {self.epoch}, step {self.step}", f"at most {self.epochs}, below {self.steps}"
            raise CheckpointError(f"the checkpoint: got {at}, expected {allowed}. Have images been removed since?")
        load_weights(self.model, state["model"], "the checkpoint's model")
        if self.average is not None:
            load_weights(self.average, state["ema"], "the checkpoint's average")
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.precondition is not None:
            self.precondition.load_state_dict(state["precondition"])
        self.sums = state["sums"].to(self.dist.device)
        self.passes.recent = [images.to(self.dist.device) for images in state.get("recent", [])]
        self.clip_rate.load_state_dict(state["clip_rate"])
        if self.prober is not None:
            self.prober.load_state_dict(state["probe"])
        self.signs = {name: signs.to(self.dist.device) for name, signs in state["signs"].items()}
