"""Lines that leave the tools: no name forges one, none is lost, the last one is the path of what was written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT, TINY
from packed import Net, fields_of
from PIL import Image
from test_cli import BLOCKED, TOOLS
from test_tools import tool  # noqa: F401

from bnnfree.errors import BnnfreeError, BnnfreeWarning, one_line, printable, unknown_name
from bnnfree.export import pack
from bnnfree.files import OutputError, replacing
from bnnfree.format import write
from bnnfree.models import MODELS
from bnnfree.recipe.data_section import DataRecipe
from bnnfree.recipe.read import UnreadError, by_key
from bnnfree.train.networks import load_fitting
from bnnfree.train.open_network import DESCRIBING, MACHINE, PLACES, without_places

FORGED = "forged: all is well"
HOSTILE = f"a\n{FORGED}\r{FORGED}\tb\x1b[2J\x0b{FORGED}\x85\u2028c"
MODEL = "models/pretrained/cifar10_reactnet18_half.bnnf"
REST = {
    "export": ["-o", "x.bnnf"], "convert": ["-o", "x.pt"], "shard": ["-o", "x"], "predict": ["x.png"],
    "verify": ["x.bnnf", "--samples", "1"],
}  # fmt: skip
posix = pytest.mark.skipif(sys.platform == "win32", reason="names of files there have no controls")
NET = """
import torch

