"""Measurements of tools/bench.py --train: whole training steps, in turns, whose parts and ratios are what they say."""

import importlib
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, filled_pages, tiny
from test_tools import tool  # noqa: F401

from bnnfree import console
from bnnfree.analysis.plain import plain
from bnnfree.bench import training
from bnnfree.bench.training import (
    PARTS,
    Clock,
    Feed,
    ReleasedContender,
    StageContender,
    Times,
    held,
    race,
    ratios,
    roofline,
    shares,
)
from bnnfree.data.datasets import load_data
from bnnfree.errors import BnnfreeError
from bnnfree.models import MODELS

CPU = torch.device("cpu")
RECIPE = ROOT / "recipes" / "cifar10_reactnet20.yaml"
SMALL = ("data.name=fake", "data.samples=48", "data.image_size=7", "data.val_fraction=0", "model.width=0.5")


@pytest.fixture(scope="module")
def small():
    """(recipe, data) of one narrow stage."""
    recipe = tiny("speed=layers", "data.batch_size=6", "agc.clip=0.02")
    return recipe, load_data(recipe.data)


class Pretender:
    """Steps that pretend to take so many milliseconds, with the machine's noise, a quarter of it in each part."""

    net, precision = torch.nn.Identity(), "fp32"

    def __init__(self, milliseconds, now, deterministic=False):
        self.milliseconds, self.now, self.deterministic, self.seen = milliseconds, now, deterministic, []
        self.noise = np.random.default_rng(milliseconds)

    def step(self, group, clock):
        self.seen.append(torch.are_deterministic_algorithms_enabled())
        taken = self.milliseconds * self.noise.uniform(0.9, 1.3) / 1e3
        for part in PARTS[1:]:
            self.now[0] += taken / 4
            clock.done(part)


@pytest.fixture
def now(monkeypatch):
    """[seconds]: what the clock says, which only a Pretender moves."""
    seconds = [0.0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: seconds[0])
    return seconds


def test_all_take_turns_and_ratios_are_medians_over_rounds(small, now):
    feed = Feed(small[1].train, 6, 0, CPU)
    contenders = {"ours": Pretender(20, now), "slow": Pretender(60, now, True), "slowest": Pretender(400, now)}
    times = race(contenders, feed, CPU, seconds=0)
    assert {len(row.steps) for row in times.values()} == {3}
    counts = [len(contender.seen) for contender in contenders.values()]
    assert counts[0] > counts[1] > counts[2] == 1 + 3, "who is quick takes more steps in a turn"
    found = ratios(times)
    assert found["slow"] == np.median(times["slow"].steps / times["ours"].steps)
    assert 2 < found["slow"] < 4.5 and 13 < found["slowest"] < 30 and "ours" not in found
    assert set(contenders["slow"].seen) == {True} and set(contenders["ours"].seen) == {False}
    assert not torch.are_deterministic_algorithms_enabled(), "as before"
    for row in times.values():
        assert np.allclose(row.parts.sum(1), row.steps)
        assert np.allclose(row.parts[:, 1:], row.steps[:, None] / 4) and not row.parts[:, 0].any()


def test_rounds_go_on_until_the_time_is_over(small, now):
    feed = Feed(small[1].train, 6, 0, CPU)
    times = race({"ours": Pretender(400, now), "slow": Pretender(500, now)}, feed, CPU, seconds=9)
    assert 9 <= now[0] < 12 and 7 <= len(times["ours"].steps) == len(times["slow"].steps) <= 12


def test_figures_are_in_the_units_they_say():
    parts = np.tile([0.1, 0.2, 0.3, 0.0, 0.4], (3, 1))
    got = Times(np.array([2.0, 1.0, 1.5]), parts).figures(30)
    assert got["images_per_second"] == pytest.approx(20) and got["step_ms"]["median"] == pytest.approx(1500)
    assert got["step_ms"]["rounds"] == [2000, 1000, 1500]
    assert got["parts_ms"] == pytest.approx({"data": 100, "forward": 200, "backward": 300, "agc": 0, "optimizer": 400})


