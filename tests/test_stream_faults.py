"""Streamed images where the system has little room, and data that changed since a run began."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import cut_at, train
from test_data import options, write_tree
from test_images import joined, same

from bnnfree.data import file_split, tar_index
from bnnfree.data.datasets import load_data
from bnnfree.errors import BnnfreeWarning, CheckpointError
from bnnfree.train import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
READ = """
import sys, warnings, torch
sys.path[:0] = ["tests"]
from test_data import options
from bnnfree.data.datasets import load_data
from test_images import joined, same
given = dict(name="image_folder", root=sys.argv[1], image_size=80, cache=sys.argv[1] + "-cache")
alone = joined(load_data(options(**given)).train.train_batches(16, seed=0, epoch=0))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    helped = joined(load_data(options(workers=3, **given)).train.train_batches(16, seed=0, epoch=0))
assert same(alone, helped)
print([str(each.message) for each in caught])
"""


@pytest.mark.parametrize("room, said", [("64k", "read in this one"), ("320k", "pipes")])
def test_images_are_read_where_shared_memory_is_small(tmp_path, room, said):
    """In a namespace of its own /dev/shm is a tmpfs of `room`."""
    root = write_tree(tmp_path / "root", count=24, size=(90, 85), ending="jpg")
    space = ["unshare", "-m", "bash", "-c"]
    mount = f"mount -t tmpfs -o size={room} tmpfs /dev/shm"
    if shutil.which("unshare") is None or subprocess.run([*space, mount], capture_output=True).returncode:
        pytest.skip("needs the right to mount: root, and unshare")
    run = f'{mount} && exec "$@"'
    done = subprocess.run(
        [*space, run, "bash", sys.executable, "-c", READ, root], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout and "docker run --shm-size" in done.stdout and "Traceback" not in done.stderr


def test_where_processes_find_no_room_images_are_read_all_the_same(tmp_path, monkeypatch):
    root = write_tree(tmp_path / "root", count=4, size=(90, 85), ending="jpg")
    given = dict(name="image_folder", root=str(root), image_size=80, cache=str(tmp_path / "cache"))
    alone = joined(load_data(options(**given)).train.batches(3))

    def refused(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.multiprocessing, "Semaphore", refused)
    assert not file_split.room_for_processes(1)
    with pytest.warns(BnnfreeWarning, match=r"no room for the 3 processes that read images.*in this one"):
        assert same(joined(load_data(options(workers=3, **given)).train.batches(3)), alone)


# ---- data that changed


@pytest.fixture(params=["files", "shards"])
def begun(request, tmp_path, monkeypatch):
    """(folder of a run that was cut, its options, root of its data, a function that makes the data from the root)."""
    root = write_tree(tmp_path / "root", count=8, size=(90, 70), ending="jpg")
    given = ["data.name=image_folder", f"data.root={root}"]
    if request.param == "shards":
        given = ["data.name=shards", f"data.root={tmp_path / 'out'}"]

    def make():
        if request.param == "shards":
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            tar_index.write(str(root), tmp_path / "out", size=2 * 10**4)

    make()
    given += ["data.image_size=65", "data.batch_size=4", "data.workers=0", f"data.cache={tmp_path / 'cache'}"]
    given += ["stages=[{epochs: 2}]", "checkpoint_minutes=0.0001", "data.val_fraction=0.2"]
    with monkeypatch.context() as patch:
        cut_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", *given)
    return tmp_path / "run", given, root, make


def change(root, how):
    """Change the training images: `how` says in what way."""
    first, second = (root / "train" / "ant" / f"{number}.jpg" for number in (0, 1))
    if how == "fewer":
        first.unlink()
    elif how == "many fewer":
        for number in range(6):
            (root / "train" / "ant" / f"{number}.jpg").unlink()
    elif how == "more":
        shutil.copy(first, root / "train" / "ant" / "9.jpg")
    elif how == "other size":
        first.write_bytes(second.read_bytes() + bytes(7))
    elif how == "other class":
        os.replace(first, root / "train" / "bee" / "9.jpg")


@pytest.mark.parametrize("how", ["fewer", "many fewer", "more", "other size", "other class"])
def test_images_that_changed_since_the_run_began_are_noticed(begun, how):
    folder, given, root, make = begun
    before = (folder / "last.pt").read_bytes()
    change(root, how)
    make()
    with pytest.raises(CheckpointError, match=r"was trained on other data: (train|val) had \d+ images, now") as caught:
        train(folder, *given, resume=True)
    assert "\n" not in str(caught.value) and (folder / "last.pt").read_bytes() == before


def test_the_same_images_in_another_place_are_the_same(begun, tmp_path):
    folder, given, root, _ = begun
    source = next(each for each in given if each.startswith("data.root=")).removeprefix("data.root=")
    os.replace(source, tmp_path / "moved")
    given = [f"data.root={tmp_path / 'moved'}" if each.startswith("data.root=") else each for each in given]
    assert train(folder, *given, resume=True)["epochs"] == 2
    assert set(load_checkpoint(folder / "last.pt")["listing"]) == {"train", "val", "test"}


def test_a_run_resumes_to_the_same_bits_with_policies_and_mixtures(tmp_path, monkeypatch):
    more = ("data.augment=[crop, randaugment, mixup, cutmix]", "data.mix_alpha=0.4", "accumulate=2")
    whole = train(tmp_path / "whole", *more)
    with monkeypatch.context() as patch:
        cut_at(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut", *more, "checkpoint_minutes=0.0001")
    train(tmp_path / "cut", *more, resume=True)
    ours, theirs = (load_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("cut", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert whole["epochs"] and json.loads((tmp_path / "cut" / "result.json").read_text())["test_top1"] is not None
