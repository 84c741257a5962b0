"""Recipes that cannot do what they say on their data: a sentence for each key, in training and in a dry run."""

import pytest
from helpers import tiny, train

from bnnfree.models import MODELS
from bnnfree.train.doubts import doubts
from bnnfree.train.dry import dry_run
from bnnfree.train.schedule import lr_factor

ONE = ["stages=[{epochs: 5}]"]  # of 20 steps: 100 in all


def said(*overrides, steps=20, validation=500):
    return doubts(tiny(*ONE, *overrides), steps, validation)


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (
            ["schedule.warmup_steps=1000"],
            "schedule.warmup_steps: got 1000",
            "has 100 steps: its learning rate reaches 2.6",
        ),
        (["schedule.warmup_steps=60"], "schedule.warmup_steps: got 60", "42.5 % of its peak"),
        (["schedule={name: constant, warmup_steps: 60}"], "schedule.warmup_steps: got 60", "100.0 % of its peak"),
        (["schedule={name: step, milestones: [0.1], warmup_steps: 30}"], "schedule.warmup_steps: got 30", "33.3 %"),
        (["schedule={name: step, milestones: [0.501, 0.505]}"], "schedule.milestones: of the 100 steps", "fall on one"),
        (
            ["schedule={name: step, milestones: [0.999]}"],
            "schedule.milestones: 0.999 of the 100 steps",
            "after its last",
        ),
        (["ema.decay=0.9999"], "ema.decay: got 0.9999", "99 % of the average is still what it began with"),
        (["optimizer.name=sgd", "optimizer.momentum=0.99"], "optimizer.momentum: got 0.99", "37 %"),
        (["optimizer.precondition=bnp"], "optimizer.bnp_rho: got 0.99", "37 %"),
        (["probe.every=101"], "probe.every: got 101", "has 100 steps"),
    ],
)
def test_a_key_that_the_steps_do_not_suffice_for_has_a_sentence(overrides, key, words):
    (sentence,) = said(*overrides)
    assert sentence.startswith(key) and words in sentence


def test_the_sentence_names_the_peak_that_is_reached():
    factors = [lr_factor("linear", step, 100, warmup_steps=60) for step in range(100)]
    assert f"{100 * max(factors):.1f} %" in said("schedule.warmup_steps=60")[0]


@pytest.mark.parametrize("keys", [["accumulate=1000"], ["data.batch_size=4096"]])
def test_an_epoch_of_one_step_has_a_sentence(keys):
    (sentence,) = said(*keys, "schedule.warmup_steps=0", steps=1)
    assert sentence.startswith("data.batch_size and accumulate: got ") and "whole training 5" in sentence


@pytest.mark.parametrize(("images", "share"), [(1, "100.0"), (7, "14.3"), (49, "2.0")])
def test_a_handful_of_validation_images_has_a_sentence(images, share):
    (sentence,) = said(validation=images)
    assert f"{images} images choose the best epoch, each of them {share} points" in sentence
    assert said(validation=50) == said(validation=0) == []


def test_usual_recipes_have_none():
    assert said("schedule.warmup_steps=20", "ema.decay=0.9", "optimizer.name=sgd", "probe.every=100") == []
    assert said("schedule={name: step, milestones: [0.5, 0.75]}") == []


def test_each_stage_is_looked_at():
    recipe = tiny("schedule.warmup_steps=12", "stages.0.epochs=1", "stages.1.epochs=100")
    (sentence,) = doubts(recipe, 10, 0)
    assert "stage 0 (activations) has 10 steps" in sentence


def test_a_training_and_a_dry_run_say_it(tmp_path, capsys):
    keys = ["stages=[{epochs: 1}]", "model.width=0.25", "schedule.warmup_steps=1000", "data.val_fraction=0"]
    train(tmp_path / "run", *keys)
    line = "warning: schedule.warmup_steps: got 1000, but stage 0 (train) has 5 steps: "
    assert line in capsys.readouterr().err
    assert line in dry_run(tiny(*keys), MODELS)


def test_a_dry_run_of_more_passes_than_an_epoch_has_takes_those_of_an_epoch():
    text = dry_run(tiny("stages=[{epochs: 3}]", "model.width=0.25", "accumulate=1000000"), MODELS)
    assert "3 epochs, 3 steps" in text and "warning: data.batch_size and accumulate: got 16 and 1000000" in text
