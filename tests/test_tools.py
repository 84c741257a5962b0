"""The commands as a user meets them: what they print, what they leave, and one readable error for bad input."""

import json
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT, TINY
from PIL import Image

from bnnfree.train.checkpoint import save_checkpoint


@pytest.fixture
def tool(monkeypatch, capsys):
    """Run a tool in this process: tool(name, *arguments) -> (exit code, stdout, stderr)."""

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"tools/{name}.py", *map(str, arguments)])
        monkeypatch.syspath_prepend(str(ROOT / "tools"))
        code = 0
        try:
            runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "stages": [{"epochs": 1}]}))
    return path


@pytest.fixture
def images(tmp_path):
    """A tiny image folder: two classes of five training and two test images."""
    root = tmp_path / "images"
    random = np.random.default_rng(0)
    for part, count in (("train", 5), ("test", 2)):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 255, (9, 9, 3), np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


@pytest.mark.parametrize("threads", ["-3", "0", "100000"])
def test_threads_that_no_machine_has_exit_2_with_one_line(tool, recipe, threads):
    code, _, errors = tool("train", recipe, "--threads", threads, "--dry-run")
    assert code == 2 and errors == f"error: --threads: got {threads}, expected 1 to 1024.\n"


def test_a_misspelt_key_exits_2_with_one_line_that_proposes_the_right_one():
    command = [sys.executable, "tools/train.py", "recipes/reactnet_nobn.yaml", "model.nrom=free"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "override 'model.nrom=free': model.nrom" in done.stderr
    assert "Did you mean 'model.norm'?" in done.stderr


def _folder_without_classes(root):
    for name in ("cat", "dog"):
        shutil.rmtree(root / "train" / name)


def _truncated_image(root):
    path = root / "train" / "cat" / "3.png"
    path.write_bytes(path.read_bytes()[:60])


def _text_as_image(root):
    (root / "test" / "dog" / "1.png").write_text("not a picture")


@pytest.mark.parametrize(
    ("damage", "named"),
    [(shutil.rmtree, ["does not exist", "images"]), (_folder_without_classes, ["train", "class"]),
     (_truncated_image, ["3.png", "bad_images"]), (_text_as_image, ["1.png", "bad_images"])],
)  # fmt: skip
def test_damaged_data_exits_2_with_one_line_that_names_it(tool, tmp_path, recipe, images, damage, named):
    damage(images)
    out = tmp_path / "run"
    places = (f"data.root={images}", f"data.cache={tmp_path}/cache", "data.augment=[]")
    code, _, errors = tool("train", recipe, "data.name=image_folder", *places, "--out", out)
    assert code == 2 and "Traceback" not in errors
    assert len(errors.strip().splitlines()) == 1, errors
    assert all(word in errors for word in named), errors
    assert not (out / "last.pt").exists()


def test_damaged_images_are_skipped_and_counted_when_the_recipe_says_so(tmp_path, recipe, images):
    _truncated_image(images)
    places = (f"data.root={images}", f"data.cache={tmp_path}/cache", "data.augment=[]", "data.batch_size=4")
    options = ("data.name=image_folder", "data.bad_images=skip", "data.val_fraction=0.3")
    command = [sys.executable, "tools/train.py", recipe, *options, *places, "--out", tmp_path / "run"]
    done = subprocess.run([str(each) for each in command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "warning" in done.stderr and "3.png" in done.stderr, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["skipped_images"] == 1


def _list_of_numbers(path):
    torch.save([1, 2, 3], path)


def _pickled_code(path):
    torch.save({"kind": print}, path)


@pytest.mark.parametrize(
    "write",
    [lambda p: p.write_text("hello"), lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b"PK\x03\x04" + bytes(99)),
     _list_of_numbers, _pickled_code],
    ids=["text", "empty", "half a zip", "a list", "pickled code"],
)  # fmt: skip
def test_what_is_no_checkpoint_exits_2_with_one_line(tool, tmp_path, recipe, write):
    path = tmp_path / "x.pt"
    write(path)
    for code, _, errors in (
        tool("evaluate", path),
        tool("train", recipe, "loss.name=distribution", f"loss.teacher={path}", "--out", tmp_path / "a"),
    ):
        assert code == 2 and "x.pt" in errors and "Traceback" not in errors
        assert len(errors.strip().splitlines()) == 1, errors
    (tmp_path / "b").mkdir()
    path.rename(tmp_path / "b" / "last.pt")
    code, _, errors = tool("train", recipe, "--resume", "--out", tmp_path / "b")
    assert code == 2 and "last.pt" in errors and len(errors.strip().splitlines()) == 1


def test_train_then_evaluate_agree_and_print_last_what_they_wrote(tool, tmp_path, recipe):
    out = tmp_path / "run"
    code, printed, errors = tool("train", recipe, "--out", out)
    assert code == 0 and printed.splitlines()[-1] == str(out), errors
    result = json.loads((out / "result.json").read_text())
    code, printed, errors = tool("evaluate", out, "--json", tmp_path / "e.json")
    assert code == 0 and printed.splitlines()[-1] == str(tmp_path / "e.json"), errors
    figures = json.loads((tmp_path / "e.json").read_text())
    assert figures["top1"] == result["test_top1"] and figures["loss"] == pytest.approx(result["test_loss"])
    assert tool("evaluate", out, "--split", "val")[0] == 0
    code, _, errors = tool("train", recipe, "--out", out)
    assert code == 2 and "--resume" in errors


def test_a_run_folder_or_its_recipe_goes_on_in_that_folder(tool, tmp_path, recipe, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    assert tool("train", recipe, "free.window=99", "model.norm=free", "--out", out)[0] == 0
    for given in (out, out / "recipe.yaml"):
        code, printed, errors = tool("train", given, "--resume")
        assert code == 0 and printed.splitlines()[-1] == str(out), errors
    assert not (tmp_path / "runs").exists()
    code, _, errors = tool("train", out)
    assert code == 2 and "holds a run already" in errors
    code, _, errors = tool("train", out, "--resume", "--out", tmp_path / "typo")
    assert code == 2 and "typo: holds no run to go on with" in errors and len(errors.strip().splitlines()) == 1


def test_a_checkpoint_of_another_shape_names_what_does_not_fit(tool, tmp_path, recipe):
    out = tmp_path / "run"
    assert tool("train", recipe, "--out", out)[0] == 0
    state = torch.load(out / "best.pt", weights_only=True)
    state["recipe"]["model"]["width"] = 1.0
    save_checkpoint(out / "best.pt", state)
    code, _, errors = tool("evaluate", out)
    assert code == 2 and "other shape" in errors and "stem" in errors


def test_dry_run_estimates_and_writes_nothing(tool, tmp_path, recipe, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, printed, errors = tool("train", recipe, "--dry-run", "stages.0.epochs=7")
    assert code == 0, errors
    assert "7 epochs" in printed and "GiB" in printed and "latent" in printed
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("path", sorted((ROOT / "tools").glob("[!_]*.py")), ids=lambda p: p.stem)
def test_every_tool_explains_itself_with_examples(tool, path):
    code, printed, _ = tool(path.stem, "--help")
    assert code == 0 and f"python tools/{path.name}" in printed