def test_a_feed_gives_the_batches_of_training_whole_ones_only(small):
    _, data = small
    count = len(data.train)
    assert count % 7, "the last batch of an epoch is no whole one"
    feed = Feed(data.train, 7, 3, CPU)
    got = feed.take(count // 7 + 1)
    assert all(images.shape == (7, 3, 9, 9) and labels.shape == (7,) for images, labels in got)
    first = next(data.train.train_batches(7, seed=3, epoch=0))
    after = next(data.train.train_batches(7, seed=3, epoch=1))
    assert torch.equal(got[0][0], first[0]) and torch.equal(got[-1][0], after[0])
    with pytest.raises(BnnfreeError, match="expected at most the 72 training images"):
        Feed(data.train, 73, 0, CPU)


def test_a_stage_of_ours_takes_the_steps_of_training(small):
    """Its parts are told in order, the schedule moves, and weights become what training makes of them."""
    recipe, data = small
    stage = StageContender(recipe, MODELS, data, CPU)
    assert stage.stage.index == 1 and stage.deterministic
    clock = Clock(CPU)
    before = {name: p.detach().clone() for name, p in stage.stage.model.named_parameters()}
    stage.step(Feed(data.train, 6, recipe.seed, CPU).take(1), clock)
    assert [part for part, _ in clock.marks] == ["", "forward", "backward", "agc", "optimizer"]
    assert all(not torch.equal(before[name], p) for name, p in stage.stage.model.named_parameters())
    assert stage.stage.step == 1 and sum(stage.stage.clip_rate.mean().values()) > 0
    stage.stage.step = stage.stage.steps - 1
    stage.step(Feed(data.train, 6, recipe.seed, CPU).take(1), Clock(CPU))
    assert (stage.stage.step, stage.stage.epoch) == (0, 1)


def test_the_released_step_trains_the_plain_network(small):
    recipe, data = small
    recipe = recipe.model_copy(update={"accumulate": 2, "precision": "bf16"})
    ours = StageContender(recipe.model_copy(update={"precision": "fp32"}), MODELS, data, CPU)
    net = plain(ours.stage.model)
    seen = []
    contender = ReleasedContender(
        net, recipe, CPU, unclipped=net.head.parameters(), clip=lambda params, clip: seen.append((len(params), clip))
    )
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    clock = Clock(CPU)
    contender.step(Feed(data.train, 6, 0, CPU).take(2), clock)
    assert [part for part, _ in clock.marks][1:] == ["forward", "backward"] * 2 + ["agc", "optimizer"]
    assert seen == [(len(before) - 2, 0.02)], "all but the classifier's two"
    assert all(not torch.equal(before[name], p) for name, p in net.named_parameters())
    moved = dict(net.named_buffers())["blocks.0.branch.1.input_mean"]
    assert not torch.equal(moved, dict(ours.stage.model.named_buffers())["blocks.0.branch.1.input_mean"])
    assert clock.parts().keys() == set(PARTS) and sum(clock.parts().values()) > 0


def test_what_a_contender_holds_grows_with_what_it_makes(small):
    recipe, data = small
    feed = Feed(data.train, 6, 0, CPU)

    def make():
        contender = StageContender(recipe, MODELS, data, CPU)
        contender.ballast = filled_pages(100_000_000)
        return contender

    found = held(make, feed, data, CPU, 6)
    assert 100e6 <= found["peak_memory_bytes"] < 400e6
    maps = 4 * 6 * (9 * 9 * 8 + 5 * 5 * 16 + 3 * 3 * 32)
    assert maps < found["saved_bytes_per_image"] < 10 * maps and found["saved_bytes_fixed"] > 0


def test_shares_of_the_roofline_follow_their_formulas():
    peak = {"copy_bytes_per_second": 1e9, "matmul_flops_per_second": 1e12}
    saved = {"saved_bytes_per_image": 1e6, "saved_bytes_fixed": 2e6}
    got = shares(0.5, 8, 10_000_000, 1000, saved, peak)
    assert got["matmul_share"] == pytest.approx(6 * 8 * 1e7 / 0.5 / 1e12)
    assert got["bandwidth_share"] == pytest.approx((2 * 10e6 + 40_000) / 0.5 / 1e9)
    assert "bandwidth_share" not in shares(0.5, 8, 1, 1, None, peak)
    measured = roofline(CPU)
    assert 1e8 < measured["copy_bytes_per_second"] < 1e13 and measured["matmul_flops_per_second"] > 1e8


# -- the tool


def test_every_variant_takes_a_step(small, monkeypatch):
    """But those that need a compiler, or a checkout; without one they are built all the same."""
    bench = importlib.import_module("bnnfree.bench.contenders")
    _, data = small
    for name, variant in bench.VARIANTS.items():
        if variant.make == "reference":
            continue
        request = bench.Request(str(RECIPE), list(SMALL), "bf16_trunk", 6, None, 1)
        contender = bench.make_contender(name, request, data, CPU)
        assert contender.precision == ("bf16_trunk" if variant.trunk else "bf16")
        if "compiled" not in name:
            contender.step(Feed(data.train, 6, 0, CPU).take(1), Clock(CPU))


@pytest.mark.thorough
def test_the_report_is_whole_and_agrees_with_itself(tool, tmp_path):  # noqa: F811
    options = ("--batch", 6, "--precision", "fp32", "--contenders", "plain")
    arguments = (RECIPE, *SMALL, *options, "--seconds", 0.1, "--json", tmp_path / "t.json")
    code, printed, errors = tool("bench", "--train", *arguments)
    assert code == 0 and printed.splitlines()[-1] == str(tmp_path / "t.json"), errors
    assert "data      fake: 48 training images 7x7x3, 10 classes, augmented by crop, flip" in printed
    report = json.loads((tmp_path / "t.json").read_text())
    assert report["machine"]["threads"] == 1 and report["train"]["device"] == "cpu"
    run = report["train"]["fp32"]["6"]
    names = ["ours", "plain"]
    assert list(run["contenders"]) == names and run["left_out"] == {} and run["images"] == 6 and run["rounds"] >= 3
    ours = run["contenders"]["ours"]
    for name, row in run["contenders"].items():
        step = row["step_ms"]
        assert step["median"] == pytest.approx(np.median(step["rounds"])) and len(step["rounds"]) == run["rounds"]
        assert row["images_per_second"] == pytest.approx(6e3 / step["median"])
        assert list(row["parts_ms"]) == list(PARTS) and all(value >= 0 for value in row["parts_ms"].values())
        assert 0.5 * step["median"] < sum(row["parts_ms"].values()) < 1.5 * step["median"]
        assert "memory_not_measured" not in row and row["saved_bytes_per_image"] > 0 < row["peak_memory_bytes"]
        assert 0 < row["roofline"]["matmul_share"] and 0 < row["roofline"]["bandwidth_share"]
        assert row["precision"] == "fp32" and any(line.split()[:1] == [name] for line in printed.splitlines())
        if name != "ours":
            each = np.array(step["rounds"]) / ours["step_ms"]["rounds"]
            assert run["ratio"][name] == pytest.approx(np.median(each))
            saved = row["saved_bytes_per_image"] / ours["saved_bytes_per_image"]
            assert run["saved_bytes_ratio"][name] == pytest.approx(saved)
    assert set(run["ratio"]) == set(run["saved_bytes_ratio"]) == set(run["peak_memory_ratio"]) == set(names[1:])
    assert run["saved_bytes_ratio"]["plain"] > 1.5 and "gpu" not in printed


LAYERS = """
import torch
from torch import nn
class Std(nn.Conv2d):
    def forward(self, x):
        return super().forward(x)
"""
NETWORK = """
from layers import *
class Net(nn.Module):
    def __init__(self, imagenet=True, num_classes=1000):
        super().__init__()
        assert not imagenet
        shapes = [(8, 3, 3)] + [(o, i, 3) for o, i in SHAPES] + [(o, i, 1) for o, i in ONES]
        self.convs = nn.ModuleList([Std(i, o, k, padding=k // 2, bias=False) for o, i, k in shapes])
        self.move = nn.Parameter(torch.zeros(1, 8, 1, 1))
        self.fc = nn.Linear(8, num_classes)
    def forward(self, x):
        total = self.convs[0](x).mean((2, 3)) + self.move.flatten()
        return self.fc(total)
SHAPES = [(8, 8)] * 4 + [(16, 8)] + [(16, 16)] * 3 + [(32, 16)] + [(32, 32)] * 3 + [(64, 32)] + [(64, 64)] * 3
ONES = [(16, 8), (32, 16), (64, 32)]
def birealnet18(pretrained=False, **kwargs):
    return Net(**kwargs)
"""
AGC = """
calls = []
def adaptive_clip_grad(parameters, clip_factor=0.01, eps=1e-3):
    parameters = list(parameters)
    calls.append((len(parameters), clip_factor))
"""
R18 = ROOT / "recipes" / "cifar10_reactnet18.yaml"
NARROW = tuple(change for change in SMALL if "width" not in change) + ("model.width=0.125",)


@pytest.fixture
def checkout(tmp_path):
    """A folder laid out as the released code is, with a network of a narrow ReActNet-18's size."""
    root = tmp_path / "released"
    (root / "models").mkdir(parents=True)
    (root / "layers.py").write_text(LAYERS)
    (root / "models" / "Qaw_reactnet_18_bf.py").write_text(NETWORK)
    (root / "agc.py").write_text(AGC)
    return root


@pytest.mark.thorough
def test_the_released_code_is_run_from_its_checkout(tool, checkout, tmp_path):  # noqa: F811
    known = set(sys.modules)
    options = ("--batch", 4, "--precision", "fp32", "--contenders", "reference", "--against", checkout)
    arguments = ("--train", R18, *NARROW, *options, "--seconds", 0.1, "--json", tmp_path / "t.json")
    code, _, errors = tool("bench", *arguments)
    assert code == 0, errors
    run = json.loads((tmp_path / "t.json").read_text())["train"]["fp32"]["4"]
    assert list(run["contenders"]) == ["ours", "reference"] and run["ratio"]["reference"] > 0
    assert "memory_not_measured" not in run["contenders"]["reference"]
    assert "layers" not in set(sys.modules) - known, "its names hide no one else's"


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [("layers.py", None, "has no layers.py, expected a checkout"),
     ("layers.py", "import no_such_package", "layers.py cannot be imported: No module named 'no_such_package'"),
     ("layers.py", "1 / 0", "layers.py cannot be imported: division by zero"),
     ("agc.py", "x = 1", "agc.py has no adaptive_clip_grad"),
     ("models/Qaw_reactnet_18_bf.py", NETWORK.replace("[(8, 8)] * 4", "[(8, 8)] * 3"), "convolution weights, expected"),
     ("models/Qaw_reactnet_18_bf.py", NETWORK.replace("imagenet=True, ", ""), "birealnet18 of models/Qaw_reactnet_18"),
     ("models/Qaw_reactnet_18_bf.py", None, "has no models/Qaw_reactnet_18_bf.py")],
)  # fmt: skip
def test_a_checkout_that_is_not_the_released_code_is_one_line(tool, checkout, file, text, said):  # noqa: F811
    (checkout / file).unlink()
    if text is not None:
        (checkout / file).write_text(text)
    options = ("--batch", 4, "--precision", "fp32", "--contenders", "reference", "--against", checkout)
    code, _, errors = tool("bench", "--train", R18, *NARROW, *options, "--seconds", 0.1)
    assert code == 2 and said in errors and len(errors.strip().splitlines()) == 1, errors


