"""Measuring how fast images come: the numbers are those of the work done. Must not import recipes' files."""

from __future__ import annotations

import importlib
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers import filled_pages
from PIL import Image
from test_data import options

from bnnfree.bench import reading
from bnnfree.data import file_split
from bnnfree.data.datasets import load_data
from bnnfree.errors import BnnfreeError, DataError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def one_thread():
    """Keep the tests from competing with each other for cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """(folder, what make_tree says of it): 26 names of 9 small files in 2 classes."""
    folder = tmp_path_factory.mktemp("feed") / "tree"
    return folder, reading.make_tree(folder, 26, 2, distinct=9, size=(90, 70))


@pytest.fixture
def split(tree):
    return load_data(options(name="image_folder", root=str(tree[0]), image_size=65)).train


def test_a_tree_is_an_image_folder_of_so_many_names(tree):
    folder, about = tree
    files = sorted(folder.rglob("*.JPEG"))
    assert len(files) == about["files"] == 26
    assert len({os.stat(file).st_ino for file in files}) == about["distinct"] == 9
    loaded = load_data(options(name="image_folder", root=str(folder), image_size=65))
    assert (len(loaded.train), len(loaded.test), loaded.classes) == (24, 2, ["class0000", "class0001"])
    assert loaded.train.labels.bincount().tolist() == [12, 12] and loaded.test.labels.tolist() == [0, 1]
    with Image.open(files[0]) as image:
        assert image.size == (90, 70) and image.format == "JPEG"
    sizes = [file.stat().st_size for file in files]
    assert about["smallest_bytes"] == min(sizes) and about["largest_bytes"] == max(sizes)


def test_a_tree_is_the_same_for_the_same_seed_only(tree, tmp_path):
    for name, seed in (("again", 0), ("other", 1)):
        reading.make_tree(tmp_path / name, 26, 2, distinct=9, size=(90, 70), seed=seed)
    first = "train/class0001/image_00000001.JPEG"
    assert (tree[0] / first).read_bytes() == (tmp_path / "again" / first).read_bytes()
    assert (tree[0] / first).read_bytes() != (tmp_path / "other" / first).read_bytes()


def test_synthetic_files_are_as_large_as_photos(tmp_path):
    about = reading.make_tree(tmp_path / "tree", 24, 1)
    assert about["distinct"] == 24 and 90_000 < about["mean_bytes"] < 130_000
    assert about["smallest_bytes"] < 90_000 and about["largest_bytes"] > 140_000


@pytest.mark.parametrize(
    "given", [dict(files=3, classes=2), dict(files=9, classes=0), dict(files=9, classes=1, distinct=0)]
)
def test_a_tree_that_cannot_be_is_refused(tmp_path, given):
    with pytest.raises(DataError, match="make_tree: got"):
        reading.make_tree(tmp_path / "tree", **given)
    (tmp_path / "file").write_text("here")
    with pytest.raises(DataError, match="not empty"):
        reading.make_tree(tmp_path, 9, 1)


def test_phases_tell_where_the_time_goes(split, monkeypatch):
    assert set(reading.phases(split, 0.05)) == set(reading.PHASES)
    slow = file_split.Files.read

    def read(self, index):
        time.sleep(0.02)
        return slow(self, index)

    monkeypatch.setattr(file_split.Files, "read", read)
    spent = reading.phases(split, 0.3)
    assert spent["read"] > 20 and spent["decode"] < 15


@pytest.mark.parametrize("workers", [0, 1])
def test_the_rate_is_that_of_the_images_delivered(split, monkeypatch, workers):
    def sample(self, index, seed):
        time.sleep(0.005)
        return torch.zeros(3, 65, 65, dtype=torch.uint8)

    monkeypatch.setattr(file_split.Reader, "sample", sample)
    images, _ = reading.rate(split, workers, 0.5, batch_size=4)
    assert 60 < images < 200, "at most 1 / 0.005 s"


def test_seconds_that_are_computed_leave_out_waiting(split, monkeypatch):
    slow = file_split.Files.read

    def read(self, index):
        time.sleep(0.01)
        return slow(self, index)

    monkeypatch.setattr(file_split.Files, "read", read)
    images, computed = reading.rate(split, 0, 0.3, batch_size=4)
    assert images < 100 < computed


def test_bad_images_do_not_stop_a_measurement(tree, tmp_path):
    reading.make_tree(tmp_path / "tree", 26, 2, size=(90, 70))
    next((tmp_path / "tree" / "train").rglob("*.JPEG")).write_bytes(b"")
    split = load_data(options(name="image_folder", root=str(tmp_path / "tree"), image_size=65, bad_images="skip")).train
    with pytest.warns(UserWarning, match="left out of their batches"):
        assert reading.rate(split, 0, 0.2)[0] > 0
    assert reading.phases(split, 0.2)["decode"] > 0


def test_cores_are_rounded_up():
    assert [reading.cores_needed(2500, per_core) for per_core in (500, 499, 2500, 10_000)] == [5, 6, 1, 1]


def test_memory_grows_by_what_is_held():
    held, seconds, grown = reading.memory(lambda: filled_pages(100_000_000))
    assert len(held) == 100_000_000 and seconds > 0
    assert grown is None or 90e6 < grown < 120e6


@pytest.fixture
def bench_data():
    return importlib.import_module("bnnfree.bench.reading_report").bench_data


@pytest.fixture
def recipe(tmp_path, tree):
    data = {"name": "image_folder", "root": str(tree[0]), "image_size": 65, "augment": ["crop", "flip"]}
    text = {"model": {"name": "reactnet18"}, "data": data, "stages": [{"epochs": 1}]}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(text))
    return tmp_path / "x.yaml"


def test_the_tool_part_reports_what_it_prints(bench_data, recipe, capsys):
    report = bench_data(SimpleNamespace(source=str(recipe), overrides=["data.val_fraction=0"], seconds=0.5, feeds=1e6))
    text = capsys.readouterr().out
    assert json.loads(json.dumps(report)) == report
    assert report["images"] == 24 and set(report["rates"]) >= {"0", "1", str(report["cores"])}
    assert report["feeds"] == {"images_per_second": 1e6, "cores": reading.cores_needed(1e6, report["per_core"])}
    assert f"needs {report['feeds']['cores']} cores" in text and "24 to train on" in text
    assert f"{report['rates']['1']:.0f}" in text


@pytest.mark.parametrize("changes, said", [
    ({"feeds": 0.0}, "--feeds: got 0.0"),
    ({"feeds": float("nan")}, "--feeds: got nan"),
    ({"source": None}, "SOURCE: got none"),
    ({"overrides": ["data.name=fake"]}, "held in memory"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused(bench_data, recipe, changes, said):
    given = {"source": str(recipe), "overrides": [], "seconds": 0.1, "feeds": None}
    with pytest.raises(BnnfreeError, match=said):
        bench_data(SimpleNamespace(**(given | changes)))
