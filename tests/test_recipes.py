"""Every file in recipes/ is valid, builds at full width, and trains two steps of each stage on fake data."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from bnnfree.data.datasets import KNOWN
from bnnfree.models import MODELS
from bnnfree.recipe import resolve
from bnnfree.train import fit, load_checkpoint, load_recipe
from bnnfree.train.checkpoint import build_model
from bnnfree.train.run_folder import ARTEFACTS

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "recipes").glob("*.yaml"))
SIZES = {
    "reactnet18": 11.2,
    "birealnet18": 11.2,
    "xnor_resnet18": 11.2,
    "reactnet_a": 28.3,
    "reactnet20": 0.27,
}
OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_0-9]+)*=[^\s.,;)]\S*?(?=[.,;)]*(\s|$))")

every_recipe = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


@pytest.fixture(autouse=True)
def one_thread():
    """Keep the tests from competing with each other for cores."""
    torch.set_num_threads(1)


def header_of(path: Path) -> list[str]:
    """The comment lines at the top, without their #."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return [line[1:].strip() for line in lines[:end]]


def leaves(tree: dict, prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_there_is_a_recipe_for_every_promised_pair():
    names = {path.stem for path in FILES}
    models = ("xnor_resnet18", "birealnet18", "reactnet18", "reactnet_a")
    assert names >= {f"{data}_{model}" for data in ("cifar10", "cifar100") for model in models}
    assert names >= {"imagenet_reactnet_a", "imagenet_reactnet18", "cifar10_reactnet20", "reactnet_nobn"}


@every_recipe
def test_recipe_is_valid_and_free_of_batch_norm(path):
    recipe = load_recipe(path, models=MODELS)
    assert recipe.model.norm in ("free", "free_paper")
    assert recipe.stages[-1].binarize in (None, "both")
    # the file's name says what is in it
    if path.stem not in ("reactnet_nobn", "cifar10_flagship", "cifar10_mcu"):
        width = {1.0: "", 0.5: "_half"}[recipe.model.width]
        assert path.stem == f"{recipe.data.name}_{recipe.model.name}{width}"
        assert recipe.data.root == f"data/{recipe.data.name}"


@every_recipe
def test_recipe_says_nothing_that_its_base_says_already(path):
    own = yaml.safe_load(path.read_text(encoding="utf-8"))
    base_name = own.pop("extends", None)
    if base_name is None:
        return
    base = yaml.safe_load((path.parent / base_name).read_text(encoding="utf-8"))
    assert "extends" not in base
    said = dict(leaves(base))
    assert [key for key, value in leaves(own) if said.get(key) == value] == []


@every_recipe
def test_header_is_short_and_holds_the_command(path):
    header = header_of(path)
    assert 1 <= len(header) <= 15
    assert any(f"python tools/train.py recipes/{path.name}" in line for line in header)


@every_recipe
def test_commands_and_overrides_of_the_header_are_valid(path):
    header = header_of(path)
    for line in header:
        _, found, rest = line.partition("tools/train.py ")
        if found:
            file, *overrides = shlex.split(rest)
            load_recipe(ROOT / file, overrides, MODELS)
    for match in OVERRIDE.finditer(" ".join(header)):
        load_recipe(path, [match[0]], MODELS)


def test_overrides_are_found_in_prose():
    text = "Twins: model.norm=bn, model.norm=none; (model.beta=ref has it so), lr=4e-3 data.val_fraction=0.5."
    found = [match[0] for match in OVERRIDE.finditer(text)]
    assert found == ["model.norm=bn", "model.norm=none", "model.beta=ref", "lr=4e-3", "data.val_fraction=0.5"]


@every_recipe
@pytest.mark.parametrize("norm", ["none", "bn", "free", "free_paper"])
def test_twins_are_an_override(path, norm):
    assert load_recipe(path, [f"model.norm={norm}"], MODELS).model.norm == norm


@every_recipe
def test_network_builds_at_full_width(path):
    recipe = load_recipe(path, models=MODELS)
    classes, channels, size, _ = KNOWN[recipe.data.name]
    data = {"classes": list(range(classes)), "channels": channels, "image_size": (size, size)}
    with torch.device("meta"):
        models = [build_model(recipe, MODELS, data, stage.binarize) for stage in recipe.stages]
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in models]
    assert all(other == shapes[0] for other in shapes), "a stage hands its weights to the next"
    assert models[0].get_classifier().out_features == classes
    large = size > 64
    assert models[0].stem[0].stride == ((2, 2) if large or recipe.model.stem == "half" else (1, 1))
    if recipe.model.width == 1:
        body = sum(p.numel() for p in models[0].parameters()) - models[0].get_classifier().weight.numel()
        assert body == pytest.approx(1e6 * SIZES[recipe.model.name], rel=0.02)


@pytest.mark.sample(2)
@every_recipe
def test_recipe_trains_two_steps_of_each_stage(path, tmp_path):
    whole = load_recipe(path, models=MODELS)
    large = whole.data.name == "imagenet"
    overrides = ["device=cpu", "model.width=0.125", "data.name=fake", "data.classes=2", "data.batch_size=4"]
    overrides += ["data.samples=10", f"data.image_size={64 if large else 16}", "data.workers=0"]
    overrides += [f"model.stem={'imagenet' if large else 'cifar'}"]
    overrides += [f"stages.{i}.epochs=1" for i in range(len(whole.stages))]
    if whole.loss.teacher is not None:
        overrides += ["loss.name=cross_entropy", "loss.teacher=null"]
    recipe = load_recipe(path, overrides, MODELS)
    result = fit(recipe, MODELS, tmp_path / "run", quiet=True, curves=False)  # test_train.py draws
    assert {p.name for p in (tmp_path / "run").iterdir()} >= set(ARTEFACTS) - {"curves.png"}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == [stage.name for stage in whole.stages]
    assert all(0 < line["lr"] for line in lines), "no epoch is dead"
    assert result["train_images"] == 8 and result["epochs"] == len(whole.stages)  # two steps of four images
    saved = load_recipe(tmp_path / "run" / "recipe.yaml", models=MODELS)
    assert saved.model_dump() == resolve(recipe, {}).model_dump()
    state = load_checkpoint(tmp_path / "run", prefer="last.pt")
    assert state["stage"] == len(whole.stages) - 1
    assert all(value.isfinite().all() for value in state["model"].values() if value.is_floating_point())
