"""Fused training: C passes equal torch's, nodes equal the layers, little is kept, and what is chosen is said."""

import copy
import itertools
import pickle

import pytest
import torch
from cc import ASAN, ASAN_FINDS, HERE, needs, output_of
from helpers import double_stage, make_model, noise, tiny
from torch import nn
from torch.nn.functional import cross_entropy

from bnnfree.analysis.memory import saved_per_image
from bnnfree.errors import BnnfreeError
from bnnfree.library import FUSED
from bnnfree.nn import (
    STES,
    BinaryBlock,
    BinaryConv2d,
    Design,
    Sign,
    calibrate,
    centred_layers,
    gradient_centres,
    plan_step,
    set_part,
)
from bnnfree.nn.fused import PASSES, SPEEDS, Fusion, Shared, choose_speed, int8, load_passes, run_blocks, unfusible
from bnnfree.nn.fused import native as native_file
from bnnfree.nn.fused.native import KINDS, PAIRS
from bnnfree.nn.fused.node import Step, _convolve_back
from bnnfree.nn.fused.passes import Activation, Gate, Latent
from bnnfree.nn.fused.place import Place

MODELS = ("reactnet20", "birealnet18", "xnor_resnet18", "reactnet_a")
NORMS = ("free", "none", "free_paper")
SHAPES = ((1, 1, 1, 1), (2, 3, 5, 7), (3, 16, 4, 4), (2, 17, 3, 1), (1, 33, 1, 5), (5, 64, 2, 3))
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def native():
    passes, why = load_passes()
    if passes is None:
        pytest.skip(why)
    return passes


@pytest.fixture(params=["torch", "native"])
def passes(request):
    return PASSES if request.param == "torch" else request.getfixturevalue("native")


# -- passes


def real_of(trunk):
    return torch.float32 if trunk == BF16 else trunk


def case(shape, trunk, signs, react=True, seed=0):
    """A map, its activation and gate, and gradients of both kinds; some values on thresholds and no numbers."""
    real, channels = real_of(trunk), shape[1]
    v, g, e = (noise(*shape, seed=seed + i).to(trunk) for i in range(3))
    vectors = [noise(channels, seed=seed + 3 + i).to(real) for i in range(4)]
    act = Activation(*vectors[:3]) if react else Activation()
    beta = torch.tensor(1.7, dtype=real) if react else None
    gate = Gate(vectors[3] if react else None, beta, "approx", torch.tensor(1.3, dtype=real), True)
    return v, g, e.to(signs), act, gate


def tolerance(trunk):
    return {torch.float64: 1e-12, torch.float32: 2e-5, BF16: 2e-2}[trunk]


def assert_near(ours, theirs, trunk, what):
    assert (ours is None) == (theirs is None), what
    if ours is None:
        return
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, what
    size = theirs.double().abs().max().clamp_min(1.0)
    assert (ours.double() - theirs.double()).abs().max() <= tolerance(trunk) * size, what


