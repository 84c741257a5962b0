"""tools/predict.py as a user without torch meets it."""

import json
import subprocess
import sys

import numpy as np
import pytest
import test_tools
import torch
from helpers import ROOT
from packed import Net, fields_of
from PIL import Image
from torch import nn

from bnnfree import ops
from bnnfree.engine import load
from bnnfree.export import export
from bnnfree.format import write
from bnnfree.nn import BinaryConv2d, RSign
from bnnfree.preprocess import load_image

tool = test_tools.tool
CLASSES = ["cat", "dog", "übergroßer Wal", "d", "e", "f", "g"]
SIZE = (9, 12)


class Tiny(nn.Module):
    """Odd sizes, one binary layer, H != W."""

    def __init__(self, channels, softmax=False):
        super().__init__()
        self.stem = nn.Conv2d(channels, 5, 3, padding=1)
        self.sign = RSign(5)
        self.inner = BinaryConv2d(5, 33, 3, padding=1)
        self.head = nn.Linear(33, len(CLASSES))
        self.softmax = softmax

    def forward(self, x):
        y = self.head(self.inner(self.sign(self.stem(x))).mean((2, 3)))
        return torch.softmax(y, 1) if self.softmax else y


@pytest.fixture
def make(tmp_path):
    """make(channels=3, softmax=False, **options) -> path of a packed model."""

    def made(channels=3, softmax=False, **options):
        torch.manual_seed(0)
        path = tmp_path / "model.bnnf"
        options = {"classes": CLASSES, "mean": 0.5, "std": 0.25, **options}
        export(Tiny(channels, softmax), path, image_size=SIZE, channels=channels, **options)
        return path

    return made


@pytest.fixture
def photos(tmp_path):
    """Three image files of different sizes and kinds."""
    random = np.random.default_rng(0)
    paths = []
    for name, shape in (("a.png", (20, 31, 3)), ("grey.png", (9, 12)), ("c.bmp", (7, 40, 3))):
        paths.append(tmp_path / name)
        Image.fromarray(random.integers(0, 256, shape, np.uint8)).save(paths[-1])
    return paths


def expected(model, path, channels=3, resize="square"):
    """Probabilities of one image."""
    scores = load(model).run(load_image(path, SIZE, channels, resize)[None])
    return ops.softmax(scores)[0]


def blocks(printed):
    """file -> [(percent, class), ...] in order, from what the tool prints."""
    found = {}
    for block in printed.strip("\n").split("\n\n"):
        name, *rows = block.splitlines()
        found[name] = [(float(row.split(" %  ")[0]), row.split(" %  ")[1]) for row in rows]
    return found


@pytest.mark.parametrize("resize", [None, "square", "centre"])
@pytest.mark.parametrize("channels", [1, 3])
def test_each_image_gets_its_five_most_probable_classes(tool, make, photos, channels, resize):
    model = make(channels, resize=resize)
    code, printed, errors = tool("predict", model, *photos)
    assert code == 0, errors
    found = blocks(printed)
    assert list(found) == [str(path) for path in photos]
    for path in photos:
        shares = expected(model, path, channels, resize or "square")
        order = np.argsort(-shares)[:5]
        assert [name for _, name in found[str(path)]] == [CLASSES[i] for i in order]
        np.testing.assert_allclose([p for p, _ in found[str(path)]], 100 * shares[order], atol=0.0051)


def test_a_network_that_ends_in_softmax_gets_no_second_one(tool, make, photos, tmp_path):
    results = []
    for softmax in (False, True):
        assert tool("predict", make(softmax=softmax), photos[0], "--json", tmp_path / "r.json")[0] == 0
        results.append(json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["images"])
    assert results[0] == results[1]


def test_json_holds_what_is_printed_and_its_path_comes_last(tool, make, photos, tmp_path):
    model, path = make(), tmp_path / "out" / "r.json"
    code, printed, errors = tool("predict", model, *photos, "--top", 2, "--json", path, "--threads", 2)
    assert code == 0 and printed.splitlines()[-1] == str(path), errors
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["model"] == str(model) and result["errors"] == []
    assert [entry["image"] for entry in result["images"]] == [str(p) for p in photos]
    for entry in result["images"]:
        shares = expected(model, entry["image"])
        assert [top["index"] for top in entry["top"]] == np.argsort(-shares)[:2].tolist()
        assert [top["probability"] for top in entry["top"]] == np.sort(shares)[::-1][:2].tolist()
        assert [top["class"] for top in entry["top"]] == [CLASSES[top["index"]] for top in entry["top"]]


