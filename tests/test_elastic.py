"""One of two workers is killed with SIGKILL under torchrun: all start again and end with the undisturbed run's bits."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, TINY, assert_same, metrics_of

from bnnfree.train import load_checkpoint

STAGES = [{"name": "activations", "binarize": "activations", "epochs": 1}, {"name": "both", "epochs": 2}]
DATA = {**TINY["data"], "samples": 320, "batch_size": 15}  # 288 images: processes have 8 and 7 of a batch, 2 and 1 last
RECIPE = {**TINY, "data": DATA, "stages": STAGES, "checkpoint_minutes": 0.002}


def torchrun(*arguments, count=2, restarts=3):
    """A command and its environment: `count` workers of tools/train.py."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--monitor-interval", "0.1"]
    command += ["--nproc_per_node", str(count), "--max-restarts", str(restarts), "tools/train.py", *arguments]
    return {"args": command, "cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}


def worker_of(agent: int, rank: int) -> int | None:
    """The process id of the worker `rank` that the torchrun with id `agent` has started."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == agent and f"RANK={rank}" in (entry / "environ").read_text().split("\0"):
                return int(entry.name)
        except (OSError, IndexError):
            continue
    return None


def kill_when(agent, rank, ready, killed=()):
    """Kill the worker `rank` of a torchrun when `ready()`; its id."""
    deadline = time.monotonic() + 100
    while True:
        assert agent.poll() is None and time.monotonic() < deadline
        worker = worker_of(agent.pid, rank)
        if worker is not None and worker not in killed and ready():
            os.kill(worker, signal.SIGKILL)
            return worker
        time.sleep(0.01)


def within_epoch(folder, epoch):
    """Is `epoch` (from 1) under way, with a checkpoint within it?"""
    if not (folder / "last.pt").exists() or len(metrics_of(folder)) != epoch - 1:
        return False
    return load_checkpoint(folder / "last.pt")["step"] > 0


def assert_same_run(folder, whole):
    for name in ("last.pt", "best.pt"):
        assert_same(load_checkpoint(folder / name), load_checkpoint(whole / name))
    assert metrics_of(folder) == metrics_of(whole)
    results = [json.loads((path / "result.json").read_text()) for path in (folder, whole)]
    assert results[0]["test_loss"] == results[1]["test_loss"] and results[0]["processes"] == results[1]["processes"]
    assert not [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return str(path)


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """The run of two workers that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = subprocess.run(**torchrun(recipe, "--out", str(folder)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_is_started_again_to_the_same_bits(tmp_path, recipe, whole, rank):
    """Killed before the first checkpoint, in the first stage and in the second; the same torchrun goes on each time."""
    folder, log = tmp_path / "run", tmp_path / "log"
    with (
        log.open("w") as out,
        subprocess.Popen(**torchrun(recipe, "--out", str(folder)), stdout=out, stderr=out) as agent,
    ):
        try:
            killed = [kill_when(agent, rank, lambda: (folder / "recipe.yaml").exists())]
            assert not (folder / "last.pt").exists()
            killed.append(kill_when(agent, rank, lambda: within_epoch(folder, 1), killed))
            killed.append(kill_when(agent, rank, lambda: within_epoch(folder, 3), killed))
            assert agent.wait(timeout=240) == 0, log.read_text()[-3000:]
        finally:
            agent.terminate()
    assert len(set(killed)) == 3
    assert_same_run(folder, whole)
    assert log.read_text().strip().splitlines()[-1] == str(folder)
