"""The packed models of the repository are those that were measured, and run everywhere with the same bits."""

import hashlib
import json
import os
import re

import numpy as np
import pytest
from helpers import ROOT
from test_tools import tool  # noqa: F401

from bnnfree.engine import backends, load

FOLDER = ROOT / "models" / "pretrained"
DATA = os.environ.get("BNNFREE_CIFAR10")
ROW = re.compile(r"\| `(?P<file>[\w.]+)` \| (?P<bytes>[\d,]+) \| (?P<top1>[\d.]+) \| `(?P<sha256>\w+)` \|")
ROWS = [match.groupdict() for match in ROW.finditer((FOLDER / "README.md").read_text())]
NAMES = [row["file"] for row in ROWS]


def test_each_file_has_a_row_and_a_log():
    assert sorted(NAMES) == sorted(path.name for path in FOLDER.glob("*.bnnf")) != []
    assert all((FOLDER / name).with_suffix(".jsonl").is_file() for name in NAMES)


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_a_file_is_the_one_that_was_measured(row):
    data = (FOLDER / row["file"]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == row["sha256"]
    assert len(data) == int(row["bytes"].replace(",", "")) <= 1_500_000
    log = [json.loads(line) for line in (FOLDER / row["file"]).with_suffix(".jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == list(range(1, len(log) + 1))
    assert abs(max(line["val_top1"] for line in log) - float(row["top1"])) < 2  # other images of the same kind


@pytest.mark.parametrize("name", NAMES)
def test_every_backend_has_the_same_bits_and_images_differ_in_class(name):
    """One class for everything would be a network that has collapsed."""
    engines = [load(FOLDER / name, backend) for backend in backends()]
    info = engines[0].info()
    (height, width), channels = info["image_size"], info["channels"]
    random = np.random.default_rng(0)
    smooth = np.linspace(0, 255, height * width * channels).reshape(1, height, width, channels).astype(np.uint8)
    images = np.concatenate([random.integers(0, 256, (30, height, width, channels), np.uint8), smooth, smooth[:, ::-1]])
    logits = [engine.run(images) for engine in engines]
    assert all(np.array_equal(other, logits[0]) for other in logits[1:])
    assert len(set(logits[0].argmax(1).tolist())) > 1


@pytest.mark.slow  # BNNFREE_CIFAR10=FOLDER python -m pytest -m slow -n 0 tests/test_pretrained.py
@pytest.mark.skipif(not DATA, reason="BNNFREE_CIFAR10 names no folder of CIFAR-10 images")
@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_its_accuracy_is_what_is_said(tool, tmp_path, row):  # noqa: F811
    code, _, errors = tool("evaluate", FOLDER / row["file"], f"data.root={DATA}", "--json", tmp_path / "f.json")
    assert code == 0, errors
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["images"] == 10_000
    assert figures["top1"] == pytest.approx(float(row["top1"]), abs=0.05)  # JPEG decoders differ in a bit
