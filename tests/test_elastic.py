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

pytestmark = pytest.mark.slow  # a torchrun takes a quarter of a minute: python -m pytest -m slow tests/test_elastic.py

STAGES = [{"name": "activations", "binarize": "activations", "epochs": 1}, {"name": "both", "epochs": 2}]
DATA = {**TINY["data"], "samples": 210, "batch_size": 15}  # 189 images: 8 and 7 of a batch, 5 and 4 of the last
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
    state = load_checkpoint(folder / "last.pt")
    return state["step"] > 0 and state["stage"] + state["epoch"] == epoch - 1  # the first stage has one epoch


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


def start(recipe, folder, *arguments):
    """A torchrun, and where it writes what it says."""
    log = folder.with_suffix(".log")
    with log.open("a") as out:
        return subprocess.Popen(**torchrun(recipe, "--out", str(folder), *arguments), stdout=out, stderr=out), log


def survive(recipe, folder, kills):
    """Train into `folder`; at each of `kills`, (rank, epoch), a worker dies. 0: before the first checkpoint."""
    agent, log = start(recipe, folder)
    killed: list[int] = []
    try:
        for rank, epoch in kills:
            ready = (lambda at=epoch: within_epoch(folder, at)) if epoch else (folder / "recipe.yaml").exists
            killed.append(kill_when(agent, rank, ready, killed))
            assert epoch or not (folder / "last.pt").exists()
        assert agent.wait(timeout=240) == 0, log.read_text()[-3000:]
    finally:
        agent.terminate()
    said = log.read_text()
    assert said.strip().splitlines()[-1] == str(folder) and "Traceback" not in said
    assert len(set(killed)) == len(kills)


def test_workers_killed_one_after_the_other_end_with_the_same_bits(tmp_path, recipe, whole):
    """One torchrun goes on by itself: worker 1 is killed before the first checkpoint, worker 0 in the second stage."""
    survive(recipe, tmp_path / "run", [(1, 0), (0, 2)])
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_killed_again_and_again_ends_with_the_same_bits(tmp_path, recipe, whole, rank):
    survive(recipe, tmp_path / "run", [(rank, 0), (rank, 1), (rank, 3)])
    assert_same_run(tmp_path / "run", whole)


def test_a_job_killed_as_a_whole_is_refused_and_goes_on_with_resume(tmp_path, recipe, whole):
    folder = tmp_path / "run"
    agent, _ = start(recipe, folder)
    workers = [kill_when(agent, 1, lambda: within_epoch(folder, 2)), worker_of(agent.pid, 0)]
    agent.kill()
    agent.wait()
    if workers[1] is not None:
        os.kill(workers[1], signal.SIGKILL)
    again, log = start(recipe, folder)
    assert again.wait(timeout=120) != 0
    assert log.read_text().count("holds a run already") == 1  # said once, though torchrun tries four times
    assert load_checkpoint(folder / "last.pt")["stage"] == 1
    resumed, log = start(recipe, folder, "--resume")
    assert resumed.wait(timeout=240) == 0, log.read_text()[-3000:]
    assert_same_run(folder, whole)
