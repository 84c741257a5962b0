"""A training killed from outside with kill -9, in the first stage and again in the second, ends with the same bits."""

import signal
import subprocess
import sys
import time

import pytest
import yaml
from helpers import ROOT, TINY, assert_same, metrics_of

from bnnfree.models import MODELS
from bnnfree.train import fit, load_checkpoint
from bnnfree.train.networks import load_recipe

STAGES = [{"name": "activations", "binarize": "activations", "epochs": 2}, {"name": "both", "epochs": 2}]
RECIPE = {**TINY, "data": {**TINY["data"], "samples": 320}, "stages": STAGES, "checkpoint_minutes": 0.002}


def kill_in_epoch(command, folder, epoch):
    """Start a training and kill it once `epoch` (from 1) is under way and has written a checkpoint within it."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while True:
        assert process.poll() is None and time.monotonic() < deadline
        if (folder / "last.pt").exists() and len(metrics_of(folder)) == epoch - 1:
            if load_checkpoint(folder / "last.pt")["step"] > 0:
                break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.thorough
def test_a_run_killed_in_both_stages_resumes_to_the_same_bits(tmp_path):
    path, whole, cut = tmp_path / "tiny.yaml", tmp_path / "whole", tmp_path / "cut"
    path.write_text(yaml.safe_dump(RECIPE))
    recipe = load_recipe(path, models=MODELS)
    fit(recipe, MODELS, whole, quiet=True, curves=False)
    train = [sys.executable, "tools/train.py", str(path), "--out"]
    kill_in_epoch([*train, str(cut)], cut, 2)
    assert load_checkpoint(cut / "last.pt")["stage"] == 0
    kill_in_epoch([*train, str(cut), "--resume"], cut, 4)
    assert load_checkpoint(cut / "last.pt")["stage"] == 1 and not (cut / "result.json").exists()
    fit(recipe, MODELS, cut, resume=True, quiet=True, curves=False)
    for name in ("last.pt", "best.pt"):
        assert_same(load_checkpoint(cut / name), load_checkpoint(whole / name))
    assert metrics_of(cut) == metrics_of(whole)
