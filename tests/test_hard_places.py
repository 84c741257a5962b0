"""From a training to a prediction where the system gives little: a container's shared memory, a HOME that cannot be
written, a path with spaces and letters beyond ASCII, hashes that differ by process, subnormals flushed to zero."""

import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT
from test_data import write_tree

FLUSHED = "import torch\ntorch.set_flush_denormal(True)\n"
MOUNTS = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && mount -t tmpfs -o ro,mode=555 tmpfs "$HOME" && exec "$@"'
RECIPE = (
    "recipes/imagenet_reactnet18.yaml", "data.name=image_folder", "data.batch_size=32", "model.width=0.125",
    "model.norm=free", "stages=[{epochs: 1}]", "data.workers=3", "schedule.warmup_steps=0", "loss.teacher=null",
    "loss.name=cross_entropy",
)  # fmt: skip


@pytest.fixture
def place(tmp_path):
    """(a copy of the checkout, a function that runs a tool of it) in such a place."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount: root, and unshare")
    checkout = tmp_path / "Ünser Öfen 二"
    for folder in ("bnnfree", "models", "recipes", "tools"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__"))
    home = tmp_path / "höme mit Leerzeichen"
    home.mkdir()
    environment = {**os.environ, "HOME": str(home), "PYTHONHASHSEED": "random", "PYTHONPATH": str(tmp_path / "site")}
    environment.pop("XDG_CACHE_HOME", None)

    def run(tool, *arguments):
        command = ["unshare", "-m", "bash", "-c", MOUNTS, "bash", sys.executable, f"tools/{tool}.py", *arguments]
        return subprocess.run(
            list(map(str, command)), cwd=checkout, env=environment, capture_output=True, text=True, timeout=300
        )

    return checkout, run


@pytest.mark.parametrize("flushed, size", [(False, 224), (True, 32)], ids=["", "subnormals flushed"])
def test_train_export_verify_predict_work_or_end_in_one_line(place, tmp_path, flushed, size):
    checkout, run = place
    root = write_tree(checkout / "Bilder für später", count=17, size=(240, 226), ending="jpg")
    if flushed:
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text(FLUSHED)
    done = run("train", *RECIPE, f"data.root={root}", f"data.image_size={size}", "--out", "runs/läuft hier")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith("läuft hier")
    picture = next((checkout / "Bilder für später").rglob("*.jpg"))
    for tool, *arguments in (
        ("export", "runs/läuft hier", "-o", "das Netz.bnnf"),
        ("verify", "runs/läuft hier", "das Netz.bnnf", "--samples", 4),
        ("evaluate", "das Netz.bnnf", f"data.root={root}"),
        ("predict", "das Netz.bnnf", picture),
    ):
        done = run(tool, *arguments)
        assert "Traceback" not in done.stderr, done.stderr
        if flushed and done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            assert done.returncode == 2 and len(said) == 1 and "denormal" in said[0], done.stderr
            break
        assert done.returncode == 0, (tool, done.stdout + done.stderr)
