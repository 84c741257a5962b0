"""Speed and memory of training: contenders that take whole training steps in turns.

A step is what training does between two batches: taking a ready batch, forward with loss, backward, AGC, optimiser
and what follows it. A shared machine disturbs all contenders evenly when they take turns, so what counts is the
median over rounds, and of a comparison the median of the rounds' own ratios. Nothing here prints.
Imports torch, numpy and its own room, bnnfree.analysis for the released step; the models come from the caller.
"""

from __future__ import annotations

import gc
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from bnnfree.analysis.memory import saved_per_image
from bnnfree.analysis.plain import clip_gradients, move_input_means, two_group_adam
from bnnfree.bench.process_memory import peak_resident, resident
from bnnfree.data.datasets import Data
from bnnfree.data.pixel_split import Split
from bnnfree.errors import BnnfreeError
from bnnfree.recipe.resolve import Resolved, resolve
from bnnfree.recipe.schema import Recipe
from bnnfree.train.checkpoint import Builders, build_model
from bnnfree.train.dist import Dist
from bnnfree.train.loop import Stage
from bnnfree.train.losses import LOSSES
from bnnfree.train.process_settings import settings

PARTS = ("data", "forward", "backward", "agc", "optimizer")
TURN = 0.1  # seconds that the counted steps of one turn take, about
ADAM_BYTES = 40  # a float32 parameter: read in both passes, gradient written, Adam reads 4 and writes 3 numbers

Group = list[tuple[Tensor, Tensor]]


class Clock:
    """Seconds that each part of one step takes. On a GPU parts end in events on its stream, and no step waits."""

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list[tuple[str, Any]] = [("", self._now())]

    def done(self, part: str) -> None:
        """Set a mark: the time since the last one was spent on `part`."""
        self.marks.append((part, self._now()))

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def parts(self) -> dict[str, float]:
        """Seconds by part, all of a step's passes together. On a GPU: once the device is idle."""
        seconds = dict.fromkeys(PARTS, 0.0)
        for (_, before), (part, after) in itertools.pairwise(self.marks):
            cuda = self.device.type == "cuda"
            seconds[part] += before.elapsed_time(after) / 1e3 if cuda else after - before
        return seconds


class Contender(Protocol):
    """A contender in the training benchmark. `net`: the network as it runs, or compiled; precision as in a recipe."""

    net: nn.Module
    precision: str
    deterministic: bool

    def step(self, group: Group, clock: Clock) -> None:
        """One optimiser step from these batches; `clock` is told when each part is done."""


class _TimedStage(Stage):
    clock: Clock | None = None

    def part_done(self, part: str) -> None:
        if self.clock is not None:
            self.clock.done(part)


class StageContender:
    """A stage of a recipe, stepped as bnnfree.train.fit steps it."""

    def __init__(
        self,
        recipe: Recipe,
        builders: Builders,
        data: Data,
        device: torch.device,
        *,
        index: int = -1,
        binarize: str | None = None,
    ):
        """Stage `index` of the recipe; `binarize` instead of what that stage makes 1 bit."""
        index %= len(recipe.stages)
        recipe = resolve(recipe, data_info(data))
        torch.manual_seed(recipe.seed)
        model = build_model(recipe, builders, data_info(data), binarize or recipe.stages[index].binarize)
        # one batch sets the constants: their values cost no time
        free = recipe.free.model_copy(update={"calibration": min(recipe.free.calibration, recipe.data.batch_size)})
        self.stage = _TimedStage(recipe.model_copy(update={"free": free}), index, model, data, Dist(0, 1, device))
        self.stage.calibrate()
        self.stage.model.train()
        self.net, self.precision, self.deterministic = self.stage.compiled, recipe.precision, recipe.deterministic

    def step(self, group: Group, clock: Clock) -> None:
        self.stage.clock = clock
        self.stage._take_step(group)
        self.stage.step += 1
        if self.stage.step == self.stage.steps:
            self.stage.step, self.stage.epoch = 0, (self.stage.epoch + 1) % self.stage.epochs


