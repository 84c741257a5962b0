"""Options of a recipe for networks without batch norm: each does what its key says, off by default, and resumes."""

import copy

import pytest
import torch
from helpers import assert_same, make_model, noise, tiny, train
from test_fused import assert_same_gradients, double, gradients
from test_probe import one_layer
from test_resume import check_cut
from torch import nn

from bnnfree.analysis.probe import probe
from bnnfree.data.datasets import describe, load_data
from bnnfree.errors import BnnfreeError
from bnnfree.nn import (
    STES,
    Clip,
    Design,
    RPReLU,
    RSign,
    Sign,
    WeightLayer,
    anneal,
    calibrate,
    centred_layers,
)
from bnnfree.nn.fused import PASSES, Fusion, load_passes, unfusible
from bnnfree.optim import parameter_groups
from bnnfree.recipe.read import RecipeError
from bnnfree.recipe.schema import Recipe
from bnnfree.train import load_checkpoint
from bnnfree.train.checkpoint import build_model, save_checkpoint
from bnnfree.train.dist import Dist
from bnnfree.train.loop import Stage
from models import MODELS

CPU = Dist(0, 1, torch.device("cpu"))
ALL = ("free.freeze=0.6", "free.recalibrate=3", "optimizer.gain_decay=0.01", "model.start=balanced",
       "model.centre_head=true", "model.ste_parameter=2", "model.ste_last=0.5",
       "ema.decay=0.9", "accumulate=2", "settle=40")  # fmt: skip


def stage_of(recipe, index=0):
    """A stage of `recipe`, not yet calibrated."""
    torch.manual_seed(recipe.seed)
    model = build_model(recipe, MODELS, describe(recipe.data), recipe.stages[index].binarize)
    return Stage(recipe, index, model, load_data(recipe.data), CPU)


def per_channel(y):
    return y.transpose(0, 1).flatten(1)


def watched(model, kinds, images):
    """{name: (input, output)} of the layers of some types in a forward pass."""
    seen = {}
    hooks = [
        module.register_forward_hook(lambda _, args, y, name=name: seen.update({name: (args[0], y)}))
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return seen


# -- all together


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run with every option that was never stopped."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    train(folder, *ALL)
    return folder


@pytest.mark.sample(3)
@pytest.mark.parametrize("step", [2, 4, 5, 8])  # 6 steps a stage: before 2, 4 and 5 it rescales, from 5 on it is frozen
def test_a_run_with_every_option_that_is_cut_resumes_to_the_same_bits(tmp_path, monkeypatch, unbroken, step):
    check_cut(tmp_path / "cut", unbroken, monkeypatch, step, ALL)


def test_a_checkpoint_from_before_there_were_these_keys_goes_on(tmp_path):
    train(tmp_path, "stages=[{epochs: 1}]")
    state = load_checkpoint(tmp_path / "last.pt")
    whole = copy.deepcopy(state)
    recipe = state["recipe"]
    added = {
        "free": ("freeze", "recalibrate"),
        "model": ("start", "ste_parameter", "ste_last", "centre_head"),
        "optimizer": ("gain_decay",),
    }
    for section, keys in added.items():
        for key in keys:
            del recipe[section][key]
    save_checkpoint(tmp_path / "last.pt", state)
    train(tmp_path, "stages=[{epochs: 1}]", resume=True)
    assert_same(load_checkpoint(tmp_path / "last.pt")["model"], whole["model"])
    with pytest.raises(BnnfreeError, match=r"free\.freeze \(1\.0 -> 0\.5\)"):
        train(tmp_path, "stages=[{epochs: 1}]", "free.freeze=0.5", resume=True)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("free.freeze=0", "greater than 0"),
        ("free.freeze=1.01", "less than or equal to 1"),
        ("free.recalibrate=-1", "greater than or equal to 0"),
        ("optimizer.gain_decay=-0.1", "greater than or equal to 0"),
        ("model.start=half", "'plain' or 'balanced'"),
        ("model.ste_parameter=0", "greater than 0"),
        ("model.ste_last=-1", "greater than 0"),
    ],
)
def test_a_value_out_of_range_is_refused(override, said):
    with pytest.raises(RecipeError, match=said):
        tiny(override)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("free.freeze=0.5", "free.track=false"), "free.freeze: got 0.5, which nothing reads here: .*free.track=true"),
        (("free.freeze=0.5", "model.norm=bn"), "it is for layers centred by"),
        (("free.freeze=0.5", "model.centre=false", "model.centre_head=false"), "it is for layers centred by"),
        (("optimizer.gain_decay=0.1", "model.norm=gn"), "it is for layers with a gain"),
        (("model.ste_parameter=0.5", "model.ste=ede"), "rule of its own"),
        (("model.ste_last=0.5", "model.ste=ede"), "rule of its own"),
        (("model.ste_parameter=0.5", "model.ste=identity"), "has no parameter"),
        (("model.ste_last=0.5", "model.ste=identity"), "has no parameter"),
    ],
)
def test_what_would_do_nothing_is_a_contradiction(overrides, said):
    with pytest.raises(RecipeError, match=said) as caught:
        tiny(*overrides)
    assert "\n" not in str(caught.value)
    tiny(*overrides[1:])