@pytest.mark.parametrize("pair", sorted(PAIRS, key=str), ids=lambda pair: "-".join(str(d)[6:] for d in pair))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("react", [True, False])
def test_passes_over_maps_equal_torchs(native, pair, shape, react):
    """Signs are the same ones; what is summed in another order is near."""
    trunk, signs = pair
    v, g, e, act, gate = case(shape, trunk, signs, react)
    if v.numel() > 4:
        v.view(-1)[:3] = torch.tensor([0.0, -0.0, 3e4]).to(trunk)
    ours, theirs = (p.binarize(v, act, gate, signs, react, (len(v) + 1) // 2) for p in (native, PASSES))
    assert torch.equal(ours[0], theirs[0]) and ours[0].dtype == signs
    for a, b, what in zip(ours[1:], theirs[1:], ("windows", "counts"), strict=True):
        assert_near(a, b, trunk, what)
    assert torch.equal(native.activate(v, act, gate.beta), PASSES.activate(v, act, gate.beta).to(trunk))
    factor, bias = (noise(shape[1], seed=i).to(real_of(trunk)) for i in (20, 21))
    for base in (v, None):
        h = [p.residual(e, factor, bias, base, act) for p in (native, PASSES)]
        if base is not None or trunk == real_of(trunk):
            assert_near(*h, trunk, "residual")
    windows = PASSES.binarize(v, act, gate, signs, True, 0)[1]
    take = noise(*v.shape[:2], seed=9).to(real_of(trunk))
    for kind, of_h, of_s, w, t in itertools.product(KINDS, (g, None), (e, None), (windows, None), (take, None)):
        if of_s is None and (of_h is None or t is not None):
            continue
        how = None if of_s is None else gate._replace(ste=kind)
        back = [p.backward(v, act, how, w, of_h, of_s, None if how else gate.beta, t) for p in (native, PASSES)]
        for field, a, b in zip(back[0]._fields, *back, strict=True):
            if field == "threshold" and of_s is None:
                continue
            assert_near(a, b, trunk, (field, kind, of_h is None, of_s is None, w is None, t is None))


@pytest.mark.parametrize("pair", [
    (torch.float64, torch.float64), (torch.float32, torch.float32), (torch.float32, BF16)], ids=str)  # fmt: skip
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 3, 3), (7, 16, 3, 3), (4, 67, 1, 1), (2, 9, 2, 5)], ids=str)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_passes_over_weights_equal_torchs(native, pair, shape, order):
    """Whatever the memory order of weights, gradients and inputs."""
    dtype, signs = pair
    latent = noise(*shape, seed=1).to(dtype).contiguous(memory_format=order)
    inputs = noise(*shape[1:], seed=2).to(dtype)
    rows = [noise(shape[0], seed=i).to(dtype) for i in (3, 4, 5)]
    raw = noise(*shape, seed=6).to(signs)
    wide = latent[0].numel() > 1
    for standardize, binary, given in itertools.product((True, False), repeat=3):
        if standardize and not wide:
            continue  # a row of one value standardises to 0, of either sign by rounding
        how = Latent(standardize, binary, binary)
        mean = inputs if given else None
        ours, theirs = (p.prepare(latent, how, signs, rows[0], mean) for p in (native, PASSES))
        if binary:
            assert torch.equal(ours.weight, theirs.weight)
        for field, a, b in zip(ours._fields, ours, theirs, strict=True):
            near = torch.float64 if dtype == torch.float64 else BF16 if field == "weight" else torch.float32
            assert_near(a, b, near, field)
        again = native.prepare(latent, how, signs, rows[0], constants=ours.constants)
        assert torch.equal(again.weight, ours.weight)
        back = [p.weight_gradient(latent, how, raw, theirs.constants, rows[1], rows[2] if given else None, mean)
                for p in (native, PASSES)]  # fmt: skip
        for a, b in zip(*back, strict=True):
            assert_near(a, b, dtype, (standardize, binary, given))


def test_a_constant_row_of_weights_has_a_finite_gradient(passes):
    latent, how = torch.full((2, 3, 3, 3), 0.7), Latent(True, True, False)
    made = passes.prepare(latent, how, torch.float32)
    d, _ = passes.weight_gradient(latent, how, noise(2, 3, 3, 3).float(), made.constants, torch.ones(2), None, None)
    assert d.isfinite().all()


def test_a_constant_sample_has_a_window_of_one(native):
    """However large the constant: no cancellation; and a spread far below the mean is seen."""
    gate = case((1, 1, 1, 1), torch.float32, torch.float32, False)[4]
    for value in (0.1, 7.3, 1e4):
        v = torch.full((2, 3, 5, 4), value)
        v[1] += torch.arange(60).view(3, 5, 4) * value * 2e-5
        k = native.binarize(v, Activation(), gate, torch.float32, True, 0)[1]
        exact = PASSES.binarize(v.double(), Activation(), gate, torch.float64, True, 0)[1]
        assert k[0] == 1
        torch.testing.assert_close(k[1].double(), exact[1], rtol=1e-3, atol=0)


def test_what_is_no_number_is_negative_and_stays_none(native):
    v = torch.full((1, 2, 1, 3), float("nan"))
    for trunk, signs in PAIRS:
        s, _, _ = native.binarize(
            v.to(trunk), Activation(), case((1, 2, 1, 3), trunk, signs, False)[4], signs, False, 0
        )
        assert (s == -1).all() and native.activate(v.to(trunk), Activation()).isnan().all()