class ReleasedContender:
    """A network trained by the step of the released code: AGC tensor by tensor, Adam of two groups, memory order NCHW.

    Without what that code does beside: it waits for loss and accuracy after each step, and prints.
    """

    def __init__(
        self,
        net: nn.Module,
        recipe: Resolved,
        device: torch.device,
        *,
        unclipped: Iterable[Tensor] = (),
        clip: Callable[[list[Tensor], float], object] = clip_gradients,
        index: int = -1,
        compiled: bool = False,
    ):
        """`unclipped`: parameters of the classifier, left out by AGC; `clip(parameters, factor)`: AGC itself."""
        options, stage = recipe.optimizer, recipe.stages[index]
        decay = options.weight_decay if stage.weight_decay is None else stage.weight_decay
        self.recipe, self.device, self.clip = recipe, device, clip
        self.model = net.to(device).train()
        self.optimizer = two_group_adam(self.model, stage.lr or options.lr, decay)
        left_out = set(unclipped)
        self.clipped: list[Tensor] = [p for p in self.model.parameters() if p not in left_out]
        self.net = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.precision, self.deterministic = recipe.precision, False

    def step(self, group: Group, clock: Clock) -> None:
        recipe = self.recipe
        for images, labels in group:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision != "fp32"):
                logits = self.net(images.contiguous())
            loss = LOSSES["cross_entropy"](logits, labels, None, recipe.loss.label_smoothing)
            clock.done("forward")
            (loss / sum(len(labels) for _, labels in group)).backward()
            clock.done("backward")
        if recipe.agc.clip is not None:
            self.clip(self.clipped, recipe.agc.clip)
        clock.done("agc")
        self.optimizer.step()
        self.optimizer.zero_grad()
        if recipe.free.track:
            move_input_means(self.model, recipe.free.window)
        clock.done("optimizer")


def data_info(data: Data) -> dict[str, Any]:
    """Description of the data for a model builder: classes, channels, image_size."""
    return {"classes": list(data.classes), "channels": data.channels, "image_size": list(data.image_size)}


class Feed:
    """The training batches of a split, augmented as in training, epoch after epoch; whole ones only."""

    def __init__(self, split: Split, batch_size: int, seed: int, device: torch.device):
        if len(split) < batch_size:
            raise BnnfreeError(f"batch: got {batch_size}, expected at most the {len(split)} training images.")
        self._batches = self._endless(split, batch_size, seed, device)

    @staticmethod
    def _endless(split: Split, batch_size: int, seed: int, device) -> Iterator[tuple[Tensor, Tensor]]:
        for epoch in itertools.count():
            for images, labels in split.train_batches(batch_size, seed=seed, epoch=epoch, device=device):
                if len(images) == batch_size:
                    yield images, labels

    def take(self, count: int) -> Group:
        """The next `count` batches."""
        return list(itertools.islice(self._batches, count))


@dataclass
class Times:
    """Of one contender: seconds of a step in each round [rounds], and of its parts [rounds, len(PARTS)]."""

    steps: np.ndarray
    parts: np.ndarray

    def figures(self, images: int) -> dict[str, Any]:
        """images_per_second, step_ms (median, p10, p90, rounds), parts_ms; `images` is what a step takes."""
        low, median, high = (1e3 * np.percentile(self.steps, (10, 50, 90))).tolist()
        return {
            "images_per_second": 1e3 * images / median,
            "step_ms": {"median": median, "p10": low, "p90": high, "rounds": (1e3 * self.steps).tolist()},
            "parts_ms": dict(zip(PARTS, (1e3 * np.median(self.parts, axis=0)).tolist(), strict=True)),
        }


def race(
    contenders: Mapping[str, Contender], feed: Feed, device: torch.device, *, seconds: float, accumulate: int = 1
) -> dict[str, Times]:
    """Let all take steps in turns for about `seconds`, at least three rounds. Who cannot take a step raises.

    A turn's counted steps take about TURN; before short ones an uncounted step fills the caches. Each contender has
    its own setting of torch's deterministic algorithms; what was set before is set again at the end.
    """
    with settings(False):
        counts = {}
        for name, contender in contenders.items():
            taken, _ = _turn(contender, feed, device, accumulate, 1)
            counts[name] = min(100, max(1, round(TURN / max(taken, 1e-6))))
        times: dict[str, list] = {name: [] for name in contenders}
        end, names, rounds = time.perf_counter() + seconds, list(contenders), 0
        while rounds < 3 or time.perf_counter() < end:
            for name in names:
                if counts[name] > 1:
                    _turn(contenders[name], feed, device, accumulate, 1)
                times[name].append(_turn(contenders[name], feed, device, accumulate, counts[name]))
            names = names[1:] + names[:1]  # nobody always follows the same one
            rounds += 1
    return {
        name: Times(np.array([step for step, _ in turns]), np.array([parts for _, parts in turns]))
        for name, turns in times.items()
    }


def warm_up(contender: Contender, feed: Feed, device: torch.device, accumulate: int = 1, steps: int = 2) -> None:
    """Steps that nobody counts: compilers run, optimisers get their state."""
    with settings(False):
        _turn(contender, feed, device, accumulate, steps)


