"""The one place where a tool's text leaves the program, and what a tool does with files of others."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT, TINY, train
from packed import Net, fields_of
from PIL import Image
from test_tools import tool  # noqa: F401

from bnnfree.errors import printable
from bnnfree.export import pack, pack_network
from bnnfree.format import read, write
from bnnfree.models import MODELS
from bnnfree.train import load_checkpoint, open_source
from bnnfree.train.checkpoint import save_checkpoint
from bnnfree.train.open_network import without_places

RECIPE = "recipes/reactnet_nobn.yaml"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b]0;pwned\x07", r"a\x1b]0;pwned\x07"), ("\u202ecod.exe", r"\u202ecod.exe"), ("a\u200bb", r"a\u200bb"),
        ("a\u2028b", r"a\u2028b"), ("\ufeffx", r"\ufeffx"), ("\x9b2J", r"\x9b2J"), ("a\rb", r"a\rb"),
        ("\udc80", r"\udc80"), ("e" + "\u0301" * 300, "e" + "\u0301" * 4 + r"\u0301" * 296),
        ("a" + "\u20dd" * 6, "a" + "\u20dd" * 4 + r"\u20dd" * 2), ("\u3164", r"\u3164"), ("ก" + "\u0e31", "ก\u0e31"),
        ("Gräser 日本 é \U0001f600", "Gräser 日本 é \U0001f600"), ("two\nlines\tand a tab", "two\nlines\tand a tab"),
    ],
)  # fmt: skip
def test_text_of_others_cannot_move_a_terminal(text, shown):
    assert printable(text) == shown


def run_tool(name, *arguments, **environment):
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A packed network whose class names are what no terminal should show, or that its encoding lacks."""
    folder = tmp_path_factory.mktemp("ödd names")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    names = ["\u202ecat", "日本", "a\u200bb"]
    write(pack(net, image_size=(8, 8), mean=0.5, std=0.25, classes=names).model, folder / "m.bnnf")
    Image.fromarray(np.full((9, 9, 3), 90, np.uint8)).save(folder / "x.png")
    return folder


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_names_are_printed_in_any_encoding_without_controls(odd, encoding):
    done = run_tool("predict", odd / "m.bnnf", odd / "x.png", PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode(encoding)
    assert r"\u202ecat" in text and r"a\u200bb" in text and "\u202e" not in text
    assert ("日本" if encoding == "utf-8" else r"\u65e5\u672c") in text


def test_predict_takes_folders(odd):
    done = run_tool("predict", odd / "m.bnnf", odd, "--top", "1")
    assert done.returncode == 0 and b"x.png" in done.stdout
    (odd / "empty").mkdir(exist_ok=True)
    done = run_tool("predict", odd / "m.bnnf", odd / "empty")
    assert done.returncode == 2 and b"holds no image" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", RECIPE, "--out", "/proc/x/y"), ("train", RECIPE, "--out", "README.md"),
        ("export", RECIPE, "-o", "/proc/x.bnnf"), ("export", RECIPE, "-o", "README.md/x.bnnf"),
        ("evaluate", "tools"), ("dump", "tools"), ("summary", "tools"), ("predict", "README.md", "README.md"),
        ("convert", "README.md", "-o", "x.pt", "--variant", "x"), ("compare", "README.md"),
        ("shard", "README.md", "-o", "/proc/x"), ("dump", "n" * 300), ("summary", "a\0b"),
    ],
    ids=lambda value: " ".join(value)[:60].replace("\0", "0"),
)  # fmt: skip
def test_what_the_system_refuses_is_one_line(tool, monkeypatch, arguments):  # noqa: F811
    monkeypatch.chdir(ROOT)
    code, _, errors = tool(*arguments)
    assert code == 2 and errors.splitlines()[-1].startswith("error: ") and "Traceback" not in errors, errors


BLOCKED = """
import runpy, sys
class Blocked:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in {packages}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
sys.argv = sys.argv[1:]
sys.path.insert(0, "tools")
runpy.run_path(sys.argv[0], run_name="__main__")
"""
OTHERS = ("gen_format", "completion")  # those that need no package and write no file
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py") if path.stem not in OTHERS)


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_without_its_packages_names_the_extra(name):
    rest = {
        "export": ["-o", "x.bnnf"], "convert": ["-o", "b", "--variant", "x"], "shard": ["-o", "x"],
        "verify": ["x.bnnf", "--samples", "1"], "predict": ["x.png"],
    }.get(name, [])  # fmt: skip
    source = "models/pretrained/cifar10_reactnet18_half.bnnf" if name == "predict" else RECIPE
    code = BLOCKED.format(packages=("torch", "PIL", "yaml", "pydantic"))
    command = [sys.executable, "-c", code, f"tools/{name}.py", source, *rest]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = done.stderr.strip().splitlines()
    if name == "dump":
        assert "Traceback" not in done.stderr
        return
    assert done.returncode == 2 and len(said) == 1, done.stderr
    assert "which is not installed" in said[0] and "pip install -e" in said[0]
    assert subprocess.run([*command[:4], "--help"], cwd=ROOT, capture_output=True).returncode == 0


