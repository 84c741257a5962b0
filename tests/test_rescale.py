"""Constants measured anew within a stage: the function stays, and so does what optimisers and processes agree on."""

import json

import pytest
import torch
from helpers import assert_same, double_stage, make_model, metrics_of, noise, tiny, train
from test_dist import spawn
from test_tools import tool  # noqa: F401
from torch import nn

from bnnfree.nn import (
    BatchRenorm2d,
    BinaryConv2d,
    BinaryLinear,
    GhostBatchNorm2d,
    RSign,
    WeightLayer,
    calibrate,
    measure_deviations,
    rescale,
    settle,
    settled,
)
from bnnfree.optim import make_optimizer, rescale_moments
from bnnfree.train import dist as processes
from bnnfree.train import load_checkpoint


class Mixed(nn.Module):
    """Every kind of layer with a constant deviation: centred both ways and not at all, binary, real, without a gain."""

    def __init__(self):
        super().__init__()
        unit = {"unit_output": True}
        self.layers = nn.Sequential(
            BinaryConv2d(3, 5, 3, centre="input", bias=True, **unit),
            RSign(5),
            BinaryConv2d(5, 6, (3, 2), stride=2, padding=1, centre="output", pad_value=1, **unit),
            BinaryConv2d(6, 4, 1, centre="output", gain=False, **unit),
            BinaryConv2d(4, 5, 1, binary=False, scale="learned", **unit),
            BinaryConv2d(5, 4, 1, centre="input"),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            BinaryLinear(4, 3, centre="input", **unit),
        )

    def forward(self, x):
        return self.layers(x)


def grown(make):
    """A calibrated model in float64 that was then changed, as training does: its deviations are out of date."""
    torch.manual_seed(1)
    model, images = make().double(), noise(7, 3, 9, 11, seed=3)
    calibrate(model, images)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter += 0.5 * parameter.std(correction=0).clamp_min(0.2) * noise(*parameter.shape, seed=i)
    return model, images


@pytest.mark.parametrize(
    "make",
    [
        Mixed,
        lambda: make_model("reactnet20", "free"),
        lambda: make_model("reactnet_a", "free", binarize="activations", centre=False),
        lambda: make_model("xnor_resnet18", "free", pad_value=-1),
    ],
)
def test_rescaling_leaves_the_function_and_what_it_is_centred_by(make):
    """In float64 to 1e-12, in training and in evaluation; with any images, not those measured with alone."""
    model, images = grown(make)
    others = noise(5, 3, 8, 7, seed=9)
    before = {mode: model.train(mode)(others).detach() for mode in (True, False)}
    buffers = {
        name: b.clone() for name, b in model.named_buffers() if not name.endswith(("output_std", "_sum", "_count"))
    }
    deviations = measure_deviations(model, images)
    old = {
        name: (model.get_submodule(name).output_std.clone(), model.get_submodule(name).gain.clone())
        for name in deviations
    }
    scaled = rescale(model, deviations)
    for mode, values in before.items():
        torch.testing.assert_close(model.train(mode)(others), values, rtol=1e-12, atol=1e-12)
    assert {n: b for n, b in model.named_buffers() if n in buffers}.keys() == buffers.keys()
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers() if name in buffers)
    assert len(scaled) == len(deviations) > 0
    for (name, (std, gain)), (parameter, ratio) in zip(old.items(), scaled, strict=True):
        layer = model.get_submodule(name)
        assert parameter is layer.gain and (ratio - 1).abs().max() > 1e-3
        torch.testing.assert_close(layer.output_std, std * ratio)
        torch.testing.assert_close(layer.gain, gain * ratio)


