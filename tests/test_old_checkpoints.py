"""Checkpoints of earlier states of `free` open, evaluate, export and go on with the meaning that they had.

tests/checkpoints/COMMIT.pt.xz is last.pt as that commit wrote it, after one epoch of digits (seconds, one thread);
figures.json holds what it gave there: logits of `images` below, accuracy and loss on the test digits.
"""

import json
import lzma

import pytest
import torch
from helpers import ROOT

from bnnfree import engine
from bnnfree.errors import CheckpointError
from bnnfree.export import export
from bnnfree.models import MODELS
from bnnfree.nn import NORMS
from bnnfree.recipe import resolve
from bnnfree.train import evaluate, fit, load_checkpoint, load_data, load_model, open_source
from bnnfree.train.checkpoint import build_model, check_fit, save_checkpoint
from bnnfree.train.dist import Dist
from bnnfree.train.meaning import V1
from bnnfree.train.networks import parse_recipe

FOLDER = ROOT / "tests" / "checkpoints"
FIGURES = json.loads((FOLDER / "figures.json").read_text())
DESIGNS = {  # commit -> what tells its state of free from the others: gradients centred, classifier centred
    "d125d4b": (False, False),
    "1fa908b": (True, False),
    "643d6c2": (True, True),
    "4999545": (True, True),
}
RECIPE = {
    "model": {"name": "reactnet20", "norm": "free", "width": 0.1},
    "data": {"name": "digits", "batch_size": 64},
    "stages": [{"epochs": 1}],
    "optimizer": {"name": "sgd", "momentum": 0.0, "lr": 0.05},
    "free": {"calibration": 64},
}


@pytest.fixture(params=DESIGNS)
def old(request, tmp_path):
    """(commit, run folder with its last.pt)."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "last.pt").write_bytes(lzma.decompress((FOLDER / f"{request.param}.pt.xz").read_bytes()))
    return request.param, folder


def images():
    return torch.linspace(-2, 2, 4 * 256).sin().mul(2).view(4, 1, 16, 16)


def resume(folder, *overrides):
    return fit(parse_recipe(RECIPE, "old.yaml", MODELS, overrides), MODELS, folder, resume=True, curves=False)


def test_it_gives_the_figures_of_its_time(old):
    commit, folder = old
    figures = FIGURES[commit]
    model, state = load_model(folder, MODELS)
    with torch.no_grad():
        torch.testing.assert_close(model(images()), torch.tensor(figures["logits"]), rtol=1e-4, atol=1e-4)
    found = evaluate(model, load_data(open_source(folder, MODELS).recipe.data).test, Dist(0, 1, torch.device("cpu")))
    assert found["top1"] == pytest.approx(figures["test_top1"], abs=0.6)  # two of 359 images, by another machine's sums
    assert found["loss"] == pytest.approx(figures["test_loss"], abs=1e-2)
    assert (state["recipe"]["model"]["centre_gradient"], state["recipe"]["model"]["centre_head"]) == DESIGNS[commit]


def test_it_exports_to_the_same_logits(old, tmp_path):
    commit, folder = old
    network = open_source(folder, MODELS)
    size = network.data["image_size"]
    pixels = torch.arange(6 * 256).mul(37).remainder(251).to(torch.uint8).view(6, 1, 16, 16)
    mean, std = (torch.tensor(network.data[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = network.model((pixels / 255 - mean) / std)
    about = {"image_size": size, "channels": 1, "mean": network.data["mean"], "std": network.data["std"]}
    export(network.model, tmp_path / "x.bnnf", **about, stem="float", head="float")
    logits = engine.load(tmp_path / "x.bnnf", backend="numpy").run(pixels.permute(0, 2, 3, 1).contiguous().numpy())
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-3, atol=1e-3)


def test_it_goes_on_as_what_it_was(old):
    commit, folder = old
    overrides = ["stages.0.epochs=2"]
    with pytest.raises(CheckpointError, match=r"free\.group \(0 -> 32\)"):
        resume(folder, *overrides)  # a pass was centred as a whole
    overrides += ["free.group=0"]
    if not DESIGNS[commit][0] or not DESIGNS[commit][1]:  # before free.recalibrate, and for the first free.reference
        with pytest.raises(CheckpointError, match=r"free\.recalibrate \(0 -> 9000\)"):
            resume(folder, *overrides)
        overrides += ["free.recalibrate=0", "free.reference=0"]
    assert resume(folder, *overrides)["epochs"] == 2
    state = load_checkpoint(folder / "last.pt")
    assert (state["recipe"]["model"]["centre_gradient"], state["recipe"]["model"]["centre_head"]) == DESIGNS[commit]
    assert ("head.input_mean" in state["model"]) == DESIGNS[commit][1]


def test_a_key_that_contradicts_an_old_checkpoint_is_one_line(old):
    commit, folder = old
    state = load_checkpoint(folder / "last.pt")
    given = not DESIGNS[commit][1]
    with pytest.raises(CheckpointError, match=rf"model\.centre_head \({not given} -> {given}\)") as caught:
        resume(folder, f"model.centre_head={str(given).lower()}")
    assert "\n" not in str(caught.value)
    assert state["version"] == 1


@pytest.mark.parametrize("norm", NORMS)
def test_a_resolved_recipe_builds_what_the_written_one_builds(norm):
    recipe = parse_recipe({**RECIPE, "model": {"name": "reactnet20", "norm": norm, "width": 0.1}}, "x", MODELS)
    data = {"classes": ["a", "b", "c"], "channels": 2, "image_size": [9, 9]}
    torch.manual_seed(3)
    options = recipe.model.model_dump(exclude={"name"}) | {"stem": "cifar"}
    models = [MODELS["reactnet20"](3, 2, **options)]
    torch.manual_seed(3)
    models.append(build_model(resolve(recipe, data), MODELS, data))
    x = torch.randn(2, 2, 9, 9)
    assert torch.equal(models[0].eval()(x), models[1].eval()(x))
    assert repr(models[0]) == repr(models[1])


def test_a_normaliser_that_changes_leaves_checkpoints_as_they_are(tmp_path, monkeypatch):
    from dataclasses import replace

    fit(parse_recipe(RECIPE, "x", MODELS), MODELS, tmp_path / "run", quiet=True, curves=False)
    before, _ = load_model(tmp_path / "run", MODELS)
    changed = replace(NORMS["free"], centre_head=False, alpha=0.5, ste_window="fixed")
    monkeypatch.setitem(NORMS, "free", changed)
    after, _ = load_model(tmp_path / "run", MODELS)
    assert torch.equal(before(images()), after(images()))
    fit(parse_recipe(RECIPE, "x", MODELS, ["stages.0.epochs=2"]), MODELS, tmp_path / "run", resume=True, curves=False)
    model, _ = load_model(tmp_path / "run", MODELS)
    check_fit(model, before.state_dict(), "run")  # the head is still centred
    assert V1.keys() <= NORMS.keys()


def test_a_checkpoint_of_a_version_to_come_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("bnnfree.train.checkpoint.VERSION", 4)
    save_checkpoint(tmp_path / "x.pt", {"model": {}})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="version 4, this bnnfree reads up to 3"):
        load_checkpoint(tmp_path / "x.pt")
