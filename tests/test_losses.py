"""Losses and schedules against their formulas, written out."""

import math

import pytest
import torch

from bnnfree import names
from bnnfree.train.evaluation import WRONG, ranks_of
from bnnfree.train.losses import LOSSES
from bnnfree.train.schedule import SCHEDULES, lr_factor


def logits(classes=5, samples=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(samples, classes, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_the_sum_of_minus_log_of_the_smoothed_target(smoothing):
    z, labels = logits(), torch.arange(7) % 5
    target = torch.full((7, 5), smoothing / 5, dtype=torch.float64)
    target[torch.arange(7), labels] += 1 - smoothing
    expected = -(target * (z - z.logsumexp(1, keepdim=True))).sum()
    got = LOSSES["cross_entropy"](z, labels, None, smoothing)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)


def test_distribution_is_the_cross_entropy_against_the_teachers_softmax_and_no_labels():
    z, teacher = logits(), logits(seed=1)
    expected = -(teacher.exp() / teacher.exp().sum(1, keepdim=True) * (z - z.logsumexp(1, keepdim=True))).sum()
    for labels in (torch.zeros(7, dtype=torch.long), torch.ones(7, dtype=torch.long)):
        got = LOSSES["distribution"](z, labels, teacher, 0.0)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)


def test_distribution_is_least_at_the_teacher():
    teacher = logits(seed=1)
    z = teacher.clone().requires_grad_()
    LOSSES["distribution"](z, torch.zeros(7, dtype=torch.long), teacher, 0.0).backward()
    assert z.grad.abs().max() < 1e-6


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 3, 100])
def test_no_step_is_dead_and_none_is_above_the_peak(name, steps):
    factors = [lr_factor(name, s, steps, milestones=(0.5,), warmup_steps=2) for s in range(steps)]
    assert all(0 < f <= 1 for f in factors)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_course_over_several_stages_is_the_one_of_a_single_stage(name):
    whole = [lr_factor(name, s, 9, milestones=(0.5,)) for s in range(9)]
    parts = [
        lr_factor(name, s, 9, before=first, milestones=(0.5,)) for first in (0, 4) for s in range(5 if first else 4)
    ]
    assert parts == whole
    assert lr_factor(name, 0, 9, before=4, warmup_steps=2, milestones=(0.5,)) == whole[4] / 2


def test_schedules_follow_their_formulas():
    steps = 8
    assert [lr_factor("linear", s, steps) for s in range(steps)] == [1 - s / 8 for s in range(8)]
    assert lr_factor("cosine", 2, steps) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert [lr_factor("step", s, steps, milestones=(0.25, 0.5), gamma=0.5) for s in range(5)] == [1, 1, 0.5, 0.5, 0.25]
    assert [lr_factor("constant", s, 4, warmup_steps=4) for s in range(4)] == [0.25, 0.5, 0.75, 1]


def test_a_rank_is_the_place_in_a_stable_order_and_nan_is_wrong():
    nan, inf = float("nan"), float("inf")
    rows = [[0.0] * 4, [inf] * 4, [-inf, -inf, 3.0, 3.0], [1.0, 2.0, 2.0, 0.0]]
    rows += [[nan, 5.0, 1.0, 0.0], [5.0, nan, 1.0, 0.0]]
    for label in range(4):
        got = ranks_of(torch.tensor(rows), torch.full((len(rows),), label)).tolist()
        for row, rank in zip(rows, got, strict=True):
            own = row[label]
            before = [math.isnan(v) or v > own or (v == own and i < label) for i, v in enumerate(row)]
            assert rank == (WRONG if math.isnan(own) else sum(before))
    constant = ranks_of(torch.zeros(10, 10), torch.arange(10))
    assert torch.equal(constant, torch.arange(10))  # top-1 of a constant: one in ten


@pytest.mark.parametrize("low", [False, True])
def test_the_first_rank_is_argmaxs(low):
    logits = torch.randint(-3, 4, (500, 7), generator=torch.Generator().manual_seed(0)).float()
    logits = logits.bfloat16().float() if low else logits
    labels = torch.arange(500) % 7
    assert torch.equal(ranks_of(logits, labels) == 0, logits.argmax(1) == labels)


def test_recipes_know_every_loss_and_schedule():
    assert list(names.LOSSES) == list(LOSSES)
    assert list(names.SCHEDULES) == list(SCHEDULES)