@pytest.mark.parametrize("make", [Mixed, lambda: make_model("reactnet20", "free")])
def test_then_each_channels_deviation_is_its_gain_and_layers_without_one_keep_their_constant(make):
    model, images = grown(make)
    kept = {name: m.output_std.clone() for name, m in units(model) if m.gain is None}
    was_training = model.train().training
    rescale(model, measure_deviations(model, images))
    assert model.training is was_training
    model.eval()
    seen = []
    for _, layer in units(model):
        layer.register_forward_hook(lambda layer, _, y: seen.append((layer.gain, y)))
    with torch.no_grad():
        model(images)
    assert len(seen) == len(units(model))
    for gain, y in seen:
        if gain is not None:
            std = y.transpose(0, 1).flatten(1).std(1, correction=0)
            assert ((std - gain.abs()).abs() <= 1e-9 * std).all()
    assert all(torch.equal(dict(units(model))[name].output_std, std) for name, std in kept.items())


def units(model):
    return [(n, m) for n, m in model.named_modules() if isinstance(m, WeightLayer) and m.unit_output]


def test_a_constant_channel_has_a_deviation_of_one():
    layer = BinaryConv2d(3, 4, 1, unit_output=True)
    rescale(nn.Sequential(layer), measure_deviations(nn.Sequential(layer), torch.zeros(2, 3, 5, 7)))
    assert torch.equal(layer.output_std, torch.ones(4)) and torch.equal(layer.gain, torch.ones(4))


OPTIMIZERS = {
    "adam": {},
    "adamw": {},
    "sgd": {"momentum": 0.7},
    "nesterov": {"momentum": 0.7, "nesterov": True},
    "plain": {"momentum": 0.0},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rescaled_moments_are_those_of_gradients_in_the_new_unit(name):
    """p' = r p has the gradient g / r: who always saw that has the same memory; p's own learning rate is 0 here."""
    ratio, gradients = noise(5, seed=1).abs() + 0.1, [noise(5, seed=i) for i in range(2, 5)]
    states = []
    for divisor in (torch.ones(5), ratio):
        param, other = nn.Parameter(noise(5)), nn.Parameter(noise(3))
        groups = [{"params": [param, other], "kind": "affine", "lr": 0.0, "weight_decay": 0.0}]
        kind = name if name in ("adam", "adamw") else "sgd"
        optimizers = make_optimizer(groups, kind, **OPTIMIZERS[name])
        rescale_moments(optimizers, [(param, ratio)])  # before the first step there is nothing
        for gradient in gradients:
            param.grad, other.grad = gradient / divisor, gradient[:3].clone()
            optimizers[0].step()
        states.append((optimizers, param, other))
    (ours, param, other), (theirs, new, untouched) = states
    rescale_moments(ours, [(param, ratio)])
    for mine, wanted in ((param, new), (other, untouched)):
        mine, wanted = ours[0].state[mine], theirs[0].state[wanted]
        assert mine.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(mine[key], value, rtol=1e-12, atol=0)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "every, before",  # 10 steps of 16 samples
    [(0, []), (80, [5]), (40, [3, 5, 8]), (17, [2, 3, 4, 5, 6, 7, 8, 9]), (1, list(range(1, 10))), (160, [])],
)
def test_a_stage_rescales_each_so_many_samples(monkeypatch, every, before):
    """The loss of the step after shows nothing of it."""
    losses, changes = [], []
    for count in (0, every):
        stage = double_stage(monkeypatch, tiny(f"free.recalibrate={count}", "ema.decay=0.5"))
        seen, previous = [], [dict(units(stage.model))[n].output_std.clone() for n, _ in units(stage.model)]

        def after(stage=stage, seen=seen, previous=previous):
            now = [m.output_std.clone() for _, m in units(stage.model)]
            seen.append((any((a != b).any() for a, b in zip(now, previous, strict=True)), stage.sums[0].item()))
            previous[:] = now
            for (_, ours), (_, theirs) in zip(units(stage.model), units(stage.average), strict=True):
                assert torch.equal(ours.output_std, theirs.output_std)

        for _ in range(2):
            stage.train_epoch(after)
        changes.append([step for step, (changed, _) in enumerate(seen) if changed])
        losses.append([loss for _, loss in seen])
    assert changes == [[], before]
    same = slice(0, 1 + (before or [9])[0])
    torch.testing.assert_close(torch.tensor(losses[1][same]), torch.tensor(losses[0][same]), rtol=1e-10, atol=0)
    assert not before or losses[1][-1] != losses[0][-1]