@pytest.mark.parametrize(
    ("arguments", "word"),
    [((), "no recipe"), ((RECIPE, "--precision", "fp16"), "fp16"), ((RECIPE, "--contenders", "pain"), "plain"),
     ((RECIPE, "--batch", "0"), "--batch"), ((RECIPE, "--threads", "0"), "--threads"),
     ((RECIPE, "--layers"), "--layers"), ((RECIPE, "--seconds", "0"), "--seconds"),
     ((RECIPE, "--against", "/nonexistent"), "/nonexistent"), ((RECIPE, "--contenders", "reference"), "--against"),
     ((RECIPE, "--kernels"), "--kernels"), ((RECIPE, "--feeds", "9"), "--data"),
     ((RECIPE, *SMALL, "--batch", "49"), "48 training images"), ((RECIPE, "model.nrom=bn"), "nrom"),
     ((RECIPE, "data.name=image_folder", "data.root=/nonexistent"), "data.name=fake"),
     ((RECIPE, *SMALL, "--against", str(ROOT)), "reactnet18"), (("none.yaml",), "none.yaml"),
     ((RECIPE, *SMALL, "model.norm=ic", "--batch", "4", "--precision", "bf16_trunk"), "bf16_trunk")],
)  # fmt: skip
def test_what_cannot_be_trained_is_one_line_and_exit_code_2(tool, arguments, word):  # noqa: F811
    code, _, errors = tool("bench", "--train", *arguments)
    assert code == 2 and word in errors and len(errors.strip().splitlines()) == 1, errors


