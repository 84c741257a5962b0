"""Each normaliser on real CIFAR-10, the whole way that a user goes: train, export, verify, run natively, count.

It needs the images, as files in train/CLASS and test/CLASS of a folder, and about a quarter of an hour on two cores:
    BNNFREE_CIFAR10=FOLDER python -m pytest -m slow -n 2 --dist load tests/test_rows.py
BNNFREE_ROWS=rows.jsonl collects a line of figures for each.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT

from bnnfree.bench.peers import random_images
from bnnfree.engine import backends, load
from bnnfree.nn import NORMS

DATA = os.environ.get("BNNFREE_CIFAR10")
ROWS = {name: [f"model.norm={name}"] for name in NORMS} | {"bnp": ["model.norm=none", "optimizer.precondition=bnp"]}
SHORT = ["data.train_limit=2000", "data.test_limit=500", "data.batch_size=64", "stages.0.epochs=2", "optimizer.lr=3e-3"]


def run(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not DATA, reason="BNNFREE_CIFAR10 names no folder of CIFAR-10 images")
@pytest.mark.parametrize("row", ROWS)
def test_trains_on_cifar10_exports_verifies_and_runs_natively(row, tmp_path):
    folder, packed = tmp_path / "run", tmp_path / "model.bnnf"
    data = ["data.name=image_folder", f"data.root={DATA}"]
    recipe = ["recipes/cifar10_reactnet20.yaml", *ROWS[row], *data, *SHORT]
    run("tools/train.py", *recipe, "--threads", "1", "--out", str(folder))
    run("tools/export.py", str(folder), "-o", str(packed))
    some = min((Path(DATA) / "test").iterdir())  # one class of ten
    verify = ["tools/verify.py", str(folder), str(packed), "--images", str(some), "--json", f"{tmp_path}/v.json"]
    run(*verify, "--agreement", "0.98")  # two epochs leave many images between two classes
    run("tools/evaluate.py", str(packed), "--json", f"{tmp_path}/packed.json")
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    engine = json.loads((tmp_path / "packed.json").read_text())
    native = [name for name in backends() if name not in ("numpy", "native", "reference")]
    assert native, "no native engine here"
    images = random_images(load(packed, "numpy").model, 3)
    logits = load(packed, "numpy").run(images)
    for name in native:
        np.testing.assert_array_equal(load(packed, name).run(images), logits)
    assert metrics[-1]["loss"] < metrics[0]["loss"] < 3
    assert abs(engine["top1"] - result["test_top1"]) < 4  # 8-bit ends moved up to 16 of these 500 images
    figures = {"row": row, "loss": metrics[-1]["loss"], "test_top1": result["test_top1"], "packed_top1": engine["top1"]}
    checked = json.loads((tmp_path / "v.json").read_text())
    figures |= {key: checked[key] for key in ("equal", "images", "agreement")}
    figures |= {"bytes": packed.stat().st_size, "native": native}
    if "BNNFREE_ROWS" in os.environ:
        with open(os.environ["BNNFREE_ROWS"], "a", encoding="utf-8") as rows:
            rows.write(json.dumps(figures) + "\n")
