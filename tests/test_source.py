"""Opening a network: a recipe is as good as a checkpoint, the same bits each time, and anything else is named."""

import itertools
import json
import re
import runpy
import sys

import pytest
import torch
import yaml
from helpers import KINDS_OF_MODELS, ROOT, TINY, assert_same, tiny, train

from bnnfree.data.datasets import CIFAR10, CIFAR100, IMAGENET, load_data
from bnnfree.errors import CheckpointError, DataError
from bnnfree.models import MODELS
from bnnfree.nn import NORMS
from bnnfree.recipe import resolve
from bnnfree.train import RecipeError, load_model, open_network, open_source, source_kind
from bnnfree.train.open_network import STAND_IN, without_places

EVERY_KIND = r"expected a run folder, a checkpoint \(\.pt\) or a recipe \(\.yaml, \.yml\)"


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of two stages of one epoch."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train(folder, "stages.0.epochs=1", "stages.1.epochs=1")
    return folder


# ---- recipes


def test_a_recipe_is_the_same_bits_each_time_and_leaves_no_trace(recipe):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = open_source(recipe, MODELS)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    second = open_source(str(recipe), MODELS)
    assert_same(dict(first.model.state_dict()), dict(second.model.state_dict()))
    other = open_source(recipe, MODELS, ["seed=1"]).model.state_dict()
    weights = [key for key, value in first.model.state_dict().items() if value.ndim == 4]
    assert weights and all(not torch.equal(first.model.state_dict()[key], other[key]) for key in weights)


def test_a_recipes_network_is_its_last_stages_and_says_what_it_is(recipe):
    network = open_source(recipe, MODELS)
    assert (network.trained, network.state, network.binarize, network.source) == (False, None, "both", str(recipe))
    assert network.recipe == resolve(tiny(), {"image_size": [9, 9]}) and not any(
        module.training for module in network.model.modules()
    )
    assert list(network.data) == ["classes", "channels", "image_size", "mean", "std"]
    assert len(network.data["classes"]) == 4 and network.data["image_size"] == [9, 9]
    assert network.model(torch.zeros(2, 3, 9, 9)).shape == (2, 4)
    assert open_source(recipe, MODELS, ["stages.1.binarize=weights"]).binarize == "weights"
    assert open_source(recipe, MODELS, ["stages.1.binarize=null", "model.binarize=none"]).binarize == "none"


def pairs():
    """Each model and each norm with a few of the others; all pairs: python -m pytest -m slow tests/test_source.py"""
    for name, norm in itertools.product(KINDS_OF_MODELS, NORMS):
        quick = name in ("reactnet20", "birealnet18") or norm in ("free", "bn", "in", "in_pn")
        yield pytest.param(name, norm, marks=() if quick else pytest.mark.slow)


@pytest.mark.sample(3)
@pytest.mark.parametrize("name, norm", list(pairs()))
def test_random_networks_tell_images_apart(recipe, name, norm):
    network = open_source(recipe, MODELS, [f"model.name={name}", f"model.norm={norm}", "data.image_size=17"])
    random = torch.Generator().manual_seed(1)
    outputs = network.model(torch.randn(16, 3, 17, 17, generator=random))
    # instances of zero mean, summed without an activation, are zero when pooled: these cannot tell
    blind = norm in ("in", "in_pn") and name.startswith(("birealnet", "xnor"))
    assert outputs.isfinite().all() and (outputs.std(0) > 1e-3).all() == (not blind)


@pytest.mark.parametrize(("size", "count"), [(9, 64), (64, 64), (65, 8)])
def test_constants_are_set_on_images_that_look_nothing_like_the_weights(recipe, monkeypatch, size, count):
    seen = []
    original = open_network.calibrate
    monkeypatch.setattr(
        open_network, "calibrate", lambda model, images, *rest: seen.append(images) or original(model, images, *rest)
    )
    network = open_source(recipe, MODELS, ["model.width=0.25", f"data.image_size={size}", "model.stem=cifar"])
    (images,) = seen
    assert images.shape == (count, 3, size, size)
    assert images.mean().abs() < 0.05 and abs(images.std() - 1) < 0.05
    assert not torch.equal(images.flatten()[:16], torch.randn(16, generator=torch.Generator().manual_seed(0)))
    means = {k: v for k, v in network.model.named_buffers() if "mean" in k}
    assert means and all(value.abs().max() > 0 for value in means.values())


@pytest.mark.parametrize(
    ("overrides", "stats", "resize"),
    [
        (["data.name=cifar10"], CIFAR10, "square"),
        (["data.name=cifar100"], CIFAR100, "square"),
        (["data.name=imagenet"], IMAGENET, "square"),
        (["data.name=imagenet", "data.image_size=65"], IMAGENET, "centre"),
        (["data.name=cifar10", "data.image_size=65"], CIFAR10, "square"),
        (["data.name=digits"], ([STAND_IN[0]], [STAND_IN[1]]), "square"),
        (["data.channels=2"], ([STAND_IN[0]] * 2, [STAND_IN[1]] * 2), "square"),
    ],
)
def test_statistics_are_the_known_ones_or_the_stand_in(recipe, overrides, stats, resize):
    network = open_source(recipe, MODELS, overrides)
    assert network.data["mean"] == list(stats[0]) and network.data["std"] == list(stats[1])
    assert network.resize == resize