def test_options_of_training_do_not_go_with_inference(tool):  # noqa: F811
    for option in (("--batch", 4), ("--precision", "fp32"), ("--contenders", "plain")):
        code, _, errors = tool("bench", RECIPE, *option)
        assert code == 2 and option[0] in errors and "--train" in errors


def test_who_cannot_take_a_step_or_tell_its_memory_is_left_out_with_a_reason(tool, tmp_path, monkeypatch):  # noqa: F811
    whole = training.ReleasedContender.step

    def broken(self, group, clock):
        whole(self, group, clock)
        raise RuntimeError("no compiler here,\nsays torch")

    monkeypatch.setattr(training.ReleasedContender, "step", broken)
    monkeypatch.setattr(console.sys, "executable", shutil.which("false"))
    options = ("--batch", 4, "--precision", "fp32", "--contenders", "plain", "--seconds", 0.1)
    code, printed, errors = tool("bench", "--train", RECIPE, *SMALL, *options, "--json", tmp_path / "t.json")
    assert code == 0 and "plain: left out; no compiler here," in printed, errors
    run = json.loads((tmp_path / "t.json").read_text())["train"]["fp32"]["4"]
    assert run["left_out"] == {"plain": "no compiler here,"} and run["ratio"] == {}
    assert run["contenders"]["ours"]["memory_not_measured"] == "exit code 1"
    assert (
        "ours: memory not measured; exit code 1" in printed
        and "bandwidth_share" not in run["contenders"]["ours"]["roofline"]
    )


@pytest.mark.slow
def test_every_contender_of_every_precision_is_measured(tool, tmp_path):  # noqa: F811
    """With a C++ compiler, in a quarter of an hour: python -m pytest -m slow -n 0 tests/test_throughput.py"""
    code, _, errors = tool(
        "bench", "--train", RECIPE, *SMALL, "--batch", 4, "--seconds", 1, "--json", tmp_path / "t.json"
    )
    assert code == 0, errors
    report = json.loads((tmp_path / "t.json").read_text())["train"]
    for precision in ("fp32", "bf16", "bf16_trunk"):
        run = report[precision]["4"]
        assert run["left_out"] == {} and len(run["contenders"]) == 9
        assert all("memory_not_measured" not in row for row in run["contenders"].values())