def _turn(contender: Contender, feed: Feed, device, accumulate: int, steps: int) -> tuple[float, list[float]]:
    """(seconds of a step, seconds of its parts), the mean of `steps` steps."""
    if contender.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(contender.deterministic)
    clocks = []
    _wait(device)
    start = time.perf_counter()
    for _ in range(steps):
        clock = Clock(device)
        group = feed.take(accumulate)
        clock.done("data")
        contender.step(group, clock)
        clocks.append(clock)
    _wait(device)
    taken = (time.perf_counter() - start) / steps
    rows = [list(clock.parts().values()) for clock in clocks]
    return taken, np.mean(rows, axis=0).tolist()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def ratios(times: Mapping[str, Times], base: str = "ours") -> dict[str, float]:
    """Of every other contender the median over rounds of (its step / the base's): above 1 where the base is faster."""
    own = times[base].steps
    return {name: float(np.median(other.steps / own)) for name, other in times.items() if name != base}


# -- memory


def held(make: Callable[[], Contender], feed: Feed, data: Data, device: torch.device, batch: int) -> dict[str, float]:
    """Memory of a contender that is alone in this process.

    peak_memory_bytes       growth of the process from before `make` to the peak of two steps, after one that is not
                            counted (where the system forgets old peaks; a compiler's own memory stays in it); of a GPU
                            the most that was allocated
    saved_bytes_per_image   what autograd keeps for the backward pass and grows with the batch
    saved_bytes_fixed       what it keeps and does not
    """
    gc.collect()  # what is over, and free already, goes now: else it would go while the contender is measured
    with settings(False):
        pass  # gives memory back on leaving
    start = resident()
    contender = make()
    warm_up(contender, feed, device, steps=1)
    _forget_peak(device)
    warm_up(contender, feed, device)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_resident() - start
    shape = (data.channels, *data.image_size)
    sizes = (batch // 2, batch) if batch >= 4 else (batch, 2 * batch)
    with torch.autocast(device.type, torch.bfloat16, enabled=contender.precision != "fp32"):
        each, fixed = saved_per_image(contender.net, shape, len(data.classes), *sizes)
    return {"peak_memory_bytes": peak, "saved_bytes_per_image": each, "saved_bytes_fixed": fixed}


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    forget = Path("/proc/self/clear_refs")
    if forget.exists():
        try:
            forget.write_text("5")
        except OSError:  # some containers forbid it: the peak then is that of the first step too
            pass


# -- what the device could do


def roofline(device: torch.device) -> dict[str, float]:
    """copy_bytes_per_second (read and written, a large copy), matmul_flops_per_second (a large product, bfloat16 or,
    where that is faster, as on a CPU that only emulates bfloat16, float32).

    The best of five, on as many threads as torch has.
    """
    cuda = device.type == "cuda"
    source = torch.empty((1 << 28) if cuda else (1 << 24), device=device).fill_(1.0)
    target = torch.empty_like(source)

    def product(dtype: torch.dtype, side: int) -> float:
        square = torch.ones(side, side, dtype=dtype, device=device)
        return 2 * side**3 / _best(lambda: square @ square, device)

    dtypes = (torch.bfloat16,) if cuda else (torch.bfloat16, torch.float32)
    return {
        "copy_bytes_per_second": 2 * source.nbytes / _best(lambda: target.copy_(source), device),
        "matmul_flops_per_second": product(max(dtypes, key=lambda dtype: product(dtype, 256)), 8192 if cuda else 1024),
    }


def _best(call: Callable[[], object], device: torch.device) -> float:
    call()
    taken = []
    for _ in range(5):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        taken.append(time.perf_counter() - start)
    return min(taken)


def shares(
    step: float, images: int, macs: int, parameters: int, saved: Mapping[str, float] | None, peak: Mapping[str, float]
) -> dict[str, float]:
    """Shares (0 to 1) of the device's peak rates that a step of `step` seconds reaches.

    matmul_share     6 flops per multiply-accumulate of one image's forward pass (`macs`), two forward and four
                     backward, over the product's speed
    bandwidth_share  the bytes that must move, over the copy's: saved ones written and read, ADAM_BYTES a parameter
    """
    found = {"matmul_share": 6 * macs * images / step / peak["matmul_flops_per_second"]}
    if saved is not None:
        kept = saved["saved_bytes_fixed"] + images * saved["saved_bytes_per_image"]
        found["bandwidth_share"] = (2 * kept + ADAM_BYTES * parameters) / step / peak["copy_bytes_per_second"]
    return found
