"""A checkpoint is refused, in one line, as soon as a byte of it is another; so is what no training wrote."""

import copy
import errno
import io
import random
import struct
import zipfile

import pytest
import torch
from helpers import assert_same, train

from bnnfree.errors import BnnfreeError, CheckpointError
from bnnfree.models import MODELS
from bnnfree.train import load_checkpoint, load_model
from bnnfree.train.checkpoint import save_checkpoint
from bnnfree.train.sealed import LENGTH, SEAL


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one epoch."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(folder, "stages=[{epochs: 1}]")
    return folder


def resume(folder):
    return train(folder, "stages=[{epochs: 1}]", resume=True)


def test_a_byte_that_changes_anywhere_is_an_error(tmp_path, run):
    raw = (run / "best.pt").read_bytes()
    draw, path = random.Random(0), tmp_path / "x.pt"
    places = draw.sample(range(len(raw)), 150) + list(range(16)) + list(range(len(raw) - LENGTH - 24, len(raw)))
    for at in places:
        damaged = bytearray(raw)
        damaged[at] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value), at


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, -1, -LENGTH, -LENGTH - 1])
def test_a_file_that_is_cut_is_an_error(tmp_path, run, kept):
    raw = (run / "best.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(raw[: int(len(raw) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "x.pt")


def test_files_of_before_have_no_seal_and_open_but_not_damaged(tmp_path):
    state = {"kind": "bnnfree checkpoint", "version": 1, "model": {"w": torch.arange(4000.0)}}
    torch.save(state, tmp_path / "x.pt")
    assert_same(load_checkpoint(tmp_path / "x.pt"), state)
    raw = bytearray((tmp_path / "x.pt").read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "x.pt").write_bytes(raw)
    with pytest.raises(CheckpointError, match="damaged: the checksum of"):
        load_checkpoint(tmp_path / "x.pt")


def test_compressed_members_are_refused_before_they_are_unpacked(tmp_path):
    save_checkpoint(tmp_path / "x.pt", {"model": {"w": torch.zeros(1 << 20)}})
    with zipfile.ZipFile(tmp_path / "x.pt") as stored, zipfile.ZipFile(tmp_path / "z.pt", "w", 8) as packed:
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    assert (tmp_path / "z.pt").stat().st_size < 50_000
    with pytest.raises(CheckpointError, match="compressed"):
        load_checkpoint(tmp_path / "z.pt")


def test_members_that_claim_more_than_the_file_are_refused(tmp_path):
    save_checkpoint(tmp_path / "x.pt", {"model": {"w": torch.zeros(100_000)}})
    raw = bytearray((tmp_path / "x.pt").read_bytes())
    entry = raw.rindex(b"PK\x01\x02", 0, raw.rindex(b"data/0"))
    for at in (20, 24):  # both sizes of the directory's entry
        raw[entry + at : entry + at + 4] = struct.pack("<I", 1 << 30)
    raw[-LENGTH - 2 :] = b"\0\0"
    (tmp_path / "x.pt").write_bytes(raw)
    with pytest.raises(CheckpointError, match="claim more bytes"):
        load_checkpoint(tmp_path / "x.pt")


def looped():
    loop: list = []
    loop.append(loop)
    return loop


ODD = {  # dotted key -> values that no training writes there (DELETED: the key is gone)
    "version": [None, "1", 1.5, -1, 0, [], True],
    "recipe": [None, [], 3, {}, {"model": 3}, {"model": {"norm": "free"}}, {1: 2}],
    "recipe.model": [None, [], {"name": 3}],
    "recipe.model.width": [1e6, -1.0, "wide"],
    "binarize": [None, "all", 7],
    "data": [None, [], {}],
    "data.classes": [None, 7, [], [1, 2], "abc"],
    "data.channels": [-1, 0, 2**40, "3", None],
    "data.image_size": [None, [], [9], ["a", "b"], [-1, 9]],
    "model": [None, [], {}, {1: torch.zeros(1)}, {"w": 3}, {"w": torch.zeros(1)}, looped()],
    "ema": [3, {"w": 1}, {"w": torch.zeros(2)}],
    "open": [None, {}, [3], "x"],
    "recipe.model.centre_head": [None, 3, "x"],
    "recipe.model.stem": ["auto", "no", 3],
    "recipe.agc.clip": ["auto", "x", [1]],
}
PROGRESS = {  # those that matter only where a training goes on
    "stage": [None, -1, 99, "0"],
    "epoch": [None, -1, 99],
    "step": [None, -1, 10**9],
    "optimizers": [None, {}, [], [3], [{}]],
    "sums": [None, 3],
    "signs": [None, {"x": 3}],
    "clip_rate": [3],
    "history": [None, {}, [3]],
    "best": [None, {}, {"top1": "x", "epoch": 1}],
    "seconds": [None, "x"],
    "origin": [None],
    "rng": [None, torch.zeros(3), torch.zeros(3, dtype=torch.uint8)],
    "cuda_rng": [None],
    "process_sums": [3, torch.zeros(0, 3)],
}
DELETED = object()


def with_odd(state, key, value):
    state = copy.deepcopy(state)
    node, *rest = state, *key.split(".")
    for part in rest[:-1]:
        node = node[part]
    if value is DELETED:
        del node[rest[-1]]
    else:
        node[rest[-1]] = value
    return state


@pytest.mark.parametrize("key", ODD)
def test_a_checkpoint_with_an_odd_value_is_one_line(tmp_path, run, key):
    state = load_checkpoint(run / "best.pt")
    for value in ODD[key] + ([] if key == "recipe.model.width" else [DELETED]):
        save_odd(tmp_path / "x.pt", with_odd(state, key, value))
        with pytest.raises(BnnfreeError) as caught:
            load_model(tmp_path / "x.pt", MODELS)
        assert len(str(caught.value)) < 600 and str(caught.value).count("\n") <= 4, (key, value)


@pytest.mark.parametrize("key", [*PROGRESS, "model", "open", "recipe.model.stem"])
def test_so_it_is_where_a_training_goes_on_and_nothing_is_lost(tmp_path, run, key):
    state = load_checkpoint(run / "last.pt")
    values = {**ODD, **PROGRESS}[key] + ([DELETED] if key not in ("process_sums",) else [])
    (tmp_path / "recipe.yaml").write_bytes((run / "recipe.yaml").read_bytes())
    for value in values:
        save_odd(tmp_path / "last.pt", with_odd(state, key, value))
        before = (tmp_path / "last.pt").read_bytes()
        with pytest.raises(BnnfreeError) as caught:
            resume(tmp_path)
        assert "\n" not in str(caught.value), (key, value)
        assert (tmp_path / "last.pt").read_bytes() == before


def save_odd(path, state):
    """`save_checkpoint` of a state with its own version, whatever that is."""
    version = state.get("version", DELETED)
    save_checkpoint(path, state)
    if version == 3:
        return
    state = {**load_checkpoint(path), "version": version}
    if version is DELETED:
        del state["version"]
    torch.save(state, path)


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1).expand(1 << 40), torch.zeros(3, device="meta"), torch.eye(3).to_sparse()],
    ids=["expanded", "meta", "sparse"],
)
def test_tensors_that_are_not_what_they_claim_are_refused(tmp_path, tensor):
    torch.save({"kind": "bnnfree checkpoint", "version": 1, "model": {"w": tensor}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("content", [b"", b"\x80\x02.", b"garbage" * 99, b"PK\x03\x04" * 50, b"PK\x05\x06" + bytes(18)])
def test_files_of_another_kind_are_one_line(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "x.pt")
    assert "\n" not in str(caught.value)


def test_a_torn_best_says_the_way_and_the_way_works(tmp_path, run):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "best.pt").write_bytes((folder / "best.pt").read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"Delete it, then --resume .* last\.pt"):
        resume(folder)
    (folder / "best.pt").unlink()
    result = resume(folder)
    assert result["best_epoch"] == 1 and load_model(folder, MODELS)


def test_a_full_disk_is_said_so_and_the_file_before_stays(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    save_checkpoint(path, {"model": {"w": torch.zeros(3)}})

    def full(state, file):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 1792512 vs 1792400")  # noqa: B904, as torch does

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"x\.pt: cannot be written: disk full\."):
        save_checkpoint(path, {"model": {"w": torch.ones(3)}})
    monkeypatch.undo()
    assert torch.equal(load_checkpoint(path)["model"]["w"], torch.zeros(3))
    assert [each.name for each in tmp_path.iterdir()] == ["x.pt"]


def test_a_sealed_file_is_what_torch_wrote_and_a_comment(tmp_path):
    save_checkpoint(tmp_path / "x.pt", {"model": {"w": torch.ones(5)}})
    raw = (tmp_path / "x.pt").read_bytes()
    assert raw[-LENGTH:].startswith(SEAL)
    assert torch.equal(torch.load(io.BytesIO(raw), weights_only=True)["model"]["w"], torch.ones(5))
