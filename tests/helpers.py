"""Helpers of several test files: noise, narrow models, tiny recipes, and a stage in float64."""

import json
import mmap
from pathlib import Path

import torch

from bnnfree.data.datasets import describe, load_data
from bnnfree.data.pixel_split import PixelSplit
from bnnfree.models import MODELS
from bnnfree.nn import NORMS
from bnnfree.recipe import resolve
from bnnfree.train import fit
from bnnfree.train.checkpoint import build_model
from bnnfree.train.dist import Dist
from bnnfree.train.loop import Stage
from bnnfree.train.networks import parse_recipe

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

BATCH = tuple(name for name, rule in NORMS.items() if rule.batch_dependent)
BATCH_FREE = tuple(name for name in NORMS if name not in BATCH)
NARROW = {name: 0.5 for name in MODELS if name.endswith(("15", "20"))}  # else 1/8: 8 channels at first


KINDS_OF_MODELS = [name for name in MODELS if name not in ("birealnet20", "xnor_resnet20")]  # those of 18, narrower


def noise(*shape, seed=0, dtype=torch.float64):
    """Normal values."""
    print(f"seed {seed}")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_model(name, norm, seed=0, **options):
    """A narrow model of three classes."""
    torch.manual_seed(seed)
    return MODELS[name](3, norm=norm, width=NARROW.get(name, 0.125), stem="cifar", **options)


def cut_at(patch, step):
    """From now on a training is cut, as by Ctrl-C, at its `step`th optimiser step; `patch` is a MonkeyPatch."""
    take, taken = Stage._take_step, 0

    def cut(self, group):
        nonlocal taken
        taken += 1
        if taken == step:
            raise KeyboardInterrupt
        return take(self, group)

    patch.setattr(Stage, "_take_step", cut)


def filled_pages(size):
    """So many bytes of memory that no allocator had before."""
    pages = mmap.mmap(-1, size)
    for at in range(0, size, mmap.PAGESIZE):
        pages[at] = 1
    return pages


def without_drop(norm):
    """Options of a normaliser in which training draws nothing at random."""
    return {"norm_options": {"drop": 0.0}} if NORMS[norm].before else {}


def tiny(*overrides: str):
    """The recipe TINY with `key=value` overrides."""
    return parse_recipe(TINY, "tiny.yaml", MODELS, overrides)


def train(folder: Path, *overrides: str, curves=False, **options) -> dict:
    """A run of the recipe TINY; what fit returns. Why no curves: to draw them takes as long as the rest."""
    return fit(tiny(*overrides), MODELS, folder, curves=curves, **{"quiet": True, **options})


def double_stage(monkeypatch, recipe, dist: Dist | None = None) -> Stage:
    """The first stage of `recipe` in float64, calibrated: sums in another order then differ by 1e-15 only."""
    whole = PixelSplit._normaliser

    def normaliser(self, device):
        normalise = whole(self, device)
        return lambda pixels: normalise(pixels).double()

    monkeypatch.setattr(PixelSplit, "_normaliser", normaliser)
    torch.manual_seed(recipe.seed)
    data = load_data(recipe.data)
    recipe = resolve(recipe, describe(recipe.data))
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
