"""A run can be cut at any step and goes on to the same bits; what it left is never overwritten."""

import pytest
from helpers import assert_same, cut_at, metrics_of, train

from bnnfree.errors import BnnfreeError, CheckpointError
from bnnfree.train import load_checkpoint

OPTIONS = ("ema.decay=0.9", "agc.clip=0.02", "accumulate=2", "optimizer.precondition=bnp")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run that was never stopped, with everything that has state: two stages, EMA, AGC, accumulation, BNP."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    train(folder, *OPTIONS)
    return folder


@pytest.mark.sample(2)
@pytest.mark.parametrize("step", [1, 4, 7, 8, 11])
def test_a_run_cut_at_any_step_resumes_to_the_same_bits(tmp_path, monkeypatch, unbroken, step):
    check_cut(tmp_path / "cut", unbroken, monkeypatch, step, OPTIONS)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "norm", ["kn", pytest.param("ic", marks=pytest.mark.slow), pytest.param("brn", marks=pytest.mark.slow)]
)
def test_so_does_one_whose_normaliser_draws_at_random_or_has_a_state(tmp_path, monkeypatch, norm):
    options = (*OPTIONS, f"model.norm={norm}")
    train(tmp_path / "unbroken", *options)
    check_cut(tmp_path / "cut", tmp_path / "unbroken", monkeypatch, 8, options)


@pytest.mark.thorough
def test_so_does_one_whose_steps_ask_images_of_those_before(tmp_path, monkeypatch):
    options = ("data.samples=60", "data.batch_size=6", "free.reference=20")
    train(tmp_path / "unbroken", *options)
    check_cut(tmp_path / "cut", tmp_path / "unbroken", monkeypatch, 8, options)


def check_cut(folder, unbroken, monkeypatch, step, options):
    """A run that is cut before its step `step` and goes on equals the unbroken one."""
    # a checkpoint after every third step or so: the cut falls between checkpoints, on one, and at an epoch's end
    with monkeypatch.context() as patch:
        cut_at(patch, step)
        with pytest.raises(KeyboardInterrupt):
            train(folder, *options, "checkpoint_minutes=0.0001")
    train(folder, *options, resume=True)
    for name in ("last.pt", "best.pt"):
        ours, theirs = load_checkpoint(folder / name), load_checkpoint(unbroken / name)
        for state in (ours, theirs):
            state["recipe"].pop("checkpoint_minutes")
        assert_same(ours, theirs)
    assert metrics_of(folder) == metrics_of(unbroken)


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    first = train(tmp_path / "r")
    before = load_checkpoint(tmp_path / "r" / "last.pt")
    again = train(tmp_path / "r", resume=True)
    assert_same(load_checkpoint(tmp_path / "r" / "last.pt"), before)
    assert first["test_top1"] == again["test_top1"]


def test_a_folder_with_a_run_is_not_overwritten(tmp_path, unbroken):
    before = (unbroken / "last.pt").read_bytes()
    with pytest.raises(BnnfreeError, match="--resume"):
        train(unbroken)
    assert (unbroken / "last.pt").read_bytes() == before


@pytest.mark.parametrize("there", [False, True], ids=["no folder", "a folder"])
def test_resuming_where_no_run_is_is_an_error(tmp_path, there):
    folder = tmp_path / "typo"
    if there:
        folder.mkdir()
    with pytest.raises(BnnfreeError, match=r"typo: holds no run to go on with\. Leave --resume out"):
        train(folder, resume=True)
    assert not folder.exists() or not any(folder.iterdir())


def test_a_run_that_was_cut_before_its_first_checkpoint_begins_anew(tmp_path, unbroken):
    folder = tmp_path / "early"
    folder.mkdir()
    (folder / "recipe.yaml").write_bytes((unbroken / "recipe.yaml").read_bytes())
    assert train(folder, *OPTIONS, "stages.0.epochs=1", "stages.1.epochs=1", resume=True)["epochs"] == 2


def test_resuming_with_another_recipe_is_an_error_that_names_the_difference(unbroken):
    before = (unbroken / "recipe.yaml").read_bytes()
    with pytest.raises(CheckpointError, match=r"differs .was -> now.: seed \(0 -> 5\)\."):
        train(unbroken, *OPTIONS, "seed=5", resume=True)
    assert (unbroken / "recipe.yaml").read_bytes() == before


def test_a_key_that_says_what_null_meant_is_no_other_recipe(tmp_path, unbroken):
    import shutil

    shutil.copytree(unbroken, tmp_path / "r")
    train(tmp_path / "r", *OPTIONS, "model.centre_head=true", "model.ste=approx", resume=True)
    with pytest.raises(CheckpointError, match=r"differs .was -> now.: model\.centre_head \(True -> False\)\."):
        train(tmp_path / "r", *OPTIONS, "model.centre_head=false", "model.ste=approx", resume=True)


def test_a_run_may_resume_with_its_data_in_another_place(tmp_path, unbroken):
    import shutil

    moved = tmp_path / "moved"
    shutil.copytree(unbroken, moved)
    elsewhere = (f"data.cache={tmp_path}", "data.workers=1", "checkpoint_minutes=9")
    train(moved, *OPTIONS, *elsewhere, resume=True)
    assert_same(load_checkpoint(moved / "best.pt"), load_checkpoint(unbroken / "best.pt"))
    with pytest.raises(CheckpointError, match=r"stages\.0\.epochs \(2 -> 3\)"):
        train(moved, *OPTIONS, "stages.0.epochs=3", resume=True)
