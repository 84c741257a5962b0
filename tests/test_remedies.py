"""Options of a recipe for networks without batch norm, all together: each off by default, and resumed to the bit."""

import copy

import pytest
from helpers import assert_same, tiny, train
from test_resume import check_cut

from bnnfree.errors import BnnfreeError
from bnnfree.recipe.read import RecipeError
from bnnfree.train import load_checkpoint
from bnnfree.train.checkpoint import save_checkpoint

ALL = ("free.recalibrate=3", "model.centre_head=true", "ema.decay=0.9", "accumulate=2", "settle=40")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run with every option that was never stopped."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    train(folder, *ALL)
    return folder


@pytest.mark.sample(3)
@pytest.mark.parametrize("step", [2, 4, 5, 8])  # 6 steps a stage: before 2, 4 and 5 it rescales
def test_a_run_with_every_option_that_is_cut_resumes_to_the_same_bits(tmp_path, monkeypatch, unbroken, step):
    check_cut(tmp_path / "cut", unbroken, monkeypatch, step, ALL)


def test_a_checkpoint_from_before_there_were_these_keys_goes_on(tmp_path):
    train(tmp_path, "stages=[{epochs: 1}]")
    state = load_checkpoint(tmp_path / "last.pt")
    whole = copy.deepcopy(state)
    recipe = state["recipe"]
    for section, key in (("free", "recalibrate"), ("schedule", "over"), ("data", "burst")):
        del recipe[section][key]
    save_checkpoint(tmp_path / "last.pt", state)
    train(tmp_path, "stages=[{epochs: 1}]", resume=True)
    assert_same(load_checkpoint(tmp_path / "last.pt")["model"], whole["model"])
    with pytest.raises(BnnfreeError, match=r"free\.recalibrate \(9000 -> 5\)"):
        train(tmp_path, "stages=[{epochs: 1}]", "free.recalibrate=5", resume=True)


def test_a_value_out_of_range_is_refused():
    with pytest.raises(RecipeError, match="greater than or equal to 0"):
        tiny("free.recalibrate=-1")