@pytest.mark.parametrize(("gather", "group"), [(False, 0), (True, 32)])
def test_recipes_of_before_groups_centre_as_they_did(gather, group):
    """Those in checkpoints name every key, `gather` too: a pass was centred as a whole."""
    values = tiny().model_dump()
    assert values["free"].pop("group") == 32
    values["free"]["gather"] = gather
    assert Recipe.model_validate(values).free.group == group


# -- freezing of input means


@pytest.mark.parametrize("share, moving", [(0.5, 5), (0.41, 5), (1e-9, 1), (1.0, 10)])
def test_input_means_follow_until_that_share_of_the_steps_and_then_stay(share, moving):
    plain, frozen = stage_of(tiny()), stage_of(tiny(f"free.freeze={share}"))
    courses = []
    for stage in (plain, frozen):
        stage.calibrate()
        course = [means(stage.model)]
        for _ in range(2):
            stage.train_epoch(lambda stage=stage, course=course: course.append(means(stage.model)))
        courses.append(course)
    assert len(courses[0]) == 11
    for step in range(11):
        assert torch.equal(courses[1][step], courses[0][step] if step <= moving else courses[1][moving])
    assert all((a != b).any() for a, b in zip(courses[0], courses[0][1:], strict=False))


def means(model):
    return torch.cat([layer.input_mean for _, layer in centred_layers(model)]).clone()


# -- decay of gains


def test_gains_have_a_group_of_their_own_only_where_they_decay():
    model = make_model("reactnet20", "free")
    options = {"lr": 0.5, "weight_decay": 0.1, "affine_lr_mult": 3.0}
    plain, own = parameter_groups(model, **options), parameter_groups(model, gain_decay=0.25, **options)
    gains = {f"{name}.gain" for name, m in model.named_modules() if isinstance(m, WeightLayer) and m.gain is not None}
    assert [group["kind"] for group in plain] == ["latent", "real", "affine", "head"]
    assert [group["kind"] for group in own] == ["latent", "real", "affine", "gain", "head"]
    by_kind = {group["kind"]: group for group in own}
    found = by_kind.pop("gain")
    assert set(found["names"]) == gains and gains
    assert (found["lr"], found["weight_decay"], found["agc"]) == (1.5, 0.25, False)
    assert sorted(found["names"] + by_kind["affine"]["names"]) == sorted(plain[2]["names"])
    for group in plain:
        if group["kind"] != "affine":
            assert by_kind[group["kind"]]["names"] == group["names"]
        assert all(by_kind[group["kind"]][key] == group[key] for key in ("lr", "weight_decay", "agc"))
    with pytest.raises(BnnfreeError, match="gain_decay -1"):
        parameter_groups(model, lr=0.1, gain_decay=-1)


def test_a_decay_of_gains_pulls_at_gains_and_at_nothing_else():
    ends = []
    for decay in (0.0, 0.5):
        stage = stage_of(tiny(f"optimizer.gain_decay={decay}", "optimizer.name=sgd", "optimizer.momentum=0"))
        stage.calibrate()
        lr = stage._take_step([next(iter(stage.data.train.train_batches(16, seed=0, epoch=0)))])
        ends.append(dict(stage.model.named_parameters()))
    for name, value in ends[0].items():
        pull = 5 * lr * 0.5 * value.new_ones(()) if name.endswith(".gain") else torch.zeros(())
        torch.testing.assert_close(ends[1][name], value - pull, rtol=1e-6, atol=1e-7)


# -- a balanced start


