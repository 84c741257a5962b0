"""From a training to a packed file with the tools, as a user does it; and what they say when it cannot be done."""

import json

import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT, TINY, train
from PIL import Image
from test_published import THEIRS, make_file, save
from test_tools import tool  # noqa: F401

from bnnfree.engine import load
from bnnfree.train.checkpoint import save_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of a tiny network, trained for four epochs on fake data."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train(folder, "stages=[{epochs: 4}]", curves=True)
    return folder


@pytest.fixture
def packed(tool, run, tmp_path):  # noqa: F811
    path = tmp_path / "m.bnnf"
    code, printed, errors = tool("export", run, "-o", path)
    assert code == 0 and printed.splitlines()[-1] == str(path), errors
    assert f"{path.stat().st_size:,} bytes" in printed
    return path


def test_a_training_goes_all_the_way_to_a_prediction(tool, run, packed, tmp_path):  # noqa: F811
    code, printed, errors = tool("verify", run, packed, "--samples", 40, "--json", tmp_path / "verify.json")
    assert code == 0, printed + errors
    report = json.loads((tmp_path / "verify.json").read_text())
    assert report["equal"] and report["images"] == 40 and report["first_difference"] is None
    assert all(layer["equal"] for layer in report["torch_layers"] + report["double_layers"])
    assert printed.splitlines()[-1] == str(tmp_path / "verify.json")
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(tmp_path / "some.png")
    code, printed, errors = tool("predict", packed, tmp_path / "some.png")
    assert code == 0 and "class" in printed, errors
    assert load(packed).info()["classes"] == [f"class{i}" for i in range(4)]


def test_a_packed_file_is_as_good_as_the_run_it_came_from(tool, run, packed, tmp_path):  # noqa: F811
    """On the same test images, counted by the same command; int8 ends may move an image or two of 20."""
    exact = tmp_path / "float.bnnf"
    assert tool("export", run, "-o", exact, "--stem", "float", "--head", "float")[0] == 0
    figures = []
    for source in (run, packed, exact):
        more = [] if source == run else ["data.samples=80"]  # a packed file names its data set, and no more
        code, _, errors = tool("evaluate", source, *more, "--json", tmp_path / "f.json")
        assert code == 0, errors
        figures.append(json.loads((tmp_path / "f.json").read_text()))
    assert [each["images"] for each in figures] == [20] * 3
    assert abs(figures[0]["top1"] - figures[1]["top1"]) <= 10
    assert figures[0]["top1"] == figures[2]["top1"] and figures[0]["loss"] == pytest.approx(
        figures[2]["loss"], rel=1e-4
    )


def test_the_summary_predicts_the_file_to_the_byte(tool, run, packed, tmp_path):  # noqa: F811
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({**TINY, "stages": [{"epochs": 1}]}))
    assert tool("export", recipe, "-o", tmp_path / "r.bnnf")[0] == 0
    for source, file in ((run, packed), (recipe, tmp_path / "r.bnnf")):
        code, printed, errors = tool("summary", source, "--json", tmp_path / "s.json")
        assert code == 0 and f"packed file  {file.stat().st_size:,} bytes" in printed, errors
        figures = json.loads((tmp_path / "s.json").read_text())["packed_bytes"]
        assert figures["total"] == file.stat().st_size == sum(v for k, v in figures.items() if k != "total")


@pytest.mark.parametrize("source", ["folder", "best", "recipe"])
def test_all_three_kinds_of_source_export_and_verify(tool, run, tmp_path, source):  # noqa: F811
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({**TINY, "stages": [{"epochs": 1}]}))
    path = {"folder": run, "best": run / "best.pt", "recipe": recipe}[source]
    more = ("model.norm=bn", "seed=3") if source == "recipe" else ()
    options = ("--stem", "float", "--head", "float")
    assert tool("export", path, *more, "-o", tmp_path / "m.bnnf", *options)[0] == 0
    code, printed, errors = tool("verify", path, tmp_path / "m.bnnf", *more, "--samples", 8)
    assert code == 0, printed + errors
    kinds = load(tmp_path / "m.bnnf").info()["bytes_by_dtype"]
    assert "i8" not in kinds and "bits" in kinds


def test_verify_takes_image_files(tool, run, packed, tmp_path):  # noqa: F811
    folder = tmp_path / "photos" / "more"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for i, size in enumerate([(9, 9), (20, 31), (64, 7)]):
        Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("no image")
    code, printed, errors = tool("verify", run, packed, "--images", tmp_path / "photos")
    assert code == 0 and "of 3 images" in printed, printed + errors