@pytest.mark.parametrize(("room", "package"), [("export", "torch"), ("nn", "torch"), ("preprocess", "PIL")])
def test_a_room_without_its_package_names_the_extra(room, package):
    code = BLOCKED.format(packages=(package,)).split("sys.argv =")[0] + f"import bnnfree.{room}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert f"bnnfree.{room} needs {package}, which is not installed" in last and "pip install" in last


# -- files of strangers


def test_a_files_recipe_says_nothing_of_what_is_fetched_or_written():
    data = {"name": "shards", "root": "https://evil/x", "test_root": "pipe:rm", "val_root": "/home/x", "cache": "/etc",
            "cache_gb": 1.0, "download": True, "workers": 9, "image_size": 72}  # fmt: skip
    assert without_places({"data": data, "seed": 1}) == {
        "data": {"name": "shards", "val_root": "/home/x", "image_size": 72}, "seed": 1
    }  # fmt: skip
    assert without_places({"data": data}, local=False)["data"] == {"name": "shards", "image_size": 72}


def test_evaluating_a_strangers_file_fetches_and_writes_nothing(tool, tmp_path, monkeypatch):  # noqa: F811
    train(tmp_path / "run", "stages=[{epochs: 1}]")
    state = load_checkpoint(tmp_path / "run")
    state["recipe"]["data"] |= {"name": "shards", "root": "http://127.0.0.1:9/x", "cache": str(tmp_path / "chosen")}
    save_checkpoint(tmp_path / "evil.pt", state)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("connected"))
    for command in ("evaluate", "summary"):
        code, _, errors = tool(command, tmp_path / "evil.pt")
        assert "127.0.0.1" not in errors and "Traceback" not in errors
        assert code == 0 or errors.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "chosen").exists()


def test_evaluating_a_packed_file_takes_the_root_from_the_command_line(tool, tmp_path):  # noqa: F811
    train(tmp_path / "run", "stages=[{epochs: 1}]")
    assert tool("export", tmp_path / "run", "-o", tmp_path / "m.bnnf")[0] == 0
    code, printed, errors = tool("evaluate", tmp_path / "m.bnnf", "data.samples=80", "--json", tmp_path / "f.json")
    assert code == 0, errors
    assert json.loads((tmp_path / "f.json").read_text())["images"] == 20


def test_a_packed_file_carries_a_recipe_on_demand_and_never_its_places(tool, tmp_path):  # noqa: F811
    train(tmp_path / "run", "stages=[{epochs: 1}]", f"data.cache={tmp_path / 'secret'}")
    assert tool("export", tmp_path / "run", "-o", tmp_path / "plain.bnnf")[0] == 0
    assert tool("export", tmp_path / "run", "-o", tmp_path / "whole.bnnf", "--with-recipe")[0] == 0
    plain, whole = (read(tmp_path / f"{name}.bnnf").metadata for name in ("plain", "whole"))
    assert "recipe" not in plain and {key: whole[key] for key in plain} == plain
    recipe = json.loads(whole["recipe"])
    assert recipe["optimizer"]["lr"] == 4e-3 and "secret" not in (tmp_path / "whole.bnnf").read_bytes().decode("latin1")
    places = {"root", "cache", "test_root", "val_root"}
    assert not places & recipe["data"].keys() and "init" not in recipe and "teacher" not in recipe["loss"]
    code, printed, errors = tool("evaluate", tmp_path / "whole.bnnf", "data.samples=80")
    assert code == 0 and json.loads(printed)["images"] == 20, errors


def test_keys_of_the_training_do_not_move_the_size_of_the_file(tmp_path):
    sizes = set()
    for overrides in ([], ["optimizer.weight_decay=0.00012345", "seed=123456", "data.burst=7"]):
        path = tmp_path / f"{len(overrides)}.yaml"
        path.write_text(yaml.safe_dump(TINY))
        write(pack_network(open_source(path, MODELS, overrides)).model, tmp_path / "m.bnnf")
        sizes.add((tmp_path / "m.bnnf").stat().st_size)
    assert len(sizes) == 1


def test_a_packed_file_that_names_no_data_says_what_to_type(tool, tmp_path):  # noqa: F811
    net = Net(9, 9, 3)
    write(net.model(net.add("avg_pool2d", net.real(4), **fields_of((9, 9)))), tmp_path / "m.bnnf")
    code, printed, errors = tool("evaluate", tmp_path / "m.bnnf")
    assert code == 2 and "names no data set" in errors and "data.name=image_folder data.root=FOLDER" in errors
