"""Schedules of the learning rate within a stage. Standard library only.

A schedule maps the share of the stage that is done, t in [0, 1), to a factor on the peak rate. Step s of S
has t = s/S, so the last step runs at t = 1 - 1/S: above zero, no dead last epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


def linear(t: float, milestones: Sequence[float], gamma: float) -> float:
    """1 - t"""
    return 1 - t


def cosine(t: float, milestones: Sequence[float], gamma: float) -> float:
    """(1 + cos(pi t)) / 2"""
    return (1 + math.cos(math.pi * t)) / 2


def step(t: float, milestones: Sequence[float], gamma: float) -> float:
    """gamma to the power of how many milestones have passed"""
    return gamma ** sum(t >= m for m in milestones)


def constant(t: float, milestones: Sequence[float], gamma: float) -> float:
    """1"""
    return 1.0


SCHEDULES: dict[str, Callable[[float, Sequence[float], float], float]] = {
    "linear": linear,
    "cosine": cosine,
    "step": step,
    "constant": constant,
}


def lr_factor(
    name: str,
    step: int,
    steps: int,
    *,
    before: int = 0,
    warmup_steps: int = 0,
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
) -> float:
    """Factor on the peak rate at optimiser step `step` (from 0) of a stage, times a linear ramp at its start.

    `steps`: those of the whole course, of which `before` came in earlier stages (0 where each stage has its own).
    The ramp is (step + 1) / warmup_steps, cut at 1: the first step already moves.
    """
    ramp = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return ramp * SCHEDULES[name]((before + step) / steps, milestones, gamma)