@pytest.mark.parametrize(("size", "stats"), [(64, ((STAND_IN[0],) * 3, (STAND_IN[1],) * 3)), (65, IMAGENET)])
def test_an_image_folder_has_imagenets_statistics_where_it_is_streamed(recipe, tmp_path, size, stats):
    from test_data import write_tree

    root = write_tree(tmp_path / "root", count=1)
    options = ["data.name=image_folder", f"data.root={root}", f"data.image_size={size}", "model.stem=cifar"]
    network = open_source(recipe, MODELS, options)
    assert network.data["mean"] == list(stats[0]) and network.data["std"] == list(stats[1])
    assert network.data["classes"] == ["ant", "bee"]
    assert network.resize == ("square" if size == 64 else "centre")


# ---- checkpoints


def test_a_run_folder_is_its_best_checkpoint(run_folder):
    folder, file = (open_source(path, MODELS) for path in (run_folder, run_folder / "best.pt"))
    assert_same(dict(folder.model.state_dict()), dict(file.model.state_dict()))
    model, state = load_model(run_folder, MODELS)
    assert_same(dict(folder.model.state_dict()), dict(model.state_dict()))
    assert_same(folder.state, state)
    assert folder.trained and not folder.model.training and folder.binarize == "both"
    assert folder.data == state["data"] and folder.source == str(run_folder)
    assert folder.recipe.model_dump() == state["recipe"]
    random = open_source(run_folder / "recipe.yaml", MODELS)
    assert not random.trained and random.data.keys() == folder.data.keys()
    assert random.model.state_dict().keys() == folder.model.state_dict().keys()


def test_overrides_move_a_checkpoints_data_and_not_its_network(run_folder):
    moved = open_source(run_folder, MODELS, ["data.samples=99", "model.width=1.0"])
    assert moved.recipe.data.samples == 99
    plain = open_source(run_folder, MODELS)
    assert_same(dict(moved.model.state_dict()), dict(plain.model.state_dict()))


# ---- anything else


def test_what_is_neither_is_named_with_what_is_allowed(tmp_path, recipe):
    with pytest.raises(CheckpointError, match=rf"tiny\.yml: no such file or folder, {EVERY_KIND}\. .*tiny\.yaml'\?"):
        open_source(tmp_path / "tiny.yml", MODELS)
    with pytest.raises(CheckpointError, match=rf"no such file or folder, {EVERY_KIND}\.$"):
        open_source(tmp_path / "nowhere" / "best.pt", MODELS)
    (tmp_path / "weights.onnx").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=rf"weights\.onnx: got a file that ends in '\.onnx', {EVERY_KIND}"):
        open_source(tmp_path / "weights.onnx", MODELS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds neither best.pt nor last.pt"):
        open_source(tmp_path / "empty", MODELS)


def test_errors_of_a_recipe_name_its_file_and_those_of_an_override_that(recipe):
    with pytest.raises(RecipeError, match=r"^override 'model\.nrom=free': model\.nrom: unknown key"):
        open_source(recipe, MODELS, ["model.nrom=free"])
    with pytest.raises(DataError, match=r"tiny\.yaml: data: root: got None"):
        open_source(recipe, MODELS, ["data.name=image_folder"])


def test_source_kind_tells_without_opening(tmp_path, recipe):
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "x.pt").write_text("torn")
    kinds = [source_kind(path) for path in (recipe, tmp_path / "folder.yaml", str(tmp_path / "x.pt"))]
    assert kinds == ["recipe", "checkpoint", "checkpoint"]


# ---- tools


@pytest.fixture
def tool(monkeypatch, capsys):
    """Run a tool in this process: tool(name, *arguments) -> stdout."""

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"tools/{name}.py", *map(str, arguments)])
        monkeypatch.syspath_prepend(str(ROOT / "tools"))
        runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.fixture(params=["run folder", "checkpoint", "recipe"])
def source(request, run_folder, recipe):
    return {"run folder": run_folder, "checkpoint": run_folder / "best.pt", "recipe": recipe}[request.param]


def test_evaluate_takes_all_three(tool, source):
    figures = json.loads(tool("evaluate", source))
    assert figures["trained"] == (source.suffix != ".yaml")
    assert figures["images"] == len(load_data(tiny().data).test)
    model = open_source(source, MODELS).model
    assert torch.isfinite(torch.tensor(figures["loss"])) and 0 <= figures["top1"] <= 100
    assert json.loads(tool("evaluate", source, "data.samples=400"))["images"] == 100
    assert not model.training


def test_evaluate_takes_a_recipe_whose_class_names_only_its_data_tell(tool, recipe):
    figures = json.loads(tool("evaluate", recipe, "data.name=digits", "data.augment=[]"))
    assert figures["images"] > 300 and figures["top1"] < 60


def test_summary_takes_all_three_and_agrees(tool, source, run_folder):
    lines = tool("summary", source).splitlines()
    assert lines[0] == f"source {source}, model reactnet20, norm free, binarize both, classes 4"
    *others, packed = tool("summary", run_folder).splitlines()
    assert lines[1:-1] == others[1:]
    # the file's constants are the same, its text is not: statistics that were measured have more digits
    parts = [re.findall(r"(bits|i8|f32|i32) ([\d,]+)", line) for line in (lines[-1], packed)]
    assert parts[0] == parts[1] and len(parts[0]) == 4


@pytest.mark.parametrize(
    "root", ["http://h/a.tar", "http:{//h,x}/a.tar", "{http:,x}//h/a.tar", "pipe:ls", "//h/a", "s3:{//b}/a"]
)
def test_no_address_of_a_file_is_kept_however_it_is_written(root):
    kept = without_places({"data": {"name": "shards", "root": root, "test_root": root, "val_root": root}})
    assert kept == {"data": {"name": "shards"}}
    assert without_places({"data": {"root": "C:/images"}}) == {"data": {"root": "C:/images"}}