def test_rounding_to_bfloat16_is_torchs(native):
    bits = torch.arange(-(2**31), 2**31, 65521, dtype=torch.int64).to(torch.int32)  # a sample of all float32
    x = bits.view(torch.float32)[: 2 * (len(bits) // 2)].view(1, 2, -1, 1)
    h = native.residual(x.to(BF16), torch.ones(2), torch.zeros(2), torch.zeros_like(x, dtype=BF16), Activation())
    assert torch.equal(h.float().nan_to_num(7.0), (x.to(BF16).float() + 0).to(BF16).float().nan_to_num(7.0))
    ours = native.prepare(x.view(1, 2, -1, 1), Latent(False, False, False), BF16).weight
    assert torch.equal(ours.view(torch.int16), x.view(1, 2, -1, 1).to(BF16).view(torch.int16)) or torch.equal(
        ours.float().nan_to_num(7.0), x.view(1, 2, -1, 1).to(BF16).float().nan_to_num(7.0)
    )


@pytest.mark.thorough
@pytest.mark.parametrize("command", ["gcc", pytest.param("clang", marks=pytest.mark.slow)])
def test_no_pass_touches_memory_that_is_not_its_own(command, tmp_path):
    """Compiled with -O0, so that no fault is optimised away, in a third of the time."""
    needs([command], ASAN, ASAN_FINDS, tmp_path)
    flags = ["-std=c11", "-O0", "-fno-math-errno", "-fno-trapping-math", *ASAN, f"-I{FUSED.sources}"]
    output_of(command, *flags, HERE / "passes.c", "-o", tmp_path / "passes", "-lm")
    assert int(output_of(tmp_path / "passes")) > 10000


def test_the_number_of_threads_changes_no_bit(native):
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            v, g, e, act, gate = case((5, 24, 40, 30), torch.float32, torch.float32)
            s, k, c = native.binarize(v, act, gate, torch.float32, True, len(v))
            found.append([s, k, c, *native.backward(v, act, gate, k, g, e)])
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    finally:
        torch.set_num_threads(before)


# -- nodes


def double(name, norm, dtype=torch.float64, side=11, batch=4, **options):
    """A narrow model with its constants set and nothing at its start, images and labels."""
    model = make_model(name, norm, latent_std=0.04, **options).to(dtype)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            if parameter.dim() == 1:
                parameter += 0.1 * noise(len(parameter), seed=i).to(dtype)
    images = noise(batch, 3, side + 2, side, seed=5).to(dtype)
    calibrate(model, images)
    return model.to(memory_format=torch.channels_last).train(), images, torch.arange(batch) % 3


def gradients(model, images, labels):
    """Loss, gradients, and what centred layers counted."""
    model.zero_grad()
    for _, layer in centred_layers(model):
        layer.input_sum.zero_()
        layer.input_count.zero_()
    loss = cross_entropy(model(images), labels)
    loss.backward()
    return found_of(model, loss)


def found_of(model, loss):
    counted = {name: layer.input_sum.clone() for name, layer in centred_layers(model)}
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}, counted


def assert_same_gradients(ours, theirs, near=1e-10):
    assert abs(ours[0] - theirs[0]) <= near
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        size = gradient.abs().max()
        assert size > 0 and (ours[1][name] - gradient).abs().max() <= near * size, name
    for name, counted in theirs[2].items():
        torch.testing.assert_close(ours[2][name], counted, rtol=near, atol=near)


OPTIONS = [{}, {"binarize": "activations"}, {"pad_value": -1}, {"scale": "learned"}, {"ste": "clip"},
           {"ste_window": "fixed"}, {"shortcut": "real", "standardize": False}, {"scale": "mean_abs"}]  # fmt: skip


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_equal_the_layers(passes, name, norm, options):
    """In float64 to 1e-10, for every kind of block: transitions, duplicates, two convolutions."""
    model, images, labels = double(name, norm, **options)
    layers = gradients(model, images, labels)
    model.fusion = Fusion(passes)
    assert all(unfusible(block) is None for block in model.blocks)
    assert_same_gradients(gradients(model, images, labels), layers)


def test_an_activation_in_the_branch_is_a_fused_pass(passes):
    for norm in ("free", "bn", "ab"):
        options = {"activation": "branch", "alpha": 0.7, "centre_head": False}  # that would undo the last output shift
        model, images, labels = double("reactnet20", norm, ste="approx", **options)
        layers = gradients(model, images, labels)
        model.fusion = Fusion(passes)
        assert_same_gradients(gradients(model, images, labels), layers)


def test_steps_of_divided_groups_equal_the_layers(passes):
    """One image, then two, then all three of the group once more without a loss, when they are not counted."""
    model, images, labels = double("reactnet20", "free", batch=3)
    centres = gradient_centres(model)

    def step():
        parts, ((rows, again),) = plan_step([1, 2], 0, [1, 2], images)
        set_part(centres, parts[0], first=True)
        gradients(model, images[:1], labels[:1])
        set_part(centres, parts[1])
        loss = cross_entropy(model(images[1:]), labels[1:])
        loss.backward()
        set_part(centres, again)
        logits = model(images[[i + n for i, n in rows]])  # the second pass begins at the second image
        logits.backward(torch.zeros_like(logits))
        set_part(centres, None)
        return found_of(model, loss)

    layers = step()
    model.fusion = Fusion(passes)
    assert_same_gradients(step(), layers)
    assert all(layer.input_count == 3 for _, layer in centred_layers(model))


NORMED = [
    (name, norm)
    for name in ("reactnet20", "xnor_resnet20", "reactnet_a")
    for norm in ("bn", "brn", "gn", "in", "frn", "ln_pn")
    if name != "xnor_resnet20" or norm not in ("in", "ln_pn")
]  # these leave zeros, whose signs are rounding's


@pytest.mark.sample(3)
@pytest.mark.parametrize(("name", "norm"), [*NORMED, ("reactnet20", "bn of 3")])
def test_normalisers_stand_between_fused_convolutions(passes, name, norm):
    """Their running statistics too; on 1x1 maps (reactnet_a) instances have no gradient."""
    options = {"norm_options": {"ghost": 3}} if "of" in norm else {}
    model, images, labels = double(name, norm.split()[0], side=40 if name == "reactnet_a" else 11, alpha=0.7, **options)
    other = copy.deepcopy(model)
    other.fusion = Fusion(passes)
    assert all(unfusible(block) is None for block in other.blocks)
    assert_same_gradients(gradients(other, images, labels), gradients(model, images, labels))
    for (key, a), (_, b) in zip(model.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=key)


@pytest.mark.parametrize("norm, why", [("kn", "belief"), ("ic", "not made of signs"), ("ic_gn", "not made of signs")])
def test_what_stands_elsewhere_runs_as_layers(norm, why):
    model = make_model("reactnet20", norm)
    assert all(why in unfusible(block) for block in model.blocks) and choose_speed(model).name == "layers"


@pytest.mark.parametrize("ste", STES)
def test_every_estimator_is_fused(ste):
    model, images, labels = double("reactnet20", "free", ste=ste)
    layers = gradients(model, images, labels)
    speed = choose_speed(model, "fused")
    assert ("C passes" in speed.why) == (ste in KINDS and load_passes()[0] is not None)
    assert_same_gradients(gradients(model, images, labels), layers)


def test_a_block_of_other_kernels_strides_and_groups(passes):
    """Even sizes, dilation, groups, kernels of two sides: whatever a user puts into the branch."""
    for i, (kernel, place) in enumerate([((3, 1), {"padding": (1, 0)}), (5, {"padding": 4, "dilation": 2}),
                                         (3, {"padding": 1, "groups": 4})]):  # fmt: skip
        block = BinaryBlock(8, 8, Design(norm="none")).double().train()
        block.branch[1] = BinaryConv2d(8, 8, kernel, binary_input=True, standardize=i > 0, bias=True, **place).double()
        x = noise(2, 8, 6, 9).requires_grad_()
        weights = noise(2, 8, 6, 9, seed=3)
        (block(x) * weights).sum().backward()
        before = [x.grad.clone(), *(p.grad.clone() for p in block.parameters())]
        x.grad = None
        block.zero_grad()
        (run_blocks([block], x, Fusion(passes)) * weights).sum().backward()
        for a, b in zip([x.grad, *(p.grad for p in block.parameters())], before, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_products_of_8_bits_change_nothing(passes, name):
    """Sums of signs are whole numbers either way: a network's outputs and gradients are the same to the bit."""
    found = []
    for eight in (False, True):
        for options in ({}, {"pad_value": 1}, {"binarize": "activations"}):
            model, images, labels = double(name, "free", torch.float32, **options)
            model.fusion = Fusion(passes, int8=eight)
            found.append(gradients(model, images, labels))
    for ours, theirs in zip(found[:3], found[3:], strict=True):
        assert_same_gradients(ours, theirs, 0)


def test_what_takes_products_of_8_bits_is_asked_for(monkeypatch):
    model = make_model("reactnet20", "free")
    for faster in (False, True):
        monkeypatch.setattr(int8, "is_faster", lambda faster=faster: faster)
        assert ("int8" in str(choose_speed(model))) == faster == model.fusion.int8
    assert not choose_speed(model, precision="bf16").why.endswith("int8") and not model.fusion.int8


@pytest.mark.parametrize("error", [RuntimeError, AttributeError, NotImplementedError])
def test_without_operations_of_8_bits_they_are_not_taken(monkeypatch, error):
    """Nor where their sums are others."""

    def fails(*_):
        raise error

    monkeypatch.setattr(int8, "convolve", fails)
    assert int8.is_faster.__wrapped__() is False
    monkeypatch.setattr(int8, "convolve", lambda *_: torch.zeros(4, 64, 16, 16))
    assert int8.is_faster.__wrapped__() is False


@pytest.mark.parametrize("place", [
    Place((1, 1), (1, 1), (1, 1), 1, 0), Place((2, 1), (0, 2), (1, 1), 1, 0), Place((1, 2), (2, 2), (2, 2), 1, -1),
])  # fmt: skip
@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (2, 3)])
@pytest.mark.parametrize("size", [(5, 4), (12, 9)])
def test_gradients_of_weights_on_small_and_large_maps_are_those_of_the_convolution(place, kernel, size):
    """Small maps take another way; both equal autograd's."""
    x, w = noise(3, 6, *size), noise(4, 6, *kernel, seed=1).requires_grad_()
    step = Step(
        PASSES, place, Latent(False, False, False), "approx", False, torch.float64, False, False, False, None, False
    )
    padded, padding = place.padded(x)
    y = torch.nn.functional.conv2d(padded, w, None, place.stride, padding, place.dilation)
    g = noise(*y.shape, seed=2)
    (whole,) = torch.autograd.grad((y * g).sum(), w)
    of_x, of_w = _convolve_back(step, g, x, w.detach())
    torch.testing.assert_close(of_w, whole, rtol=1e-12, atol=1e-12)
    assert of_x.shape == x.shape


