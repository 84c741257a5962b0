"""Properties of bnnfree.analysis.signals and of tools/probe.py."""

import json

import pytest
import torch
from helpers import KINDS_OF_MODELS, ROOT, make_model, noise
from test_tools import tool  # noqa: F401
from torch import nn

from bnnfree.analysis.signals import SHARES, by_depth, split_power, trace_signals
from bnnfree.errors import BnnfreeError
from bnnfree.nn import NORMS, Sign


def powers_of(x):
    """The root of the power and its four shares, written out from the definition."""
    means, deviations = x.mean((2, 3)), x.std((2, 3), correction=0)
    parts = [means.mean(0) ** 2, means.var(0, correction=0), deviations.mean(0) ** 2, deviations.var(0, correction=0)]
    power = x.square().mean()
    return [power.sqrt().item(), *(part.mean().item() / power.item() for part in parts)]


@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (3, 5, 1, 7), (7, 4, 5, 3)])
def test_shares_add_up_to_the_power_and_follow_their_definitions(shape):
    x = noise(*shape, seed=3) + noise(shape[1], 1, 1, seed=4)
    found = split_power(x.mean((2, 3)), x.std((2, 3), correction=0))
    assert [found.rms, *(getattr(found, name) for name in SHARES)] == pytest.approx(powers_of(x), abs=1e-12)
    assert sum(getattr(found, name) for name in SHARES) == pytest.approx(1)


@pytest.mark.parametrize(
    ("x", "share"),
    [
        (torch.ones(4, 3, 2, 2) * torch.tensor([1.0, -2, 5]).view(3, 1, 1), "constant"),
        (torch.ones(4, 3, 2, 2) * torch.tensor([1.0, -1, 1, -1]).view(4, 1, 1, 1), "sample_mean"),
        (torch.ones(4, 3, 2, 2) * torch.tensor([[1.0, -1], [-1, 1]]), "spatial"),
        (torch.zeros(4, 3, 2, 2), "constant"),
    ],
)
def test_a_map_of_one_kind_has_one_share(x, share):
    found = split_power(x.mean((2, 3)), x.std((2, 3), correction=0))
    assert getattr(found, share) == 1


def test_instance_norm_leaves_spatial_power_only_and_layer_norm_lets_means_differ():
    x = noise(6, 8, 5, 5, seed=5) * noise(6, 8, 1, 1, seed=6) + noise(6, 8, 1, 1, seed=7)
    inside = nn.Sequential(nn.InstanceNorm2d(8, eps=0.0), nn.ReLU())
    (signal,) = trace_signals(inside.double(), x)
    assert signal.spatial == pytest.approx(1) and signal.rms == pytest.approx(1)
    (signal,) = trace_signals(nn.Sequential(nn.GroupNorm(1, 8, eps=0.0), nn.ReLU()).double(), x)
    assert signal.sample_mean > 0.1


@pytest.mark.parametrize("name", KINDS_OF_MODELS)
def test_every_activation_has_a_line_and_the_signs_are_the_depth(name):
    model = make_model(name, "bn").eval()
    x = noise(4, 3, 9, 9, seed=8, dtype=torch.float32)
    signals = trace_signals(model, x, batch=3)
    signs = sum(isinstance(module, Sign) for module in model.modules())
    chosen = by_depth(signals)
    assert len(chosen) == (signs or len(signals)) and len({s.path for s in signals}) == len(signals)
    whole = trace_signals(model, x)
    for one, other in zip(signals, whole, strict=True):
        assert one.rms == pytest.approx(other.rms, rel=1e-3)


@pytest.mark.parametrize("norm", NORMS)
def test_it_leaves_the_network_and_the_random_numbers_alone(norm):
    model = make_model("reactnet20", norm).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    assert trace_signals(model, noise(4, 3, 9, 9, seed=9, dtype=torch.float32))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.training


def test_what_cannot_be_compared_is_an_error_with_the_reason():
    with pytest.raises(BnnfreeError, match="images: got 1, expected 2 or more"):
        trace_signals(make_model("reactnet20", "free"), torch.zeros(1, 3, 9, 9))
    with pytest.raises(BnnfreeError, match="Linear: no activation ran, expected one at least of Sign, RSign"):
        trace_signals(nn.Linear(3, 3), torch.zeros(4, 3))


FAKE = ["data.name=fake", "data.image_size=9", "data.samples=40", "data.augment=[]", "data.download=false"]


@pytest.mark.thorough
def test_the_tool_shows_random_networks_and_the_points_of_a_sweep(tool, tmp_path):  # noqa: F811
    sweep = tmp_path / "tiny.yaml"
    recipe = ROOT / "recipes" / "cifar10_reactnet20.yaml"
    sweep.write_text(f"recipe: {recipe}\ngrid: {{model.norm: [ln, bn]}}\nseeds: 2\n", encoding="utf-8")
    small = [*FAKE, "model.width=0.5", "stages.0.epochs=1", "data.batch_size=18"]
    code, _, errors = tool("sweep", sweep, *small, "--jobs", 1, "--out", tmp_path / "runs")
    assert code == 0, errors
    code, printed, errors = tool("probe", tmp_path / "runs", recipe, *small, "--images", 8, "--out", tmp_path / "probe")
    assert code == 0, errors
    assert printed.splitlines()[-1] == str(tmp_path / "probe")
    found = json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert {name: len(runs) for name, runs in found.items()} == {"runs: ln": 2, "runs: bn": 2, str(recipe): 1}
    signals = [run["signals"] for runs in found.values() for run in runs]
    assert all(len(run) == 18 and {s["type"] for s in run} == {"RSign"} for run in signals)
    assert "±" in printed and (tmp_path / "probe" / "signals.png").stat().st_size > 1000
    assert "runs: ln" in (tmp_path / "probe" / "probe.md").read_text()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["recipes/cifar10_reactnet20.yaml", "--images", "1"], "--images: got 1, expected 2 to 100000"),
        (["model.norm=bn"], "expected a SOURCE"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(tool, args, message):  # noqa: F811
    code, _, errors = tool("probe", *args)
    assert code == 2 and message in errors and "Traceback" not in errors