def test_rescaling_leaves_the_function_of_the_average(monkeypatch):
    stage = double_stage(monkeypatch, tiny("free.recalibrate=0", "ema.decay=0.8"))
    stage.train_epoch(lambda: None)
    images = noise(5, 3, 9, 9, seed=4)
    before = stage.average(images), stage.model.eval()(images)
    gains = [m.gain.clone() for _, m in units(stage.average)]
    stage._rescale()
    after = stage.average(images), stage.model(images)
    torch.testing.assert_close(after, before, rtol=1e-11, atol=1e-11)
    assert any((m.gain != gain).any() for (_, m), gain in zip(units(stage.average), gains, strict=True))


def test_a_stage_rescales_what_its_optimisers_remember_of_gains_too(monkeypatch):
    stage = double_stage(monkeypatch, tiny("free.recalibrate=0"))
    stage.train_epoch(lambda: None)
    before = {n: (p.detach().clone(), stage.optimizers[0].state[p]["exp_avg"].clone()) for n, p in params(stage)}
    stage._rescale()
    for name, param in params(stage):
        old, momentum = before[name]
        ratio = param.detach() / old if name.endswith(".gain") else 1.0
        torch.testing.assert_close(stage.optimizers[0].state[param]["exp_avg"] * ratio, momentum, rtol=1e-10, atol=0)
    assert any((param != before[name][0]).any() for name, param in params(stage))


def params(stage):
    return list(stage.model.named_parameters())


def test_without_such_constants_no_image_is_read(monkeypatch):
    recipe = tiny("model.norm=bn")
    recipe.free.recalibrate = 1
    stage = double_stage(monkeypatch, recipe)
    monkeypatch.setattr(stage, "_first_images", lambda *_: pytest.fail("images were read"))
    stage.train_epoch(lambda: None)


SPLIT = ("model.centre_gradient=false", "free.recalibrate=30", "data.batch_size=14")  # 7 and 7; 6 steps an epoch


def rescale_apart(rank, folder):
    """An epoch in each of two processes, of which the first alone measures."""
    dist = processes.start("cpu")
    with pytest.MonkeyPatch.context() as patch:
        stage = double_stage(patch, tiny(*SPLIT), dist)
        before = [m.output_std.clone() for _, m in units(stage.model)]
        if rank:
            patch.setattr("bnnfree.train.loop.measure_deviations", lambda *_: pytest.fail("process 1 measured"))
        stage.train_epoch(lambda: None)
        assert all((m.output_std != old).any() for (_, m), old in zip(units(stage.model), before, strict=True))
    torch.save(stage.model.state_dict(), folder / f"{rank}.pt")


def test_processes_end_with_the_same_gains_and_constants_as_one(tmp_path, monkeypatch):
    spawn(rescale_apart, tmp_path)
    ours, theirs = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert_same(dict(ours), dict(theirs))
    rescale_apart(0, tmp_path)
    alone = torch.load(tmp_path / "0.pt")
    for key, value in alone.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-8, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")


def test_settled_statistics_are_the_plain_mean_over_batches_and_nothing_else_moves():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.3), BatchRenorm2d(4)).double().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batches = [noise(n, 3, 5, 4, seed=n) for n in (3, 7)]
    settle(model, batches)
    outputs = [model[0](images) for images in batches]
    ghost = nn.Sequential(model[0], GhostBatchNorm2d(4, 2)).double()
    settle(ghost, batches)
    groups = [group for y in outputs for group in y.split(2)]
    assert ghost[1].num_batches_tracked == 6 and ghost[1].momentum == 0.1
    torch.testing.assert_close(ghost[1].running_var, sum(y.var((0, 2, 3)) for y in groups) / 6)
    torch.testing.assert_close(model[1].running_mean, sum(y.mean((0, 2, 3)) for y in outputs) / 2)
    torch.testing.assert_close(model[1].running_var, sum(y.var((0, 2, 3)) for y in outputs) / 2)
    assert model[1].momentum == 0.3 and not model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) or key.startswith("1."), key