def test_blocks_that_cannot_be_fused_run_among_those_that_can(passes):
    model, images, labels = double("reactnet20", "free")
    layers = gradients(model, images, labels)
    called = []
    model.blocks[7].branch[1].register_forward_hook(lambda *_: called.append(7))
    model.fusion = Fusion(passes)
    assert "hooks" in unfusible(model.blocks[7]) and unfusible(model.blocks[6]) is None
    assert_same_gradients(gradients(model, images, labels), layers)
    assert called == [7]


def test_autocast_reaches_the_blocks_that_are_not_fused(passes):
    model, images, labels = double("reactnet20", "free", torch.float32)
    seen = []
    model.blocks[7].branch[1].register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    model.fusion = Fusion(passes, None, BF16)
    with torch.autocast("cpu", BF16):
        gradients(model, images, labels)
    assert seen == [True]


@pytest.mark.parametrize("low", [BF16, None])
def test_bf16_has_the_signs_of_fp32_and_exact_sums(passes, low):
    """A block at a time, on equal inputs: h is the same to rounding of float32, so signs and products are exact."""
    for name in MODELS:
        model, images, _ = double(name, "free", torch.float32)
        x = model.stem(images).detach()
        for block in model.blocks:
            whole = run_blocks([block], x, Fusion(passes)).detach()
            half = run_blocks([block], x, Fusion(passes, None, low)).detach()
            torch.testing.assert_close(half, whole, rtol=1e-5, atol=1e-5)
            x = whole


