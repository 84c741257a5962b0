"""What several test files need: tiny recipes, and a stage in float64."""

import json
from pathlib import Path

import torch

from bnnfree.train.checkpoint import build_model
from bnnfree.train.data import describe, load_data
from bnnfree.train.dist import Dist
from bnnfree.train.images import PixelSplit
from bnnfree.train.loop import Stage
from bnnfree.train.recipes import parse_recipe
from models import MODELS

ROOT = Path(__file__).resolve().parent.parent

TINY = {
    "model": {"name": "reactnet20", "norm": "free", "width": 0.5},
    "data": {"name": "fake", "samples": 80, "classes": 4, "image_size": 9, "batch_size": 16, "channels": 3,
             "augment": ["crop", "flip"]},
    "stages": [{"name": "activations", "binarize": "activations", "epochs": 2}, {"name": "both", "epochs": 2}],
    "optimizer": {"lr": 4e-3, "affine_lr_mult": 5.0},
    "schedule": {"warmup_steps": 2},
    "free": {"calibration": 32},
}  # fmt: skip


def tiny(*overrides: str):
    """The recipe TINY with `key=value` overrides."""
    return parse_recipe(TINY, "tiny.yaml", MODELS, overrides)


def double_stage(monkeypatch, recipe, dist: Dist | None = None) -> Stage:
    """The first stage of `recipe` in float64, calibrated: sums in another order then differ by 1e-15 only."""
    whole = PixelSplit._normaliser

    def normaliser(self, device):
        normalise = whole(self, device)
        return lambda pixels: normalise(pixels).double()

    monkeypatch.setattr(PixelSplit, "_normaliser", normaliser)
    torch.manual_seed(recipe.seed)
    data = load_data(recipe.data)
    model = build_model(recipe, MODELS, describe(recipe.data), recipe.stages[0].binarize).double()
    stage = Stage(recipe, 0, model, data, dist or Dist(0, 1, torch.device("cpu")))
    stage.calibrate()
    return stage


def metrics_of(folder: Path) -> list[dict]:
    """metrics.jsonl without what the clock decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines]


def assert_same(a, b, where="state"):
    """Equal to the bit, through containers; what the clock or a commit in between decides is left out."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in ("seconds", "images_per_second", "origin"):
                assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}.{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), f"{where}: differs in {(a != b).sum()} of {a.numel()} values"
    else:
        assert a == b, f"{where}: {a} and {b}"