def test_a_training_that_settles_learns_the_same_and_is_evaluated_otherwise(tmp_path):
    found = []
    for name, options in {"as": (), "settled": ("settle=40",)}.items():
        train(tmp_path / name, "model.norm=bn", *options)
        found.append((load_checkpoint(tmp_path / name / "last.pt")["model"], metrics_of(tmp_path / name)))
    (plain, before), (settled, after) = found
    assert_same(dict(plain), dict(settled))
    assert [m["loss"] for m in before] == [m["loss"] for m in after]
    assert [m["val_loss"] for m in before] != [m["val_loss"] for m in after]


def test_settled_input_means_are_of_these_images_and_training_gets_its_own_back():
    """In a network of one centred layer; in deeper ones inputs are made with the means of the batches so far."""
    torch.manual_seed(0)
    layer = BinaryConv2d(3, 4, 1, centre="input").double()
    model = nn.Sequential(layer).train()
    layer.input_mean.copy_(noise(3))
    old, batches = layer.input_mean.clone(), [noise(n, 3, 5, 4, seed=n) for n in (3, 7)]
    with settled(model, batches):
        torch.testing.assert_close(layer.input_mean, torch.cat(batches).mean((0, 2, 3)))
    assert torch.equal(layer.input_mean, old) and model.training
    assert layer.input_count == 0 and not layer._forward_pre_hooks


def test_settling_free_keeps_its_training_and_what_is_best_has_the_settled_means(tmp_path):
    """Without validation images the last epoch is the best."""
    last, tested = {}, {}
    for name, options in {"as": (), "settled": ("settle=40",)}.items():
        tested[name] = train(tmp_path / name, "data.val_fraction=0", *options)["test_loss"]
        last[name] = load_checkpoint(tmp_path / name / "last.pt")["model"]
    assert_same(dict(last["as"]), dict(last["settled"]))
    assert tested["as"] != tested["settled"]
    best = load_checkpoint(tmp_path / "settled" / "best.pt")["model"]
    other = [key for key, value in last["settled"].items() if not torch.equal(value, best[key])]
    assert other == [key for key in best if key.endswith("input_mean")] != []


@pytest.mark.parametrize("norm", ["bn", "free"])
def test_evaluate_settles_a_checkpoint_as_training_would_have(norm, tmp_path, tool):  # noqa: F811
    """last.pt holds what training goes by; without validation images the last epoch is the one that is tested."""
    tested = train(tmp_path / "settled", "settle=40", "data.val_fraction=0", f"model.norm={norm}")
    known = ("test_loss", "test_top1", "test_top5")
    losses = {}
    for images in (0, 40):
        written = tmp_path / f"{images}.json"
        code, _, errors = tool("evaluate", tmp_path / "settled" / "last.pt", "--settle", images, "--json", written)
        assert code == 0, errors
        figures = json.loads(written.read_text())
        losses[images] = [figures[key.removeprefix("test_")] for key in known]
        assert figures["settle"] == images
    assert losses[40] == pytest.approx([tested[key] for key in known])
    assert losses[0][0] != pytest.approx(tested["test_loss"], rel=1e-4)


def test_evaluate_settles_no_packed_file(tmp_path, tool):  # noqa: F811
    for arguments in (("x.bnnf", "--settle", 40), ("runs/x", "--settle", -1)):
        code, _, errors = tool("evaluate", *arguments)
        assert code and "--settle" in str(code) + errors and "expected 0 or more" in str(code) + errors


def unread():
    pytest.fail("images were read")
    yield


def test_where_nothing_is_averaged_no_image_is_read(monkeypatch):
    for options in (("model.norm=gn",), ("model.centre=false", "model.centre_head=false")):
        recipe = tiny(*options)
        recipe.settle = 40
        stage = double_stage(monkeypatch, recipe)
        monkeypatch.setattr(stage.data.train, "train_batches", lambda *_, **__: unread())
        before = {key: value.clone() for key, value in stage.model.state_dict().items()}
        with stage.settled():
            assert_same(dict(stage.model.state_dict()), before)