BALANCED = [("reactnet20", "free", {}), ("reactnet20", "free", {"binarize": "activations", "beta": "measured"}),
            ("reactnet_a", "free_paper", {}), ("reactnet20", "none", {}), ("reactnet20", "gn", {}),
            ("reactnet20", "frn", {}), ("reactnet20", "ic_gn", {}), ("reactnet20", "ln_pn", {}),
            ("reactnet18", "bn", {}), ("reactnet20", "ic", {}), ("reactnet20", "brn", {})]  # fmt: skip


@pytest.mark.parametrize("name, norm, options", BALANCED)
def test_after_it_half_of_each_channels_bits_are_plus_one_and_no_channel_has_a_mean(name, norm, options):
    """Within one value of n, and to 1e-12, on the images of the calibration; batch norms take their statistics."""
    model, images = make_model(name, norm, **options).double(), noise(5, 3, 11, 9, seed=6)
    buffers = {key: b.clone() for key, b in model.named_buffers() if "running" in key or "tracked" in key}
    calibrate(model, images, balance=True)
    now = dict(model.named_buffers())
    assert all(torch.equal(now[key], b) for key, b in buffers.items())
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    seen = watched(model, (RSign, RPReLU), images)
    assert len({type(model.get_submodule(path)) for path in seen}) == (1 if norm == "ln_pn" else 2)
    for path, (_, y) in seen.items():
        rows = per_channel(y)
        if isinstance(model.get_submodule(path), RSign):
            share = (rows > 0).double().mean(1)
            assert ((share - 0.5).abs() <= 1 / rows.shape[1] + 1e-12).all(), (path, share)
        else:
            assert rows.mean(1).abs().max() <= 1e-12, path


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_a_balanced_threshold_lies_on_no_value(count):
    """Each bit of these images is then the same whatever order its sums are made in."""
    sign, x = RSign(3).double(), noise(count, 3, 1, 1, seed=count)
    sign.balance(x)
    positive = (sign(x) > 0).sum((0, 2, 3))
    assert (positive == count - count // 2).all()
    if count > 1:
        gaps = per_channel(x).sort().values.diff().amin(1)
        assert ((x + sign.bias.view(1, 3, 1, 1)).abs().amin((0, 2, 3)) >= 0.49 * gaps).all()


@pytest.mark.parametrize("passes", ["torch", "native"])
def test_fused_gradients_at_a_balanced_start_are_those_of_the_layers(passes):
    """Of the very images that the thresholds come from."""
    if passes == "native" and load_passes()[0] is None:
        pytest.skip("no C passes")
    model, images, labels = double("reactnet20", "free", side=8)
    calibrate(model, images, balance=True)
    layers = gradients(model, images, labels)
    model.fusion = Fusion(PASSES if passes == "torch" else load_passes()[0])
    assert_same_gradients(gradients(model, images, labels), layers)


def test_it_leaves_no_trace_but_thresholds_and_shifts():
    """So what was fused still is; without it no parameter moves."""
    model, images = make_model("reactnet20", "free").train(), torch.randn(4, 3, 9, 9)
    before = {name: p.clone() for name, p in model.named_parameters()}
    calibrate(model, images)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    calibrate(model, images, balance=True)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {
        f"{name}.{'bias' if isinstance(m, RSign) else 'output_shift'}"
        for name, m in model.named_modules()
        if isinstance(m, RSign | RPReLU)
    }
    assert all(unfusible(block) is None for block in model.blocks) and model.training


def test_the_first_stage_starts_balanced_and_the_next_keeps_what_was_learned():
    recipe = tiny("model.start=balanced", "ema.decay=0.9")
    for index, moves in ((0, True), (1, False)):
        stage = stage_of(recipe, index)
        with torch.no_grad():
            for i, parameter in enumerate(stage.model.parameters()):
                parameter += 0.1 * noise(*parameter.shape, seed=i, dtype=torch.float32)
        before = {name: p.clone() for name, p in stage.model.named_parameters()}
        stage.calibrate()
        assert any((p != before[name]).any() for name, p in stage.model.named_parameters()) is moves
        for (name, ours), (_, theirs) in zip(
            stage.model.named_parameters(), stage.average.named_parameters(), strict=True
        ):
            assert torch.equal(ours, theirs), name


def test_a_stage_without_signs_hands_on_thresholds_that_halve():
    model, images = make_model("reactnet20", "free", binarize="none").double(), noise(5, 3, 9, 9)
    calibrate(model, images, balance=True)
    for path, (x, _) in watched(model.eval(), Clip, images).items():
        rows = per_channel(x) + model.get_submodule(path).bias[:, None]
        assert (((rows >= 0).double().mean(1) - 0.5).abs() <= 1 / rows.shape[1]).all(), path


def test_a_network_without_thresholds_cannot_start_balanced():
    with pytest.raises(RecipeError, match="model.start: got 'balanced', .* networks with thresholds or RPReLU"):
        tiny("model.start=balanced", "model.name=birealnet20")
    with pytest.raises(BnnfreeError, match="balanced start: got a Trunk without RSign and RPReLU"):
        calibrate(make_model("birealnet20", "free"), noise(2, 3, 9, 9).float(), balance=True)


# -- the estimator's width


def signs(model):
    return [module for module in model.modules() if isinstance(module, Sign)]


@pytest.mark.parametrize("ste", [name for name, rule in STES.items() if rule.free])
@pytest.mark.parametrize("react", [True, False])
def test_every_sign_has_the_parameter_and_moves_it_log_linearly(ste, react):
    name = "reactnet20" if react else "xnor_resnet20"
    model = make_model(name, "free", ste=ste, ste_parameter=0.5, ste_last=8.0)
    assert signs(model) and {s.parameter.item() for s in signs(model)} == {0.5}
    for progress, value in ((0.25, 1.0), (0.5, 2.0), (0.75, 4.0), (1.0, 8.0), (0.0, 0.5)):
        anneal(model, progress)
        assert [s.parameter.item() for s in signs(model)] == pytest.approx([value] * len(signs(model)))
    still = make_model(name, "free", ste=ste, ste_parameter=0.5)
    anneal(still, 0.7)
    assert {s.parameter.item() for s in signs(still)} == {0.5}
    (default,) = {s.parameter.item() for s in signs(make_model(name, "free", ste=ste))}
    late = make_model(name, "free", ste=ste, ste_last=4 * default)
    anneal(late, 0.5)
    assert [s.parameter.item() for s in signs(late)] == pytest.approx([2 * default] * len(signs(late)))


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("key", ["ste_parameter", "ste_last"])
def test_a_width_that_is_none_is_refused(key, value):
    with pytest.raises(BnnfreeError, match=key):
        Design(**{key: value})
    with pytest.raises(BnnfreeError, match="above 0"):
        Sign(**{key.replace("ste_", ""): value})


@pytest.mark.parametrize("passes", ["torch", "native"])
@pytest.mark.parametrize("window", ["sample", "fixed"])
@pytest.mark.parametrize("ste, first, last", [("approx", 2.0, 0.3), ("clip", 0.2, 1.5), ("sigmoid", 1.0, 9.0)])
def test_fused_gradients_are_those_of_the_layers_wherever_it_stands(passes, window, ste, first, last):
    if passes == "native" and (load_passes()[0] is None or ste == "sigmoid"):
        pytest.skip("no C passes for this")
    options = {"ste": ste, "ste_window": window, "ste_parameter": first, "ste_last": last}
    model, images, labels = double("reactnet20", "free", side=7, **options)
    found = []
    for progress in (0.0, 0.6):
        anneal(model, progress)
        model.fusion = None
        layers = gradients(model, images, labels)
        model.fusion = Fusion(PASSES if passes == "torch" else load_passes()[0])
        assert_same_gradients(gradients(model, images, labels), layers)
        found.append(layers[1]["blocks.0.branch.0.bias"])
    assert (found[0] - found[1]).abs().max() > 1e-3 * found[0].abs().max()


def test_it_moves_over_a_stage_and_starts_again_in_the_next():
    recipe = tiny("model.ste_parameter=2", "model.ste_last=0.5")
    for index in (0, 1):
        stage = stage_of(recipe, index)
        stage.calibrate()
        course = [signs(stage.model)[0].parameter.item()]
        for _ in range(2):
            stage.train_epoch(lambda stage=stage, course=course: course.append(signs(stage.model)[-1].parameter.item()))
        assert course == pytest.approx([2.0, *(2 * 0.25 ** (step / 10) for step in range(10))])


@pytest.mark.parametrize("parameter", [0.5, 1.0])
def test_a_probe_sees_the_width_that_is(parameter):
    x = torch.tensor([[0.4, -0.4, 0.6, -0.9, 2.0]] * 2, dtype=torch.float64)
    sign = Sign("clip", parameter=1.0, last=parameter)
    sign.anneal(1.0)
    (found,) = probe(one_layer(sign), x, torch.zeros(2, dtype=torch.long))
    assert found.in_window == pytest.approx({0.5: 0.4, 1.0: 0.8}[parameter])