def test_gradients_in_bf16_are_near(passes):
    """Products of gradients are rounded to 8 bits: 1 % of the largest, where both have the same signs."""
    model, images, labels = double("reactnet20", "free", torch.float32)
    block = model.blocks[3]
    x = model.stem(images).detach()
    found = []
    for low in (None, BF16):
        model.zero_grad()
        t = x.clone().requires_grad_()
        (run_blocks([block], t, Fusion(passes, None, low)) * noise(*x.shape, seed=9).float()).sum().backward()
        found.append([t.grad, *(p.grad.clone() for p in block.parameters())])
    for whole, half in zip(*found, strict=True):
        assert whole.dtype == half.dtype and (whole - half).abs().max() <= 0.02 * whole.abs().max()


def test_a_half_precision_trunk_trains(passes):
    model, images, labels = double("reactnet20", "free", torch.float32, batch=12)
    model.fusion = Fusion(passes, BF16, BF16)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(80):
        loss = cross_entropy(model(images), labels)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize(("trunk", "size"), [(None, 4), (BF16, 2)])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_kept_is_what_signs_see_and_little_else(passes, name, trunk, size):
    """Bytes that grow with the batch: one number per value that is signed; images and pooled shortcuts are the rest."""
    model, images, _ = double(name, "free", torch.float32, side=30)
    signed = []
    hooks = [module.register_forward_pre_hook(lambda _, args: signed.append(args[0][0].numel()))
             for module in model.modules() if isinstance(module, Sign)]  # fmt: skip
    model(images)
    for hook in hooks:
        hook.remove()
    model.fusion = Fusion(passes, trunk, trunk)
    grown, fixed = saved_per_image(model, (3, 32, 30), 3)
    assert sum(signed) * size <= grown <= 1.2 * sum(signed) * size
    rows = sum(module.out_channels for module in model.modules() if isinstance(module, BinaryConv2d))
    assert fixed < 200 * rows  # numbers per output channel, and weights of the few layers that are not fused


