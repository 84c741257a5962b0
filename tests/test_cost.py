"""Cost of watching, centring and new constants in training: ratios of medians, in turns in one process. All slow:

python -m pytest -m slow -n 0 -s tests/test_cost.py
"""

import itertools
import statistics
import time

import pytest
import torch
from helpers import ROOT

from bnnfree.data.datasets import describe, load_data
from bnnfree.models import MODELS
from bnnfree.recipe import resolve
from bnnfree.train.checkpoint import build_model
from bnnfree.train.dist import Dist
from bnnfree.train.loop import Stage
from bnnfree.train.networks import load_recipe
from bnnfree.train.process_settings import settings

SOURCE = ("data.name=fake", "data.samples=2048", "data.classes=10", "data.image_size=16", "data.augment=[]")
ROUNDS = 15

pytestmark = pytest.mark.slow


def stage_of(*options):
    """A stage of ReActNet-20 on 16x16 images, batch 128, and a function that takes a step of it."""
    recipe = load_recipe(ROOT / "recipes" / "cifar10_reactnet20.yaml", [*SOURCE, *options], MODELS)
    data = load_data(recipe.data)
    torch.manual_seed(0)
    recipe = resolve(recipe, describe(recipe.data))
    model = build_model(recipe, MODELS, describe(recipe.data), None)
    stage = Stage(recipe, 0, model, data, Dist(0, 1, torch.device("cpu")))
    stage.calibrate()
    stage.model.train()
    batches = itertools.chain.from_iterable(
        data.train.train_batches(recipe.data.batch_size, seed=0, epoch=epoch) for epoch in itertools.count()
    )
    return stage, lambda: stage._take_step(list(itertools.islice(batches, recipe.accumulate)))


def seconds(work, times=1):
    start = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - start) / times


def ratio(numerator, denominator):
    """Median over rounds of the time of the one over the other, in turns, after a round that does not count."""
    found = [seconds(numerator) / seconds(denominator, 4) for _ in range(ROUNDS + 1)][1:]
    quartiles = statistics.quantiles(found, n=4)
    print(f"{statistics.median(found):.3f} (quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f})")
    return statistics.median(found)


@pytest.mark.parametrize("norm", ["free", "free_paper", "bn"])
def test_a_probe_each_100_steps_takes_less_than_3_percent(norm):
    with settings(True):
        stage, step = stage_of(f"model.norm={norm}", "probe.every=100")
        assert ratio(stage._measure, step) < 3


def test_centring_gradients_takes_little():
    with settings(True):
        steps = [stage_of(f"model.centre_gradient={which}")[1] for which in ("true", "false")]
        assert ratio(*steps) < 1.15


def test_constants_measured_anew_each_9000_samples_take_less_than_3_percent():
    """70 steps of 128."""
    with settings(True):
        stage, step = stage_of()
        assert stage.recipe.free.recalibrate == 9000
        assert ratio(stage._rescale, step) < 0.03 * 9000 / 128
