"""Recipes that cannot do what they say on the data at hand: a sentence for each such key. Imports its own room only."""

from __future__ import annotations

import math
from collections.abc import Iterator

from bnnfree.recipe.schema import Recipe
from bnnfree.train.schedule import lr_factor

PEAK = 0.7  # share of its peak that a learning rate should reach
MEMORY = 0.05  # share of a running average that may still be its start at the end
FEW_IMAGES = 50  # to choose the best epoch by: one of them is 2 points


def doubts(recipe: Recipe, steps: int, validation: int) -> list[str]:
    """Sentences, without their full stops, on what a training of `steps` optimiser steps an epoch will not do as set.

    validation: images to choose the best epoch by; 0 is a choice, and nothing is said of it.
    """
    found = [*_of_epochs(recipe, steps, validation)]
    for index, stage in enumerate(recipe.stages):
        where = f"stage {index} ({stage.name})"
        found += [
            *_of_schedule(recipe, stage.epochs * steps, where),
            *_of_averages(recipe, stage.epochs * steps, where),
        ]
    return found


def _of_epochs(recipe: Recipe, steps: int, validation: int) -> Iterator[str]:
    whole = steps * sum(stage.epochs for stage in recipe.stages)
    if steps == 1:
        batch, passes = recipe.data.batch_size, recipe.accumulate
        yield (
            f"data.batch_size and accumulate: got {batch} and {passes}, so that an epoch is one optimiser step and the "
            f"whole training {whole}"
        )
    if 0 < validation < FEW_IMAGES:
        yield (
            f"data.val_fraction: got {recipe.data.val_fraction}, so that {validation} images choose the best epoch, "
            f"each of them {100 / validation:.1f} points"
        )
    if recipe.probe.every is not None and recipe.probe.every > whole:
        yield f"probe.every: got {recipe.probe.every}, but the training has {whole} steps: only its start is measured"


def _of_schedule(recipe: Recipe, steps: int, where: str) -> Iterator[str]:
    schedule = recipe.schedule
    options = schedule.model_dump(exclude={"over"})  # a warm-up is a stage's in either course
    peak = max(lr_factor(step=step, steps=steps, **options) for step in range(0, steps, math.ceil(steps / 1000)))
    if schedule.warmup_steps and (peak < PEAK or schedule.warmup_steps > steps / 2):
        yield (
            f"schedule.warmup_steps: got {schedule.warmup_steps}, but {where} has {steps} steps: its learning rate "
            f"reaches {100 * peak:.1f} % of its peak"
        )
    if schedule.over == "run":
        return  # milestones are shares of all stages
    passed = [math.ceil(share * steps) for share in schedule.milestones]
    for share, at in zip(schedule.milestones, passed, strict=True):
        if at >= steps:
            yield f"schedule.milestones: {share} of the {steps} steps of {where} is after its last: it is never passed"
    if len(set(passed)) < len(passed):
        yield f"schedule.milestones: of the {steps} steps of {where} two milestones fall on one"


def _of_averages(recipe: Recipe, steps: int, where: str) -> Iterator[str]:
    averages = {
        "ema.decay": recipe.ema.decay,
        "optimizer.momentum": recipe.optimizer.momentum if recipe.optimizer.name == "sgd" else None,
        "optimizer.bnp_rho": recipe.optimizer.bnp_rho if recipe.optimizer.precondition == "bnp" else None,
    }
    for key, share in averages.items():
        if share is not None and (kept := share**steps) > MEMORY:
            yield (
                f"{key}: got {share}, but {where} has {steps} steps: {100 * kept:.0f} % of the average is still what "
                "it began with"
            )
