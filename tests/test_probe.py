"""Properties of bnnfree.analysis.probe, of probes within a training, and of what tools/probe.py shows of them."""

import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, assert_same, cut_at, make_model, metrics_of, noise, tiny, train
from test_dist import spawn
from test_sign import CASES, grid
from torch import nn

from bnnfree.analysis.probe import NUMBERS, Prober, probe, weight_signs
from bnnfree.errors import BnnfreeError
from bnnfree.models import MODELS
from bnnfree.nn import (
    BINARIZE,
    NORMS,
    STES,
    BatchRenorm2d,
    BinaryConv2d,
    BinaryLinear,
    Clip,
    RSign,
    Sign,
    anneal,
    calibrate,
)
from bnnfree.nn.fused import choose_speed
from bnnfree.optim import Precondition, adaptive_grad_clip
from bnnfree.recipe.read import RecipeError
from bnnfree.train import load_checkpoint
from bnnfree.train.report import PROBED, draw_probes

IMAGES, LABELS = noise(6, 3, 9, 9, seed=1, dtype=torch.float32), torch.tensor([0, 2, 1, 0, 1, 2])


def one_layer(sign, features=5, between=(), **options):
    """A sign and the binary layer that reads it: two classes."""
    torch.manual_seed(0)
    options = {"standardize": False, "gain": False, **options}
    return nn.Sequential(sign, *between, BinaryLinear(features, 2, **options)).double()


# the smooth network