def test_weights_are_shared_between_micro_batches_until_forgotten(passes):
    model, images, labels = double("reactnet20", "free")
    whole = gradients(model, images, labels)
    made, shared = [], Shared()
    model.fusion = Fusion(passes, shared=shared)
    prepare = passes.prepare
    counting = type("Counting", (type(passes),), {
        "__init__": lambda self: None,
        "prepare": lambda self, *a, **k: (made.append(k.get("constants") is None), prepare(*a, **k))[1],
    })()  # fmt: skip
    counting.__dict__.update(passes.__dict__)
    model.fusion = Fusion(counting, shared=shared)
    convs = sum(isinstance(m, BinaryConv2d) and m.binary_input for m in model.modules())
    for _ in range(3):
        assert_same_gradients(gradients(model, images, labels), whole)
    assert sum(made) == convs
    shared.forget()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.1)
    new = gradients(model, images, labels)
    model.fusion = None
    assert_same_gradients(new, gradients(model, images, labels))
    assert sum(made) == 2 * convs


def test_a_second_derivative_is_refused(passes):
    model, images, _ = double("reactnet20", "free")
    model.fusion = Fusion(passes)
    (first,) = torch.autograd.grad(model(images).sum(), model.stem[0].weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        first.sum().backward()


# -- the network


def test_evaluation_does_not_know_of_it(passes):
    model, images, _ = double("reactnet20", "free")
    before = model.eval()(images)
    model.fusion = Fusion(passes)
    assert torch.equal(model(images), before)


def test_a_fused_model_is_copied_and_pickled(passes):
    model, images, labels = double("reactnet20", "free")
    model.fusion = Fusion(passes)
    whole = gradients(model, images, labels)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.fusion.passes is not None
        assert_same_gradients(gradients(other, images, labels), whole, 0)


def compiled_equals_layers(backend, low):
    """Of a block before a transition, the transition and one after it."""
    model, images, labels = double("reactnet20", "free", torch.float32 if low else torch.float64)
    model.blocks, model.head = model.blocks[5:8], nn.Linear(16, 3, dtype=images.dtype)
    layers = gradients(model, images, labels)
    assert choose_speed(model, "fused_compiled", precision="bf16" if low else "fp32").compiled
    torch.compiler.reset()
    loss = cross_entropy(torch.compile(model, fullgraph=True, dynamic=False, backend=backend)(images), labels)
    model.zero_grad()
    loss.backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    if low:
        assert abs(loss - layers[0]) < 0.1
    else:
        assert_same_gradients((loss.detach(), ours, {}), (*layers[:2], {}))


@pytest.mark.thorough
@pytest.mark.parametrize("low", [False, True])
def test_it_compiles_without_a_graph_break(low):
    compiled_equals_layers("aot_eager", low)


@pytest.mark.slow  # python -m pytest -m slow tests/test_fused.py
def test_the_compiled_network_equals_the_layers():
    compiled_equals_layers("inductor", False)


@pytest.mark.parametrize("norm", ["free", "bn", "ic"])
def test_a_stage_ends_where_that_of_layers_ends(monkeypatch, norm):
    """Two epochs with everything a step has, in float64; micro-batches share weights."""
    ends = []
    for speed in ("layers", "auto"):
        recipe = tiny(f"model.norm={norm}", f"speed={speed}", "accumulate=2", "ema.decay=0.9", "agc.clip=0.02")
        stage = double_stage(monkeypatch, recipe)
        assert stage.speed.name == ("fused" if speed == "auto" and norm != "ic" else "layers")
        for _ in range(2):
            stage.train_epoch(lambda: None)
        ends.append(stage.average.state_dict() | stage.model.state_dict())
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, rtol=1e-8, atol=1e-8, msg=lambda m, k=key: f"{k}: {m}")


