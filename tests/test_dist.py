"""Two processes train exactly as one does at the same global batch."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, TINY, double_stage, tiny

from bnnfree.train import dist as processes


def worker(rank: int, port: int, folder: str, options: tuple[str, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    dist = processes.start("cpu")
    with pytest.MonkeyPatch.context() as patch:
        stage = double_stage(patch, tiny(*options, "data.batch_size=14", "agc.clip=0.02"), dist)
        stage.train_epoch(lambda: None)
    torch.save((stage.model.state_dict(), stage.state()["precondition"]), f"{folder}/{rank}.pt")
    processes.stop()


@pytest.mark.parametrize(
    "options",
    [
        ("model.norm=free",),
        pytest.param(("model.norm=free_paper",), marks=pytest.mark.slow),  # python -m pytest -m slow tests/test_dist.py
        ("model.norm=free", "optimizer.precondition=bnp", "optimizer.name=sgd", "accumulate=2"),
    ],
    ids=["free", "free_paper", "bnp"],
)
def test_two_gloo_processes_equal_one(tmp_path, monkeypatch, options):
    """In float64 to 1e-9; batches of 14 over 72 images, so the last one is smaller and odd parts occur."""
    port = 20000 + os.getpid() % 20000 + len("".join(options))
    torch.multiprocessing.spawn(worker, (port, str(tmp_path), options), nprocs=2)
    alone = double_stage(monkeypatch, tiny(*options, "data.batch_size=14", "agc.clip=0.02"))
    alone.train_epoch(lambda: None)
    (first, moments), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for key, value in alone.model.state_dict().items():
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)
        torch.testing.assert_close(first[key], value, rtol=1e-9, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")
    assert_close_moments(moments, alone.state()["precondition"])


def assert_close_moments(ours, theirs):
    """The running statistics of a preconditioner, if there is one."""
    assert (ours is None) == (theirs is None)
    for name, part in (theirs or {}).items():
        for key, value in part.items():
            torch.testing.assert_close(ours[name][key], value, rtol=1e-9, atol=1e-9)


def test_torchrun_trains_to_a_result(tmp_path):
    import yaml

    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["tools/train.py", str(tmp_path / "tiny.yaml"), "stages.0.epochs=1", "stages.1.epochs=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run")], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "result.json").exists()
    assert done.stdout.strip().splitlines()[-1] == str(tmp_path / "run")