def test_verify_tells_another_networks_file(tool, run, packed, tmp_path):  # noqa: F811
    """Other weights: exit 1 and the first layer that differs; another architecture: exit 2, one line."""
    other = tmp_path / "other.pt"
    state = torch.load(run / "best.pt", weights_only=True)
    weights = state["ema"] or state["model"]
    key = next(key for key in weights if key.startswith("blocks.3.") and key.endswith("weight"))
    weights[key].neg_()
    save_checkpoint(other, state)
    code, printed, _ = tool("verify", other, packed, "--samples", 6)
    assert code == 1 and "NOT EQUAL: blocks.3." in printed
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({**TINY, "stages": [{"epochs": 1}]}))
    code, _, errors = tool("verify", recipe, packed, "model.name=reactnet18", "--samples", 6)
    assert code == 2 and "another" in errors and len(errors.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("export", "RUN", "-o", "TMP"), "folder"),
        (("export", "RUN", "model.norm=bn", "-o", "TMP/x.bnnf"), "fixed"),
        (("export", "TMP/none", "-o", "TMP/x.bnnf"), "none"),
        (("verify", "RUN", "TMP/none.bnnf", "--samples", "3"), "cannot be read"),
        (("verify", "RUN", "RUN/best.pt", "--samples", "3"), "first bytes"),
        (("verify", "RUN", "FILE", "--samples", "0"), "--samples"),
        (("verify", "RUN", "FILE", "--samples", "3", "--agreement", "2"), "--agreement"),
        (("verify", "RUN", "FILE", "--images", "TMP/none"), "folder"),
        (("predict", "RUN/best.pt", "RUN/curves.png"), "first bytes"),
        (("evaluate", "FILE", "data.samples=3"), "samples"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(tool, run, packed, tmp_path, arguments, word):  # noqa: F811
    names = {"RUN": str(run), "FILE": str(packed), "TMP": str(tmp_path)}
    filled = []
    for argument in arguments[1:]:
        for name, value in names.items():
            argument = argument.replace(name, value)
        filled.append(argument)
    code, _, errors = tool(arguments[0], *filled)
    assert code == 2 and word in errors, errors
    assert len([line for line in errors.strip().splitlines() if "image/s" not in line]) == 1, errors
    assert not (tmp_path / "x.bnnf").exists()


def test_a_failing_export_leaves_the_old_file(tool, run, packed):  # noqa: F811
    before = packed.read_bytes()
    code, _, errors = tool("export", run, "-o", packed, "--format", "onnx", "key=1")
    assert code == 2 and packed.read_bytes() == before, errors


def test_onnx_is_written_by_the_same_tool(tool, run, tmp_path):  # noqa: F811
    onnx = pytest.importorskip("onnx")
    code, printed, errors = tool("export", run, "-o", tmp_path / "m.onnx", "--format", "onnx")
    assert code == 0 and printed.splitlines()[-1] == str(tmp_path / "m.onnx"), errors
    onnx.checker.check_model(onnx.load(tmp_path / "m.onnx"))


@pytest.mark.parametrize("variant", ["ReActNet/resnet/2_step2", "BNN_NoBN/Qaw_reactnet_A_bf"])
def test_a_published_checkpoint_becomes_a_packed_file(tool, tmp_path, variant):  # noqa: F811
    file = make_file(THEIRS[variant], 8, seed=5)
    path = save(tmp_path / "x.pth.tar", file)
    options = ("--variant", variant, "--image-size", 64)
    assert tool("convert", path, "-o", tmp_path / "x.pt", *options)[0] == 0
    assert tool("export", tmp_path / "x.pt", "-o", tmp_path / "x.bnnf")[0] == 0
    code, printed, errors = tool("verify", tmp_path / "x.pt", tmp_path / "x.bnnf", "--samples", 8, "--agreement", 0)
    assert code == 0, printed + errors


def test_the_recipes_of_the_repository_export(tool, tmp_path):  # noqa: F811
    """As the README says: any network, without training. Narrow here."""
    recipe = ROOT / "recipes" / "imagenet_reactnet_a.yaml"
    code, printed, errors = tool("export", recipe, "model.width=0.25", "-o", tmp_path / "a.bnnf")
    assert code == 0 and "random weights" in printed and "224x224x3" in printed, errors