@pytest.mark.parametrize("ste, parameter", CASES)
def test_a_smooth_function_starts_at_0_is_odd_and_has_the_slope_as_its_derivative(ste, parameter):
    t = grid(parameter).requires_grad_()
    width = torch.tensor(parameter, dtype=torch.float64)
    values = STES[ste].smooth(t, width)
    (derivative,) = torch.autograd.grad(values.sum(), t)
    # at 80 / k swish is cut off, where its slope is 1e-30
    assert torch.allclose(derivative, STES[ste].slope(t.detach(), width), rtol=1e-9, atol=1e-12)
    assert STES[ste].smooth(torch.zeros(1, dtype=torch.float64), width).item() == 0
    assert torch.allclose(STES[ste].smooth(-t, width), -values, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("ste, window", [("approx", "sample"), ("sigmoid", "fixed"), ("identity", "fixed")])
def test_cosine_is_the_one_between_the_estimated_and_the_numerical_gradient(ste, window):
    """Real weights: the smooth network can be differentiated by differences. k_n stays what it was."""
    torch.manual_seed(0)
    options = {"binary": False, "standardize": False, "gain": False, "padding": 1}
    convs = [BinaryConv2d(3, 4, 3, **options), BinaryConv2d(4, 5, 3, **options)]
    head = nn.Linear(5, 3)
    net = nn.Sequential(Sign(ste, window), convs[0], RSign(4, ste, window), convs[1], nn.AdaptiveAvgPool2d(1))
    net = nn.Sequential(*net, nn.Flatten(), head).double()
    nn.init.normal_(net[2].bias)
    x, smooth = IMAGES[:3].double(), STES[ste].smooth
    maps = {0: x}
    parameter = net[0].parameter

    def k(name, t):  # held constant from the first run on
        std = maps.setdefault(name, t).flatten(1).std(1, correction=0).view(-1, 1, 1, 1)
        return 1 / std if window == "sample" else torch.ones_like(std)

    def loss():
        h = convs[0](smooth(k(0, x) * x, parameter))
        t = h + net[2].bias.view(1, -1, 1, 1)
        h = convs[1](smooth(k(1, t) * t, parameter))
        return F.cross_entropy(head(h.mean((2, 3))), LABELS[:3]).item()

    with torch.no_grad():
        loss()
        numeric = torch.zeros_like(convs[0].weight).flatten()
        for i in range(len(numeric)):
            values = []
            for step in (1e-5, -2e-5):
                convs[0].weight.view(-1)[i] += step
                values.append(loss())
            convs[0].weight.view(-1)[i] += 1e-5
            numeric[i] = (values[0] - values[1]) / 2e-5
    found = probe(net, x, LABELS[:3])[0]
    F.cross_entropy(net(x), LABELS[:3]).backward()
    grad = convs[0].weight.grad.flatten()
    assert found.cosine == pytest.approx(F.cosine_similarity(grad, numeric, dim=0).item(), abs=1e-6)
    assert found.gradient == pytest.approx((grad.norm() / convs[0].weight.norm()).item())
    assert 0 < abs(found.cosine) < 0.999


def test_cosine_of_one_identity_layer_is_that_of_the_values_with_their_signs():
    """One pattern of two classes: the gradient is the input times a number, sign(x) here and x there."""
    x = noise(1, 5, seed=2)
    (found,) = probe(one_layer(Sign("identity")), x.repeat(3, 1), torch.zeros(3, dtype=torch.long))
    assert found.cosine == pytest.approx((x.abs().sum() / (math.sqrt(5) * x.norm())).item())


@pytest.mark.parametrize("ste", ["clip", "approx", "identity"])
@pytest.mark.parametrize("between", [(), (nn.Dropout(0.5),)])
def test_cosine_is_1_where_values_are_signs_already(ste, between):
    """With dropout only if both passes draw the same."""
    x = torch.where(noise(7, 33, seed=3) < 0, -1.0, 1.0).double()
    (found,) = probe(one_layer(Sign(ste), 33, between).train(), x, torch.arange(7) % 2)
    assert found.cosine == pytest.approx(1, abs=1e-12)


def test_both_passes_start_from_the_same_running_statistics():
    torch.manual_seed(0)
    norm = BatchRenorm2d(4)
    net = nn.Sequential(Sign("identity"), BinaryConv2d(5, 4, 1), norm, nn.PReLU(), nn.AdaptiveAvgPool2d(1))
    net = nn.Sequential(*net, nn.Flatten()).double().train()
    bits = torch.where(noise(3, 7, 5, 3, 3, seed=8) < 0, -1.0, 1.0).double()
    anneal(net, 1.0)
    net(bits[0] + 0.5)  # statistics that the next batch moves
    assert probe(net, bits[1], torch.arange(7) % 4)[0].cosine == pytest.approx(1, abs=1e-12)


def test_a_layer_without_a_gradient_has_no_cosine():
    dead = one_layer(Sign("clip"))
    (found,) = probe(dead, noise(4, 5, seed=4), torch.zeros(4, dtype=torch.long), loss=lambda z, y: 0 * z.sum())
    assert (found.gradient, found.cosine) == (0, None)


# the numbers


def test_numbers_about_bits_follow_their_definitions():
    x = torch.tensor([[[-3.0, 0.5, 1.5]], [[2.0, 4.0, -1.0]]]).repeat(2, 1, 1).view(2, 2, 1, 3)  # 2 samples, 2 channels
    bias = torch.tensor([-1.0, 0.25])
    sign = RSign(2, "clip")
    sign.bias.data = bias
    conv = BinaryConv2d(2, 3, 1, standardize=False, gain=False)
    t = x + bias.view(1, 2, 1, 1)
    (found,) = probe(nn.Sequential(sign, conv, nn.AdaptiveAvgPool2d(1), nn.Flatten()), x, torch.tensor([0, 2]))
    assert found.pre_sign_mean == pytest.approx(t.mean().item())
    assert found.pre_sign_std == pytest.approx(t.std(correction=0).item())
    assert found.in_window == pytest.approx((t.abs() <= 1).float().mean().item())
    # channel 0 (+1 is 1 of 3): -4 -0.5 0.5; channel 1 (2 of 3): 2.25 4.25 -0.75
    assert (found.positive, found.imbalance) == pytest.approx((0.5, 1 / 6))
    constant = t.mean((0, 2, 3)).square().mean() / t.square().mean()
    assert found.constant == pytest.approx(constant.item())
    assert (found.sign, found.convs, found.call, found.expected_std) == ("0", ("1",), 1, None)


@pytest.mark.parametrize(
    "x, imbalance", [(torch.ones(4, 5), 0.5), (torch.ones(4, 5) * torch.tensor([[1], [-1]] * 2), 0)]
)
def test_constant_bits_are_as_unbalanced_as_can_be(x, imbalance):
    (found,) = probe(one_layer(Sign()), x.double(), torch.zeros(4, dtype=torch.long))
    assert found.imbalance == imbalance and found.constant == 2 * imbalance


@pytest.mark.parametrize("ste", STES)
def test_a_window_per_sample_goes_with_the_values_and_a_fixed_one_does_not(ste):
    x, labels = noise(3, 5, 4, 4, seed=5), torch.zeros(3, dtype=torch.long)
    conv, end = BinaryConv2d(5, 2, 1, standardize=False), (nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def share(window, scale):
        return probe(nn.Sequential(Sign(ste, window), conv, *end).double(), x * scale, labels)[0].in_window

    assert share("sample", 1.0) == share("sample", 100.0)
    if ste == "identity":
        assert share("fixed", 100.0) == 1
    else:
        assert share("fixed", 100.0) < share("fixed", 1e-3) == 1


@pytest.mark.parametrize("ste, edge", [("sigmoid", math.acosh(10) * 2 / 3), ("clip", 1.0), ("approx", 1.0)])
def test_the_window_ends_where_the_slope_is_0_or_a_hundredth_of_its_peak(ste, edge):
    """sigmoid: slope / peak = 1 / cosh(k t / 2)^2, k = 3."""
    x = torch.tensor([[edge * 0.999, -edge * 0.999, edge * 1.001, -2 * edge, 0.0]] * 2, dtype=torch.float64)
    assert probe(one_layer(Sign(ste)), x, torch.zeros(2, dtype=torch.long))[0].in_window == pytest.approx(0.6)


def test_flips_are_the_share_of_bits_that_changed():
    model = one_layer(Sign(), 5)
    before = weight_signs(model)
    assert probe(model, noise(4, 5), LABELS[:4] % 2)[0].flips is None
    with torch.no_grad():
        model[1].weight[0, 1:4] *= -1
    (found,) = probe(model, noise(4, 5), LABELS[:4] % 2, before=before)
    assert found.flips == 0.3
    standardized = one_layer(Sign(), 5, standardize=True)
    before = weight_signs(standardized)
    with torch.no_grad():
        standardized[1].weight += 10  # all latents change, none of the bits
    assert probe(standardized, noise(4, 5), LABELS[:4] % 2, before=before)[0].flips == 0


def test_the_scale_drifts_from_what_calibration_saw_whatever_the_gain():
    model = make_model("reactnet20", "free")
    calibrate(model, IMAGES)
    for layer in probe(model, IMAGES, LABELS):
        assert (layer.output_std, layer.gain) == (pytest.approx(1, abs=1e-4), 1)
    last = probe(model, IMAGES, LABELS)[-1].convs[0]
    conv = model.get_submodule(last)
    with torch.no_grad():
        conv.output_std /= 3
        conv.gain.fill_(-2)
        conv.gain[0] = 0  # which says nothing about its scale
    layer = probe(model, IMAGES, LABELS)[-1]
    assert layer.output_std == pytest.approx(3, rel=1e-3)
    assert layer.gain == pytest.approx(2 * (len(conv.gain) - 1) / len(conv.gain))


def stds(name, norm, **options):
    model = make_model(name, norm, **options)
    calibrate(model, IMAGES)
    return model, [(layer.expected_std, layer.pre_sign_std) for layer in probe(model, IMAGES, LABELS)]


def test_the_expected_deviation_is_what_each_network_goes_by():
    paper = stds("reactnet20", "free_paper")[1]
    assert {expected for expected, _ in paper} == {1.0} and paper[-1][1] < 0.9  # bits that are not balanced lose it
    assert {expected for expected, _ in stds("reactnet20", "free")[1]} == {None}
    for expected, found in stds("reactnet20", "free", beta="measured")[1]:
        assert expected == 1 and found == pytest.approx(1, abs=1e-3)
    for expected, found in stds("reactnet20", "ic", norm_options={"drop": 0.0})[1]:  # in training, so to the batch
        assert expected == 1 and found == pytest.approx(1, abs=1e-3)
    for norm, expected in {"free": 1, "bn": 1, "ln_pn": 1, "none": None, "free_paper": None, "frn": None}.items():
        inner = stds("xnor_resnet20", norm)[1][1::2]
        assert {each for each, _ in inner} == {expected}, norm


def test_the_expected_deviation_after_a_norm_has_its_gain_and_bias_in_it():
    model, _ = stds("xnor_resnet20", "bn")
    norm = model.blocks[0].branch[2]
    with torch.no_grad():
        norm.weight.copy_(noise(8, seed=6))
        norm.bias.copy_(noise(8, seed=7))
    layer = probe(model, IMAGES, LABELS)[1]
    assert layer.sign == "blocks.0.branch.3"
    assert layer.pre_sign_std == pytest.approx(layer.expected_std, rel=1e-3) and layer.expected_std != pytest.approx(1)


def test_agc_rate_is_what_the_clipping_would_do():
    model = make_model("reactnet20", "free_paper").train()
    found = probe(model, IMAGES, LABELS, agc=(0.02, 1e-3))
    assert all(layer.agc_rate is None for layer in probe(model, IMAGES, LABELS))
    F.cross_entropy(model(IMAGES), LABELS).backward()
    for layer in found:
        (rate,) = adaptive_grad_clip(model.get_submodule(layer.convs[0]).weight, 0.02)
        assert layer.agc_rate == pytest.approx(rate.item())
    assert 0 < sum(layer.agc_rate for layer in found) < len(found)


# any network


@pytest.mark.sample(2)
@pytest.mark.parametrize("norm", NORMS)
def test_nothing_of_the_network_changes_and_the_next_probe_is_the_same(norm):
    model = make_model("reactnet20", norm).train()
    calibrate(model, IMAGES)
    if norm in ("free", "free_paper"):
        assert choose_speed(model, "auto").name == "fused"
    if norm == "gn":
        Precondition(model)
    F.cross_entropy(model(IMAGES), LABELS).backward()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    values = [*model.parameters(), *model.buffers()]
    state = [value.detach().clone() for value in values]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    random = torch.get_rng_state()
    first = probe(model, IMAGES, LABELS, before=weight_signs(model))
    assert torch.equal(torch.get_rng_state(), random)
    assert_same([value.detach() for value in values], state)
    assert_same([p.grad for p in model.parameters()], grads)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks and model.training
    assert not any("forward" in vars(module) for module in model.modules())
    assert len(first) == 18 and all(layer.flips == 0 and layer.cosine is not None for layer in first)
    assert probe(model, IMAGES, LABELS, before=weight_signs(model)) == first


def test_hooks_of_others_see_nothing_of_a_probe():
    model, seen = make_model("reactnet20", "free"), []
    model.blocks[1].register_forward_hook(lambda *_: seen.append(1))
    model.blocks[1].branch[0].register_forward_pre_hook(lambda *_: seen.append(2))
    probe(model, IMAGES, LABELS)
    assert not seen
    model(IMAGES)
    assert seen == [2, 1]


def test_the_fused_network_is_probed_as_its_layers():
    model = make_model("reactnet20", "free").train()
    calibrate(model, IMAGES)
    layers = probe(model, IMAGES, LABELS)
    choose_speed(model, "fused")
    fusion = model.fusion
    assert probe(model, IMAGES, LABELS) == layers and model.fusion is fusion


@pytest.mark.sample(2)
@pytest.mark.parametrize("binarize", BINARIZE)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "resnet20"])
def test_every_sign_of_every_network_has_a_layer_with_its_convolution(name, binarize):
    model = make_model(name, "free", binarize=binarize)
    calibrate(model, IMAGES)
    found = probe(model, IMAGES, LABELS, before=weight_signs(model))
    signs = [path for path, module in model.named_modules() if isinstance(module, Sign | Clip)]
    assert [layer.sign for layer in found] == signs
    for layer in found:
        (path,) = layer.convs
        assert path.rsplit(".", 1)[0] == layer.sign.rsplit(".", 1)[0]
        assert (layer.flips is None) is not BINARIZE[binarize][1]
        assert (layer.cosine is None) is not BINARIZE[binarize][0]
        assert layer.gradient > 0 and 0 < layer.in_window <= 1
    assert len({layer.convs for layer in found}) == len(found)