def test_options_change_how_it_runs_and_not_what_it_says(tool, make, photos):
    model = make()
    printed = {
        tool("predict", model, *photos, *options)[1]
        for options in ((), ("--backend", "reference"), ("--backend", "numpy", "--threads", 3))
    }
    assert len(printed) == 1
    assert all(len(rows) == len(CLASSES) for rows in blocks(tool("predict", model, *photos, "--top", 99)[1]).values())


def test_without_class_names_their_numbers_are_given(tool, make, photos):
    code, printed, _ = tool("predict", make(classes=()), photos[0], "--top", 99)
    assert code == 0
    assert sorted(name for _, name in blocks(printed)[str(photos[0])]) == [str(i) for i in range(len(CLASSES))]


def test_bad_images_are_named_after_the_others_are_done(tool, make, photos, tmp_path):
    text, gone = tmp_path / "text.png", tmp_path / "gone.png"
    text.write_text("not a picture")
    code, printed, errors = tool("predict", make(), photos[0], text, gone, photos[1], "--json", tmp_path / "r.json")
    assert code == 2 and "Traceback" not in errors
    shown, path, _ = printed.rsplit("\n", 2)
    assert list(blocks(shown)) == [str(photos[0]), str(photos[1])] and path == str(tmp_path / "r.json")
    assert [name for name in ("text.png", "gone.png") if name in errors] == ["text.png", "gone.png"]
    assert len(errors.strip().splitlines()) == 2
    result = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert len(result["images"]) == 2 and [e["image"] for e in result["errors"]] == [str(text), str(gone)]


def test_what_cannot_be_is_one_line_that_says_what_can(tool, make, photos, tmp_path):
    model, other = make(), tmp_path / "other.bnnf"
    net = Net(5, 4, 3)
    write(net.model(net.real(2)), other)
    hyper = tmp_path / "hyper.bnnf"
    net = Net(2, 2, 5)
    write(net.model(net.add("pixel_conv2d", 0, outputs=3, **fields_of((2, 2)))), hyper)
    resized = tmp_path / "resized.bnnf"
    net = Net(2, 2, 3)
    pooled = net.add("pixel_conv2d", 0, outputs=3, **fields_of((2, 2)))
    write(net.model(pooled, metadata={"resize": "squarish"}), resized)
    (tmp_path / "x.bnnf").write_text("hello")
    for arguments, words in (
        ((model, photos[0], "--top", 0), ["--top", "got 0"]),
        ((model, photos[0], "--threads", 0), ["threads", "got 0"]),
        ((model, photos[0], "--backend", "nunpy"), ["backend", "numpy", "Did you mean"]),
        ((tmp_path / "none.bnnf", photos[0]), ["none.bnnf"]),
        ((tmp_path / "x.bnnf", photos[0]), ["x.bnnf"]),
        ((other, photos[0]), ["other.bnnf", "map of 5x4"]),
        ((hyper, photos[0]), ["hyper.bnnf", "5 channels"]),
        ((resized, photos[0]), ["resized.bnnf", "resize", "square, centre"]),
    ):
        code, printed, errors = tool("predict", *arguments)
        assert code == 2 and printed == "" and len(errors.strip().splitlines()) == 1, errors
        assert all(word in errors for word in words), errors


def test_it_runs_where_only_numpy_and_pillow_are_installed(make, photos):
    model = make()
    blocked = ("torch", "torchvision", "tqdm", "yaml", "pydantic", "matplotlib", "sklearn", "onnx")
    code = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({blocked})); sys.path.insert(0, 'tools')\n"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, "tools/predict.py", str(model), str(photos[0])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert list(blocks(done.stdout)) == [str(photos[0])]
    code = code.replace("'onnx'", "'PIL'")
    command[2] = code
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 2 and 'pip install -e ".[predict]"' in done.stderr and "Traceback" not in done.stderr