class Odd(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.add_module({name!r}, torch.nn.Conv2d(3, 4, 3))
        self.head = torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.head(dict(self.named_children())[{name!r}](x).mean((2, 3)))

def build():
    torch.manual_seed(0)
    return Odd()
"""


def honest(text: str) -> bool:
    """True if no line of the output was begun by a name, and no character moves a terminal."""
    pieces = [piece for line in text.split("\n") for piece in line.split("\r")]
    whole = printable(text.replace("\r", "")) == text.replace("\r", "")
    return whole and not any(piece.startswith(FORGED) for piece in pieces) and "Traceback" not in text


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A folder of a hostile name that holds a recipe, images by class, a network of own code and a packed file."""
    folder = tmp_path_factory.mktemp("names") / HOSTILE
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / "images" / part / name).mkdir(parents=True)
            for number in range(6):
                pixels = np.random.default_rng(number).integers(0, 255, (9, 9, 3), np.uint8)
                Image.fromarray(pixels).save(folder / "images" / part / name / f"{number}{HOSTILE}.png")
    (folder / "images" / "train" / "cat" / f"bad{HOSTILE}.png").write_text("no picture")
    data = {"name": "image_folder", "root": str(folder / "images"), "bad_images": "skip", "image_size": 9}
    small = {**TINY["model"], "width": 0.25}
    recipe = {**TINY, "model": small, "data": {**data, "batch_size": 4}, "stages": [{"name": "s", "epochs": 1}]}
    (folder / f"r{HOSTILE}.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "net.py").write_text(NET.format(name=f"l{HOSTILE}".replace(".", "")))
    net = Net(9, 9, 3)
    made = net.add("pixel_conv2d", 0, outputs=2, **fields_of((2, 2)))
    model = net.model(made, classes=("x", "y"), metadata={"note": "a\u2028forged: all is well"})
    write(model, folder / "map.bnnf")
    return folder


@posix
@pytest.mark.filterwarnings("default")
def test_no_name_of_others_forges_a_line_of_any_tool(tool, hostile):  # noqa: F811
    recipe, run, packed = hostile / f"r{HOSTILE}.yaml", hostile / "run", hostile / "m.bnnf"
    picture = hostile / "images" / "test" / "cat"
    bad = hostile / "images" / "train" / "cat" / f"bad{HOSTILE}.png"
    own = f"{hostile / 'net.py'}:build"
    for code, *command in (
        (0, "train", recipe, "--dry-run"), (0, "train", recipe, "--out", run), (2, "train", recipe, "--out", run),
        (0, "export", run, "-o", packed), (0, "summary", run), (2, "evaluate", run),
        (0, "evaluate", packed, "data.bad_images=skip", f"data.root={json.dumps(str(hostile / 'images'))}"),
        (0, "dump", packed, "--recipe", "--json", hostile / "d.json"),
        (0, "predict", packed, picture, "--json", hostile / "p.json"), (2, "predict", packed, picture, bad),
        (0, "verify", run, packed, "--images", picture), (1, "dump", packed, hostile / "map.bnnf"),
        (None, "export", own, "-o", hostile / "o.bnnf", "--image-size", "9", "9"), (0, "compare", run, "--out",
         hostile / "c"), (2, "summary", hostile), (2, "summary", hostile / HOSTILE),
        (2, "train", recipe, f"{HOSTILE}=1"),
        (2, "train", recipe, f"model.norm={HOSTILE}"), (2, "predict", hostile / "map.bnnf", picture),
        (2, "sweep", hostile / HOSTILE), (2, "convert", bad, "-o", hostile / "x.pt"), (2, "probe", hostile),
    ):  # fmt: skip
        done, printed, errors = tool(*command)
        assert honest(printed + errors) and code in (None, done), (command, printed, errors)


def test_each_argument_of_an_error_or_a_warning_is_a_line():
    for kind in (BnnfreeError, BnnfreeWarning):
        assert str(kind(f"x: got {HOSTILE}")) == one_line(f"x: got {HOSTILE}")
        assert str(kind("a\nb", "c\td")).splitlines() == [r"a\nb", r"c\td"]
    message = str(unknown_name("x", f"{HOSTILE}a", [HOSTILE]))
    assert "Did you mean" in message and len(message.splitlines()) == 1 and "\t" not in message


@pytest.mark.parametrize("text", ["a\nb", "a\tb", "a\rb", "a\x0bb", "a\x85b", "a\u2029b", "\x1b[1A", "a\0b"])
def test_a_line_has_no_end_within(text):
    assert len(one_line(text).splitlines()) == 1 and one_line(text).isprintable()
    assert one_line(one_line(text)) == one_line(text)


@posix
def test_the_json_of_predict_holds_names_of_any_kind(tool, tmp_path):  # noqa: F811
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    classes = ["日本 é", "two words", '"quoted" \\']
    write(pack(net, image_size=(8, 8), mean=0.5, std=0.25, classes=classes).model, tmp_path / "m.bnnf")
    names = [HOSTILE, "Gräser 日本", os.fsdecode(b"\xff\xfe"), '"', "\\n", "-x", "plain"]
    places = [str(tmp_path / f"{name}.png") for name in names]
    for place in places:
        Image.fromarray(np.full((9, 9, 3), 90, np.uint8)).save(place)
    bad = str(tmp_path / os.fsdecode(b"bad\n\xff.png"))
    with open(bad, "w") as file:
        file.write("no picture")
    code, printed, errors = tool("predict", tmp_path / "m.bnnf", *places, bad, "--json", tmp_path / "r.json")
    assert code == 2 and len(errors.splitlines()) == 1
    result = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert [row["image"] for row in result["images"]] == places and [e["image"] for e in result["errors"]] == [bad]
    assert all({top["class"] for top in row["top"]} == set(classes) for row in result["images"])
    assert printed.splitlines()[-1] == one_line(tmp_path / "r.json")


# -- streams


def run_with(stream: str, *command) -> subprocess.CompletedProcess:
    """A tool with its standard output or error closed or full, as a shell does it."""
    given = [sys.executable, str(ROOT / "tools" / f"{command[0]}.py"), *map(str, command[1:])]
    return subprocess.run(["sh", "-c", f'exec "$@" {stream}', "sh", *given], cwd=ROOT, capture_output=True)


@posix
@pytest.mark.parametrize("stream", [">&-", "> /dev/full"])
def test_output_that_goes_nowhere_is_one_line(stream, tmp_path):
    if "full" in stream and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    for command in (("dump", MODEL), ("train", "--keys")):
        done = run_with(stream, *command)
        said = done.stderr.decode().splitlines()
        assert done.returncode == 2 and len(said) == 1 and said[0].startswith("error: standard output: "), said


@posix
def test_a_closed_error_stream_leaves_output_and_exit_code(tmp_path):
    done = run_with("2>&-", "dump", MODEL)
    assert done.returncode == 0 and b"binary_conv2d" in done.stdout
    assert run_with("2>&-", "dump", "none.bnnf").returncode == 2
    done = run_with("<&- >&- 2>&-", "dump", MODEL, "--json", tmp_path / "x.json")
    assert done.returncode == 2 and not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("bits", [50, pytest.param(62, marks=pytest.mark.thorough)])
def test_memory_that_torch_does_not_get_is_one_line(bits):
    code = f"import torch; from bnnfree.commands import cli; cli.run(lambda: torch.empty(1 << {bits}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: not enough memory. "), done.stderr
    assert len(done.stderr.splitlines()) == 1