# -- what is chosen


def test_auto_takes_what_there_is(monkeypatch):
    model = make_model("reactnet20", "free")
    speed = choose_speed(model)
    assert speed.name == "fused" and "18 of 18 blocks" in str(speed) and not speed.compiled
    monkeypatch.setattr("bnnfree.nn.fused.speed.load_passes", lambda: (None, "got no C compiler"))
    assert "torch's operations, for got no C compiler" in str(choose_speed(model)) and model.fusion.passes is PASSES
    assert choose_speed(model, device="cuda").name == "compiled" and model.fusion is None
    assert choose_speed(model, device="cuda", precision="bf16_trunk").name == "fused_compiled"
    assert str(choose_speed(make_model("reactnet20", "ic"))).startswith("layers (its branch")
    assert choose_speed(nn.Linear(2, 2)).name == "layers"


@pytest.mark.parametrize(("wanted", "norm", "precision", "said"), [
    ("fast", "free", "fp32", "expected one of auto, layers"), ("fused", "ic", "fp32", "cannot be fused: its branch"),
    ("layers", "free", "bf16_trunk", "runs as layers"), ("auto", "ic_gn", "bf16_trunk", "precision=bf16"),
    ("auto", "free", "fp8", "fp32, bf16"),
])  # fmt: skip
def test_what_cannot_be_had_is_an_error_that_says_why(wanted, norm, precision, said):
    with pytest.raises(BnnfreeError) as raised:
        choose_speed(make_model("reactnet20", norm), wanted, precision=precision)
    assert said in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.thorough
def test_every_speed_and_precision_trains(tmp_path):
    from helpers import train

    for speed in SPEEDS[:2]:
        for precision in ("fp32", "bf16"):
            train(tmp_path / f"{speed}{precision}", f"speed={speed}", f"precision={precision}")
    train(tmp_path / "trunk", "precision=bf16_trunk")


def test_a_library_that_cannot_be_loaded_says_why(monkeypatch, tmp_path):
    broken = tmp_path / "x.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(native_file.FUSED, "path", lambda: broken, raising=False)
    native_file.load_passes.cache_clear()
    try:
        passes, why = native_file.load_passes()
        assert passes is None and "cannot be loaded" in why
    finally:
        native_file.load_passes.cache_clear()