@pytest.mark.parametrize(
    ("model", "images", "labels", "message"),
    [
        ("reactnet20", 1, 1, "images: got 1, expected 2 or more"),
        ("reactnet20", 4, 3, "labels: got 3 for 4 images, expected one each"),
        ("resnet20", 4, 4, "no sign ran, expected one at least of Sign, RSign, Clip"),
    ],
)
def test_what_cannot_be_probed_is_an_error_with_the_reason(model, images, labels, message):
    with pytest.raises(BnnfreeError, match=message):
        probe(make_model(model, "bn"), IMAGES[:images], LABELS[:labels])


# in a training

EVERY = ("probe.every=3",)


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """A run of two stages of two epochs with probes; 5 steps an epoch."""
    folder = tmp_path_factory.mktemp("runs") / "probed"
    train(folder, *EVERY, "agc.clip=0.02", curves=True)
    return folder


def test_a_training_has_a_record_at_each_stages_start_and_after_every_n_steps(probed):
    lines = metrics_of(probed)
    assert [[r["step"] for r in line["probe"]] for line in lines] == [[0, 3], [6, 9], [10, 13], [16, 19]]
    first, second = (lines[i]["probe"] for i in (0, 2))
    assert all(len(record["layers"]) == 18 for line in lines for record in line["probe"])
    assert {layer["flips"] for layer in first[0]["layers"]} == {None}  # its weights are not binary
    assert {layer["flips"] for layer in second[0]["layers"]} == {None}
    assert sum(layer["flips"] for layer in second[1]["layers"]) > 0
    for records in (first, second):  # right after calibration, and what is then expected
        assert [r["layers"][5]["expected_std"] for r in records] == [records[0]["layers"][5]["pre_sign_std"]] * 2
        assert all(layer["agc_rate"] is not None for layer in records[0]["layers"])
    assert first[0]["layers"][5]["output_std"] == pytest.approx(1, abs=0.2)
    assert (probed / "probe.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("options", [("model.norm=free",), ("model.norm=ic", "optimizer.precondition=bnp")])
def test_training_has_the_same_bits_with_and_without(tmp_path, options):
    options = ("agc.clip=0.02", "stages.0.epochs=1", "stages.1.epochs=1", *options)
    train(tmp_path / "with", *EVERY, *options)
    train(tmp_path / "without", *options)
    for name in ("last.pt", "best.pt"):
        ours, theirs = (load_checkpoint(tmp_path / folder / name) for folder in ("with", "without"))
        for state in (ours, theirs):
            for key in ("recipe", "probe", "history"):
                state.pop(key)
        assert_same(ours, theirs)
    ours, theirs = metrics_of(tmp_path / "with"), metrics_of(tmp_path / "without")
    assert all(line.pop("probe") for line in ours) and ours == theirs
    assert not (tmp_path / "with" / "probe.png").exists()  # curves=False


@pytest.mark.parametrize("step", [4, 12])
def test_a_run_that_goes_on_has_the_same_records(tmp_path, monkeypatch, probed, step):
    with monkeypatch.context() as patch:
        cut_at(patch, step)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut", *EVERY, "agc.clip=0.02", "checkpoint_minutes=0.00001")
    train(tmp_path / "cut", *EVERY, "agc.clip=0.02", resume=True)
    assert metrics_of(tmp_path / "cut") == metrics_of(probed)


def test_the_images_are_the_first_of_the_runs_first_epoch(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Prober, "measure", lambda self, model, step, images, labels, **_: seen.append((images, labels)))
    train(tmp_path / "run", "probe.every=7")
    from bnnfree.data.datasets import load_data

    batches = load_data(tiny().data).train.train_batches(16, seed=0, epoch=0)
    parts = [next(batches) for _ in range(4)]
    assert len(seen) == 4  # steps 0 and 7 of both stages
    for images, labels in seen:
        assert torch.equal(images, torch.cat([part[0] for part in parts]))
        assert torch.equal(labels, torch.cat([part[1] for part in parts]))


def test_a_recipe_that_cannot_be_probed_says_why():
    with pytest.raises(RecipeError, match="probe.every"):
        tiny("probe.every=0")


def test_a_network_without_signs_is_refused_before_its_first_step(tmp_path):
    with pytest.raises(BnnfreeError, match="probe.every: got 2, .* networks with binary layers"):
        train(tmp_path / "run", "model.name=resnet20", "probe.every=2")


@pytest.mark.thorough
def test_two_processes_probe_once_and_end_together(tmp_path):
    spawn(train_together, tmp_path)
    steps = [[record["step"] for record in line["probe"]] for line in metrics_of(tmp_path / "run")]
    assert steps == [[0, 4], [5, 9]]
    assert sorted(path.name for path in tmp_path.glob("refused*")) == ["refused0", "refused1"]


def train_together(rank, folder):
    short = ("stages.0.epochs=1", "stages.1.epochs=1", "device=cpu")
    train(folder / "run", "probe.every=4", *short)
    try:
        train(folder / "real", "model.name=resnet20", "probe.every=2", "device=cpu")
    except BnnfreeError as error:  # in both, although one measures
        assert "networks with binary layers" in str(error)
        (folder / f"refused{rank}").touch()


# what is shown


def records_of(folder):
    return [record for line in metrics_of(folder) for record in line["probe"]]


def test_the_picture_has_a_row_of_panels_per_network_and_the_same_axes(tmp_path, monkeypatch, probed):
    from matplotlib import pyplot

    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    records = records_of(probed)
    small = [{"step": None, "layers": [dict.fromkeys(NUMBERS, 7.0), dict.fromkeys(NUMBERS)]}]
    draw_probes(tmp_path / "two.png", {"one": records, "other": small})
    draw_probes(tmp_path / "one.png", {"one": records})
    two, one = (
        [axis for axis in figure.axes if axis.get_xlabel() or axis.lines or axis.texts or axis.get_title()]
        for figure in figures
    )
    assert len(two) == 2 * len(PROBED) and len(one) == len(PROBED)
    for i in range(len(PROBED)):
        upper, lower = two[i], two[i + len(PROBED)]
        assert upper.get_ylim() == lower.get_ylim() and upper.get_xlim() == lower.get_xlim() == (0.5, 18.5)
        assert upper.get_ylim()[1] > 7
        assert list(lower.lines[0].get_ydata())[0] == 7
    assert "steps 0 to 19" in two[0].get_ylabel() and two[len(PROBED)].get_ylabel() == "other"


def run_tool(*args):
    done = subprocess.run([sys.executable, "tools/probe.py", *args], cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.thorough
def test_the_tool_shows_start_end_and_course_of_a_run_beside_another(tmp_path, probed):
    still = tmp_path / "still"
    train(still, "optimizer.lr=1e-20", "stages.0.binarize=both")  # ends where it started
    done = run_tool(str(probed), str(still), "model.norm=bn", "--images", "7", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "out")
    found = json.loads((tmp_path / "out" / "probe.json").read_text())
    ((one,), (other,)) = found[str(probed)], found[str(still)]
    assert one["course"] == records_of(probed) and other["course"] == []
    assert {layer["flips"] for layer in other["trained"]} == {0.0}
    assert all(0 < layer["flips"] < 0.5 for layer in one["trained"])
    for seen in (one, other):  # key=value is about the data: the network stays what was trained
        assert {layer["gain"] for layer in seen["initial"]} == {1.0}
    text = (tmp_path / "out" / "probe.md").read_text()
    for line in (f"{probed}, initial", f"{probed}, trained", f"{probed}, step 19", f"{still}, trained"):
        assert line in text and line in done.stdout
    assert f"{still}, step" not in text
    assert (tmp_path / "out" / "probe.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("line", ["{", "3", '{"probe": 3}', '{"probe": [{"step": 1, "layers": [{}]}]}'])
def test_a_damaged_course_is_one_message(tmp_path, probed, line):
    from bnnfree.commands import probe as tool

    assert tool.course_of(probed) == records_of(probed)
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(BnnfreeError, match=r"metrics\.jsonl: is not what training with probe\.every writes"):
        tool.course_of(tmp_path)
