"""A run without its consequences: two steps on fake data, and what the whole would take. Writes no files.

Imports torch and its own room.
"""

from __future__ import annotations

import math
import sys
import time

import torch

from bnnfree.data.datasets import Data, check_files, describe, load_data
from bnnfree.errors import one_line
from bnnfree.nn import BinaryConv2d, BinaryLinear
from bnnfree.optim import describe_groups
from bnnfree.recipe.resolve import Resolved, resolve
from bnnfree.recipe.schema import Recipe
from bnnfree.train import dist as processes
from bnnfree.train.checkpoint import Builders, build_model
from bnnfree.train.doubts import doubts
from bnnfree.train.loop import Stage
from bnnfree.train.process_settings import settings

STEPS = 2
GIB = 2**30


def dry_run(recipe: Recipe, builders: Builders, where: str = "data") -> str:
    """Build every stage of `recipe`, take two steps of each on noise of the data's shape, and estimate.

    Returns a text: parameter groups, seconds per step (the faster of the two, so without warming up and
    compiling), hours for the whole recipe, and the peak memory of this process or GPU. Time leaves out
    validation and reading files. Nothing is written and the data need not be there (image_folder excepted,
    whose size and classes only its folders tell).
    """
    with settings(recipe.deterministic):
        return _dry_run(recipe, builders, where)


def _dry_run(recipe: Recipe, builders: Builders, where: str) -> str:
    dist = processes.start(recipe.device)
    shape = describe(recipe.data, where)
    looked_at = check_files(recipe.data, where)
    batch = min(recipe.data.batch_size, shape["samples"])
    train_images = shape["samples"] * (1 - recipe.data.val_fraction)
    asked, passes = recipe, min(recipe.accumulate, math.ceil(train_images / batch))  # an epoch's are a step's at most
    wanted = max(STEPS * passes * batch, len(shape["classes"]))
    fake = recipe.data.model_copy(
        update={
            "name": "fake",
            "samples": wanted,
            "classes": len(shape["classes"]),
            "channels": shape["channels"],
            "image_size": shape["image_size"],
            "range": None,
            "test_fraction": None,
            "augment": [],
            "train_limit": None,
            "test_limit": None,
            "val_fraction": 0.0,
        }
    )
    data = load_data(fake)
    data_recipe = recipe.data.model_copy(update={"batch_size": batch})
    recipe = resolve(recipe.model_copy(update={"data": data_recipe, "accumulate": passes}), shape)
    lines, hours = [], 0.0
    epoch = max(1, round(train_images / (batch * recipe.accumulate)))
    for index, stage_recipe in enumerate(recipe.stages):
        seconds, text = _two_steps(recipe, index, builders, data, shape, dist)
        steps = stage_recipe.epochs * epoch
        hours += steps * seconds / 3600
        lines += [
            f"stage {index} ({stage_recipe.name}): {stage_recipe.epochs} epochs, {steps:,} steps, "
            f"{seconds:.3f} s a step, {steps * seconds / 3600:.2f} h",
            *text.splitlines(),
        ]
    h, w = shape["image_size"]
    lines.append(
        f"images {h}x{w}x{shape['channels']}, {len(shape['classes'])} classes, {train_images:,.0f} to train on"
    )
    lines += [looked_at] if looked_at else []
    lines.append(f"estimate: {hours:.2f} h on {dist.device} with {torch.get_num_threads()} threads, {_memory(dist)}")
    lines += [f"warning: {doubt}." for doubt in doubts(asked, epoch, round(shape["samples"] - train_images))]
    return "\n".join(map(one_line, lines))


def _two_steps(recipe: Resolved, index: int, builders: Builders, data: Data, shape, dist) -> tuple[float, str]:
    torch.manual_seed(recipe.seed)
    model = build_model(recipe, builders, shape, recipe.stages[index].binarize)
    teacher = None
    if recipe.loss.teacher is not None:
        # the real teacher may have to be fetched: a copy of the network stands in for its time and memory
        teacher = build_model(recipe, builders, shape).to(dist.device).eval().requires_grad_(False)
    stage = Stage(recipe, index, model, data.resized(recipe.stages[index].image_size), dist, teacher)
    stage.calibrate()
    text = describe_groups(stage.groups)
    times = [time.monotonic()]

    def tick() -> None:
        if dist.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.monotonic())

    stage.train_epoch(tick)
    binary = sum(m.weight.numel() for m in model.modules() if isinstance(m, BinaryConv2d | BinaryLinear) and m.binary)
    seconds = min(b - a for a, b in zip(times, times[1:], strict=False))
    return seconds, f"{text}\n1-bit weights: {binary:,}"


def _memory(dist) -> str:
    if dist.device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / GIB:.2f} GiB of GPU memory at the peak"
    try:
        import resource
    except ImportError:
        return "memory not known on this system"
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{peak / GIB:.2f} GiB of memory at the peak"