@posix
def test_a_current_folder_that_is_gone_is_one_line():
    inside = 'folder=$(mktemp -d) && cd "$folder" && rmdir "$folder" && exec "$@"'
    for name in ("dump", "summary", "compare"):
        command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), str(ROOT / MODEL)]
        done = subprocess.run(["sh", "-c", inside, "sh", *command], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr == (
            "error: current folder: No such file or directory. Go to one that exists, with cd.\n"
        )


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_without_numpy_says_how_to_get_it(name):
    source = MODEL if name in ("dump", "predict", "bench") else "recipes/cifar10_reactnet20.yaml"
    code = BLOCKED.format(packages=("numpy",))
    command = [sys.executable, "-c", code, f"tools/{name}.py", source, *REST.get(name, [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = "numpy, which is not installed. Install it with: pip install -e ."
    assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith(said), done.stderr
    assert "Traceback" not in done.stderr


def test_a_fault_of_ours_keeps_its_traceback():
    code = "from bnnfree.commands import cli; cli.run(lambda: [].pop())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "IndexError" in done.stderr


# -- arguments


@pytest.mark.parametrize("name", TOOLS)
def test_an_empty_argument_is_one_line(tool, tmp_path, monkeypatch, name):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    option = option_of(tool, name)
    for arguments in (["", *REST.get(name, [])], ["recipe.yaml", *REST.get(name, []), option, ""]):
        code, printed, errors = tool(name, *arguments)
        assert code == 2 and printed == "" and "got an empty text" in errors and len(errors.splitlines()) == 1, errors
    assert not list(tmp_path.iterdir())


def option_of(tool, name) -> str:  # noqa: F811
    """The option that names what the tool writes."""
    return "--json" if "\n  --json" in tool(name, "--help")[1] else "--out"


@pytest.mark.parametrize("name", TOOLS)
def test_a_place_of_another_kind_is_refused_before_the_work(tool, tmp_path, monkeypatch, name):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    option = option_of(tool, name)
    takes_file = option == "--json" or name in ("export", "convert")
    for place in ["folder", "/dev/null", "file/x"] if takes_file else ["file", "file/x"]:
        code, printed, errors = tool(name, "recipe.yaml", *REST.get(name, []), option, place)
        assert code == 2 and printed == "" and len(errors.splitlines()) == 1, errors
        assert errors.startswith(f"error: {place}: cannot be written: ") and "File exists" not in errors, errors
    assert (tmp_path / "file").read_text() == "kept" and sorted(os.listdir(tmp_path)) == ["file", "folder"]


@posix
def test_nothing_takes_the_place_of_a_device(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for place in ("/dev/null", "/dev/stdout", tmp_path / "pipe"):
        with pytest.raises(OutputError, match="a device or a pipe"), replacing(place):
            pass


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("none.bnnf", "no such file, expected YAML"), ("none.yaml", "no such file."),
        ("x.bnnf", "tools/dump.py x.bnnf --recipe"),
        ("x.json", "expected YAML (.yaml, .yml)"), ("x.pt", "init=x.pt"), ("folder", "a folder without recipe.yaml"),
    ],
)  # fmt: skip
def test_what_is_no_recipe_is_one_short_line_with_a_remedy(tool, tmp_path, monkeypatch, file, words):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    for name in ("x.bnnf", "x.json", "x.pt"):
        (tmp_path / name).write_bytes(b'{"top1": 3}')
    (tmp_path / "folder").mkdir()
    code, _, errors = tool("train", file)
    assert code == 2 and words in errors and len(errors.splitlines()) == 1 and len(errors) < 200, errors


# -- the last line


def test_the_last_line_is_the_path_of_what_was_written(tool, tmp_path, monkeypatch):  # noqa: F811
    from test_data import write_tree

    monkeypatch.chdir(tmp_path)
    root = write_tree(tmp_path / "images", count=3)
    recipe = {**TINY, "model": {"name": "reactnet20", "width": 0.25}, "stages": [{"epochs": 1}]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "s.yaml").write_text(
        yaml.safe_dump({"recipe": "r.yaml", "grid": {"lr": {"a": {"optimizer.lr": 0.01}}}})
    )
    picture = next(root.rglob("*.png"))
    written = {
        "train": ("r.yaml", "--out", "run"), "evaluate": ("run", "--json", "e.json"),
        "summary": ("run", "--json", "u.json"),
        "export": ("run", "-o", "m.bnnf"), "verify": ("run", "m.bnnf", "--samples", "3", "--json", "v.json"),
        "dump": ("m.bnnf", "--json", "d.json"), "predict": ("m.bnnf", picture, "--json", "p.json"),
        "convert": ("run", "-o", "w.pt"), "shard": (root, "-o", "shards"), "compare": ("run", "--out", "c"),
        "probe": ("run", "--images", "8", "--out", "probed"), "sweep": ("s.yaml", "--table", "--out", "swept"),
        "bench": ("m.bnnf", "--seconds", "0.01", "--json", "b.json"),
        "price": ("r.yaml", "--norms", "none", "--seconds", "0.01", "--batch", "4", "--out", "priced"),
    }  # fmt: skip
    assert sorted(written) == TOOLS
    for name, arguments in written.items():
        code, printed, errors = tool(name, *arguments)
        assert code == 0 and printed.splitlines()[-1] == arguments[-1], (name, printed, errors)
        assert os.path.exists(arguments[-1])
        if name == "convert":
            assert len(printed.splitlines()) == 2 and errors == ""
        if name == "price":
            assert "left" in errors and "training: 100%" in errors


def test_a_log_of_a_training_has_its_lines_before_the_bar(tmp_path):
    """With both streams in one file, as a scheduler writes it."""
    stages = [{"name": "first", "epochs": 1, "binarize": "activations"}, {"name": "both", "epochs": 1}]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**TINY, "stages": stages}))
    command = [sys.executable, "tools/train.py", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = done.stdout.splitlines()
    counts = [number for number, line in enumerate(lines) if line.startswith("training: ")]
    before, after = lines[: counts[0]], lines[counts[0] :]
    assert lines[0].startswith("images 9x9x3") and any(line.startswith("warning: ") for line in before)
    assert [line.split(" (")[0] for line in before if line.startswith("stage ")] == ["stage 0", "stage 1", "stage 1"]
    assert "stage 0 (" not in "\n".join(after) and "\r" not in done.stdout
    assert re.fullmatch(r"training: 100% 10/10 steps, \d+ s, 0 s left, stage both, epoch 2, loss .*", lines[counts[-1]])
    assert lines[-1] == str(tmp_path / "run")


# -- recipes of others, recipes that are changed


def test_every_key_of_the_data_is_a_place_a_matter_of_the_machine_or_a_description():
    known = [*PLACES, *MACHINE, *DESCRIBING]
    assert sorted(known) == sorted(DataRecipe.model_fields)
    full = {"data": {**{key: 1 for key in known}, "unknown": 1}}
    assert set(without_places(full, local=False)["data"]) == set(DESCRIBING)
    assert set(without_places(full)["data"]) == {*DESCRIBING, *PLACES}
    assert without_places({"data": None}) == {"data": {}}


def test_an_override_that_only_the_own_normaliser_reads_is_left_out_beside_another():
    recipe = ROOT / "recipes" / "cifar10_reactnet20.yaml"
    mine, changes = ["free.group=4", "model.width=0.5"], ["model.norm=bn", "model.norm_options={}"]
    fitting, left = load_fitting(recipe, by_key([*mine, *changes]), by_key(mine), MODELS)
    assert (fitting.model.norm, fitting.model.width) == ("bn", 0.5) and set(left) == {"free.group"}
    with pytest.raises(UnreadError, match=r"free\.group"):
        load_fitting(recipe, by_key([*mine, *changes]), (), MODELS)
    with pytest.raises(BnnfreeError, match=r"model\.wdth"):
        load_fitting(recipe, by_key(["model.wdth=1", *changes]), ["model.wdth"], MODELS)


@pytest.mark.thorough
def test_training_is_measured_beside_bn_whatever_is_said_of_free(tool, tmp_path):  # noqa: F811
    options = ("model.width=0.25", "data.name=fake", "data.samples=64", "data.image_size=8", "free.group=4")
    measured = (
        "--contenders",
        "bn",
        "--batch",
        4,
        "--precision",
        "fp32",
        "--seconds",
        0.1,
        "--json",
        tmp_path / "t.json",
    )
    code, printed, errors = tool("bench", "--train", ROOT / "recipes" / "cifar10_reactnet20.yaml", *options, *measured)
    assert code == 0, errors
    race = json.loads((tmp_path / "t.json").read_text())["train"]["fp32"]["4"]
    assert set(race["contenders"]) == {"ours", "bn"} and race["left_out"] == {}
