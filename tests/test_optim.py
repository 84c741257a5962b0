"""Gradient clipping, Bop and parameter groups; odd shapes, explicit loops as the reference."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import nn

from bnnfree.errors import BnnfreeError, UnknownNameError
from bnnfree.nn import BinaryConv2d, BinaryLinear, RPReLU, RSign, ScaledStdConv2d
from bnnfree.optim import (
    OPTIMIZERS,
    Bop,
    ClipRate,
    adaptive_grad_clip,
    describe_groups,
    find_head,
    make_optimizer,
    parameter_groups,
)

# conv OIHW, depthwise, 1x1, linear OI, one unit, PReLU slopes, biases, one value, a scalar, 3-D, RSign-like
SHAPES = [
    (5, 3, 3, 3),
    (7, 1, 3, 1),
    (1, 9, 1, 1),
    (11, 13),
    (1, 3),
    (7,),
    (3,),
    (1,),
    (),
    (5, 2, 3),
    (1, 7, 1, 1),
]


def params_of(shapes, seed, dtype=torch.float32, grad_scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    params = []
    for shape in shapes:
        p = nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        # sizes over three decades, so that some units are clipped and some are not
        spread = torch.randn(shape[:1] or (1,), generator=generator).mul(2).exp() * grad_scale
        spread = spread.view(-1, *[1] * (len(shape) - 1)) if len(shape) > 1 else spread[0]
        p.grad = (torch.randn(shape, generator=generator) * spread).to(dtype)
        params.append(p)
    return params


def clipped_by_loops(param, clip, eps=1e-3):
    """(gradient, rate): one unit and one value at a time, in Python's float64."""
    w, g = param.detach().double(), param.grad.double()
    units = [(w, g)] if w.dim() < 2 else list(zip(w, g, strict=True))
    rows, clipped = [], 0
    for w_u, g_u in units:
        w_norm = math.sqrt(sum(v * v for v in w_u.flatten().tolist()))
        g_norm = math.sqrt(sum(v * v for v in g_u.flatten().tolist()))
        limit = clip * max(w_norm, eps)
        rows.append(g_u * (limit / g_norm) if g_norm > limit else g_u)
        clipped += g_norm > limit
    return (rows[0] if w.dim() < 2 else torch.stack(rows)), clipped / len(units)


def equal_bits(a, b):
    return a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()


# ---- adaptive gradient clipping


@pytest.mark.parametrize("clip", [0.02, 0.5, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agc_equals_a_loop_over_units(clip, dtype):
    for seed in range(5):
        params = params_of(SHAPES, seed, dtype)
        wanted = [clipped_by_loops(p, clip) for p in params]
        rates = adaptive_grad_clip(params, clip)
        for p, rate, (grad, share) in zip(params, rates, wanted, strict=True):
            torch.testing.assert_close(p.grad.double(), grad, rtol=1e-6, atol=1e-12, msg=lambda m, s=seed: f"{s}: {m}")
            assert rate.shape == () and rate.item() == pytest.approx(share), (seed, tuple(p.shape))


def test_agc_rates_are_neither_all_zero_nor_all_one_on_the_test_data():
    rates = torch.stack(adaptive_grad_clip(params_of(SHAPES, 0), 0.5))
    assert 0 < rates.mean() < 1 and bool((rates[0] > 0) & (rates[0] < 1))


@pytest.mark.parametrize("weight_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("grad_format", [torch.contiguous_format, torch.channels_last])
def test_agc_reads_units_whatever_the_memory_format(weight_format, grad_format):
    (p,) = params_of([(6, 5, 3, 3)], 3)
    wanted, share = clipped_by_loops(p, 0.5)
    q = nn.Parameter(p.detach().to(memory_format=weight_format))
    q.grad = p.grad.to(memory_format=grad_format)
    (rate,) = adaptive_grad_clip([q], 0.5)
    torch.testing.assert_close(q.grad.double(), wanted, rtol=1e-6, atol=0)
    assert q.grad.is_contiguous(memory_format=grad_format) and rate.item() == pytest.approx(share)


def test_agc_reads_transposed_and_expanded_gradients():
    (p,) = params_of([(5, 7)], 4)
    p.grad = p.grad.t().contiguous().t()
    wanted, _ = clipped_by_loops(p, 0.1)
    adaptive_grad_clip([p], 0.1)
    torch.testing.assert_close(p.grad.double(), wanted, rtol=1e-6, atol=0)


def test_agc_leaves_small_gradients_bitwise_untouched():
    for dtype in (torch.float32, torch.float64, torch.float16):
        params = params_of(SHAPES, 5, dtype, grad_scale=1e-4)
        params[0].grad[0] = 0.0
        params[0].grad[1] = -0.0
        params[3].grad[2] = torch.finfo(dtype).smallest_normal / 4
        before = [p.grad.clone() for p in params]
        rates = adaptive_grad_clip(params, 1e3)
        assert all(equal_bits(p.grad, b) for p, b in zip(params, before, strict=True)), dtype
        assert all(rate == 0 for rate in rates)


def test_agc_touches_only_the_units_over_their_limit():
    p = nn.Parameter(torch.ones(3, 4))
    p.grad = torch.tensor([[0.01], [10.0], [0.02]]).repeat(1, 4)
    before = p.grad.clone()
    (rate,) = adaptive_grad_clip([p], 0.1)
    assert equal_bits(p.grad[0], before[0]) and equal_bits(p.grad[2], before[2])
    assert p.grad[1].norm().item() == pytest.approx(0.2) and rate.item() == pytest.approx(1 / 3)


def test_agc_leaves_a_gradient_exactly_at_its_limit_alone():
    p = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    p.grad = torch.tensor([[1.5, 2.0]])
    assert adaptive_grad_clip([p], 0.5)[0] == 0 and p.grad.tolist() == [[1.5, 2.0]]


def test_agc_floors_the_weight_norm_at_eps():
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.full((4,), 4.0)
    adaptive_grad_clip([p], 0.02)
    assert p.grad.norm().item() == pytest.approx(0.02 * 1e-3)
    p.grad = torch.full((4,), 4.0)
    adaptive_grad_clip([p], 0.02, eps=0.5)
    assert p.grad.norm().item() == pytest.approx(0.02 * 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_agc_takes_half_precision_norms_in_float32(dtype):
    p = nn.Parameter(torch.ones(3, 4097, dtype=dtype))
    p.grad = torch.full_like(p, 3e4)  # norm 1.9e6, more than float16 holds
    (rate,) = adaptive_grad_clip([p], 0.5)
    assert p.grad.dtype == dtype and rate == 1
    torch.testing.assert_close(p.grad, torch.full_like(p, 0.5))


def test_agc_handles_dtypes_and_clips_mixed_in_one_call_in_order():
    small, wide, half = (
        params_of([(5, 3)], s, d)[0] for s, d in [(1, torch.float32), (2, torch.float64), (3, torch.bfloat16)]
    )
    other = params_of([(7, 3)], 4)[0]
    everything = [wide, small, half, other]
    wanted = [clipped_by_loops(p, c) for p, c in zip(everything, [0.5, 0.5, 0.5, 0.05], strict=True)]
    rates = adaptive_grad_clip([{"params": [wide, small, half]}, {"params": other, "clip": 0.05}], 0.5)
    for p, rate, (grad, share) in zip(everything, rates, wanted, strict=True):
        torch.testing.assert_close(p.grad.double(), grad, rtol=1e-2 if p is half else 1e-6, atol=1e-12)
        assert rate.item() == pytest.approx(share) and rate.dtype == torch.float32


def test_agc_with_infinite_clip_is_off():
    params = params_of(SHAPES, 6)
    before = [p.grad.clone() for p in params]
    rates = adaptive_grad_clip(params, math.inf)
    assert all(equal_bits(p.grad, b) for p, b in zip(params, before, strict=True)) and sum(rates) == 0


def test_agc_twice_is_agc_once():
    params = params_of(SHAPES, 7)
    adaptive_grad_clip(params, 0.1)
    once = [p.grad.clone() for p in params]
    adaptive_grad_clip(params, 0.1)
    for p, grad in zip(params, once, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_agc_clips_the_accumulated_gradient_like_the_whole_batch():
    torch.manual_seed(8)
    x, y = torch.randn(9, 5, dtype=torch.float64) * 30, torch.randint(0, 3, (9,))
    whole, parts = nn.Linear(5, 3).double(), nn.Linear(5, 3).double()
    parts.load_state_dict(whole.state_dict())
    nn.functional.cross_entropy(whole(x), y).backward()
    for rows in (slice(0, 2), slice(2, 5), slice(5, 9)):
        (nn.functional.cross_entropy(parts(x[rows]), y[rows], reduction="sum") / 9).backward()
    rates = adaptive_grad_clip(whole.parameters(), 0.01), adaptive_grad_clip(parts.parameters(), 0.01)
    assert rates[0] == rates[1] and rates[0][0] > 0
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_agc_never_makes_a_bad_gradient_finite(bad):
    conv, slopes = params_of([(5, 3, 3, 3), (7,)], 9)
    conv.grad[1, 0, 2, 1] = bad
    slopes.grad[3] = bad
    wanted = conv.grad.clone()
    rates = adaptive_grad_clip([conv, slopes], 1e3)
    assert conv.grad[1].isnan().all() and slopes.grad.isnan().all()
    healthy = [0, 2, 3, 4]
    assert equal_bits(conv.grad[healthy], wanted[healthy])
    assert rates == [0, 0]


def test_agc_makes_a_gradient_whose_norm_overflows_nan_and_not_zero():
    p = nn.Parameter(torch.ones(2, 3))
    p.grad = torch.tensor([[1e30] * 3, [1.0] * 3])
    adaptive_grad_clip([p], 1.0)
    assert p.grad[0].isnan().all() and p.grad[1].isfinite().all()


def test_agc_skips_parameters_without_gradient_and_groups_that_opt_out():
    first, second, third = params_of([(3, 5), (5, 3), (7,)], 10, grad_scale=100)
    second.grad = None
    before = third.grad.clone()
    rates = adaptive_grad_clip(iter([{"params": [first, second]}, {"params": [third], "agc": False}]), 0.01)
    assert len(rates) == 1 and rates[0] == 1 and equal_bits(third.grad, before)
    assert adaptive_grad_clip([], 0.1) == [] and adaptive_grad_clip([second], 0.1) == []


def test_agc_accepts_one_tensor_and_optimiser_groups():
    p, q = (params_of([(3, 5)], 11)[0] for _ in range(2))
    adaptive_grad_clip(p, 0.01)
    adaptive_grad_clip(torch.optim.SGD([q], lr=1.0).param_groups, 0.01)
    assert equal_bits(p.grad, q.grad)


def test_agc_handles_empty_tensors():
    empty = nn.Parameter(torch.zeros(0, 3))
    empty.grad = torch.zeros(0, 3)
    assert adaptive_grad_clip([empty], 0.1) == [0]


def test_agc_refuses_what_it_cannot_clip():
    (p,) = params_of([(3, 5)], 12)
    for clip in (0.0, -1.0, math.nan):
        with pytest.raises(BnnfreeError, match="clip"):
            adaptive_grad_clip([p], clip)
    with pytest.raises(BnnfreeError, match="eps"):
        adaptive_grad_clip([p], 0.1, eps=0.0)
    with pytest.raises(BnnfreeError, match="clip"):
        adaptive_grad_clip([{"params": [p], "clip": 0}], 0.1)
    with pytest.raises(BnnfreeError, match="named_parameters"):
        adaptive_grad_clip(nn.Linear(3, 2).named_parameters(), 0.1)
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(BnnfreeError, match="sparse"):
        adaptive_grad_clip(table.parameters(), 0.1)


def rate_groups():
    first, second, third = params_of([(4, 3), (2, 3), (5,)], 13)
    return [
        {"params": [first, second], "names": ["a.weight", "b.weight"]},
        {"params": [third], "names": ["c"], "agc": False},
    ]


def test_clip_rate_is_the_mean_over_the_steps_that_had_a_gradient():
    groups, rate = rate_groups(), ClipRate()
    assert rate.mean() == {}
    rate.update(groups, [torch.tensor(0.25), torch.tensor(0.5)])
    groups[0]["params"][1].grad = None
    rate.update(groups, [torch.tensor(0.75)])
    assert rate.mean() == {"a.weight": 0.5, "b.weight": 0.5}
    rate.reset()
    assert rate.mean() == {}


def test_clip_rate_survives_a_checkpoint_in_mid_epoch():
    groups, rate, resumed = rate_groups(), ClipRate(), ClipRate()
    rate.update(groups, adaptive_grad_clip(groups, 0.5))
    file = io.BytesIO()
    torch.save(rate.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for r in (rate, resumed):
        r.update(groups, [torch.tensor(0.125), torch.tensor(1.0)])
    assert rate.mean() == resumed.mean() and rate.mean()["b.weight"] >= 0.5


def test_clip_rate_snapshot_does_not_move_with_later_steps():
    groups, rate = rate_groups(), ClipRate()
    rate.update(groups, [torch.tensor(0.0), torch.tensor(0.0)])
    state = rate.state_dict()
    rate.update(groups, [torch.tensor(1.0), torch.tensor(1.0)])
    assert state["total"]["a.weight"] == 0 and state["steps"]["a.weight"] == 1


def test_clip_rate_refuses_rates_of_other_parameters():
    groups = rate_groups()
    with pytest.raises(BnnfreeError, match="zero_grad"):
        ClipRate().update(groups, [torch.tensor(0.0)])
    with pytest.raises(BnnfreeError, match="names"):
        ClipRate().update([{"params": groups[0]["params"]}], [torch.tensor(0.0)] * 2)


def test_no_step_waits_for_the_device():
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES]  # reading a value raises
    for p in params:
        p.grad = torch.empty_like(p)
    groups, rate = [{"params": params, "names": [str(i) for i in range(len(params))]}], ClipRate()
    optimizer = Bop(params)
    for _ in range(2):
        rates = adaptive_grad_clip(groups, 0.1)
        rate.update(groups, rates)
        optimizer.step()
    assert all(r.is_meta and r.shape == () for r in rates) and optimizer.flips.is_meta
    with pytest.raises(Exception, match="meta"):
        rate.mean()


def test_agc_puts_each_rate_on_its_parameters_device():
    params = params_of([(5, 3), (7, 3), (3,)], 19)
    params[1] = nn.Parameter(params[1].detach().to("meta"))
    params[1].grad = torch.empty_like(params[1])
    wanted = clipped_by_loops(params[2], 0.1)[0]
    rates = adaptive_grad_clip(params, 0.1)
    assert [r.device.type for r in rates] == ["cpu", "meta", "cpu"]
    torch.testing.assert_close(params[2].grad.double(), wanted, rtol=1e-6, atol=0)


# ---- Bop


def bop_by_loops(w, m, g, gamma, threshold):
    flips = 0
    for i in range(len(w)):
        m[i] = (1 - gamma) * m[i] + gamma * g[i]
        if abs(m[i]) > threshold and (m[i] > 0) == (w[i] > 0):
            w[i], flips = -w[i], flips + 1
    return flips


@pytest.mark.parametrize("gamma, threshold", [(0.3, 0.2), (1.0, 0.0), (1e-2, 1e-3)])
def test_bop_equals_a_loop_over_weights(gamma, threshold):
    torch.manual_seed(14)
    params = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in [(3, 5, 3, 3), (7, 3), (5,)]]
    optimizer = Bop(params, gamma=gamma, threshold=threshold)
    w = [1.0 if v >= 0 else -1.0 for p in params for v in p.flatten().tolist()]
    m, total = [0.0] * len(w), 0
    for _ in range(20):
        for p in params:
            p.grad = torch.randn_like(p)
        flips = bop_by_loops(w, m, [v for p in params for v in p.grad.flatten().tolist()], gamma, threshold)
        optimizer.step()
        total += flips
        assert optimizer.flips == flips
        assert w == [v for p in params for v in p.flatten().tolist()]
    assert total > 0


def test_bop_replaces_weights_by_their_signs_and_zero_by_plus_one():
    p, late = nn.Parameter(torch.tensor([-0.3, 0.0, -0.0, 2.0])), nn.Parameter(torch.tensor([[-7.0]]))
    optimizer = Bop([p])
    optimizer.add_param_group({"params": [late]})
    assert p.tolist() == [-1, 1, 1, 1] and late.tolist() == [[-1]]


def test_bop_flips_strictly_above_the_threshold_only():
    p = nn.Parameter(torch.ones(4))
    optimizer = Bop([p], gamma=1.0, threshold=0.5)
    p.grad = torch.tensor([0.5, 0.75, -0.75, 0.0])
    optimizer.step()
    assert p.tolist() == [1, -1, 1, 1] and optimizer.flips == 1
    optimizer = Bop([p], gamma=1.0, threshold=0.0)
    p.grad = torch.zeros(4)
    optimizer.step()
    assert p.tolist() == [1, -1, 1, 1] and optimizer.flips == 0


def test_bop_recovers_hidden_signs_from_a_regression():
    torch.manual_seed(15)
    hidden = torch.randn(33).sign()
    p = nn.Parameter(torch.randn(33))
    optimizer = Bop([p], gamma=0.1, threshold=0.1)
    for _ in range(150):
        x = torch.randn(64, 33)
        optimizer.zero_grad()
        (x @ p - x @ hidden).square().mean().backward()
        optimizer.step()
    assert p.equal(hidden)


def test_bop_trains_a_binary_layer():
    torch.manual_seed(16)
    x = torch.randn(257, 19)
    target = x @ torch.randn(19, 5).sign()
    layer = BinaryLinear(19, 5, standardize=False, scale="none", gain=False)
    (optimizer,) = make_optimizer(parameter_groups(layer, lr=1.0), "bop", bop_gamma=0.1, bop_threshold=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 1e-9 and set(layer.weight.flatten().tolist()) == {-1.0, 1.0}


def test_bop_resumes_bit_for_bit():
    def run(steps, optimizer, p, generator):
        for _ in range(steps):
            p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()

    torch.manual_seed(17)
    start = torch.randn(7, 5)
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    generator = torch.Generator().manual_seed(1)
    straight = Bop([p], gamma=0.2, threshold=0.1)
    run(6, straight, p, generator)
    generator.manual_seed(1)
    first = Bop([q], gamma=0.2, threshold=0.1)
    run(3, first, q, generator)
    file = io.BytesIO()
    torch.save({"optimizer": first.state_dict(), "weight": q.detach()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    r = nn.Parameter(saved["weight"])
    second = Bop([r])
    second.load_state_dict(saved["optimizer"])
    run(3, second, r, generator)
    assert equal_bits(r.detach(), p.detach()) and second.param_groups[0]["gamma"] == 0.2
    assert equal_bits(second.state[r]["m"], straight.state[p]["m"])


def test_bop_takes_a_closure_and_groups_with_their_own_options_and_skips_missing_gradients():
    p, q, idle = (nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = Bop([{"params": [p], "gamma": 1.0}, {"params": [q, idle]}], gamma=0.01, threshold=0.5)

    def closure():
        optimizer.zero_grad()
        loss = (p + q).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 6 and optimizer.flips == 3
    assert p.tolist() == [-1] * 3 and q.tolist() == [1] * 3 and "m" not in optimizer.state[idle]
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.flips == 0


def test_bop_refuses_bad_options_and_parameters():
    for gamma in (0.0, -0.1, 1.5, math.nan):
        with pytest.raises(BnnfreeError, match="gamma"):
            Bop([nn.Parameter(torch.ones(1))], gamma=gamma)
    for threshold in (-1e-9, math.nan):
        with pytest.raises(BnnfreeError, match="threshold"):
            Bop([nn.Parameter(torch.ones(1))], threshold=threshold)
    with pytest.raises(BnnfreeError, match="float32"):
        Bop([nn.Parameter(torch.ones(1, dtype=torch.bfloat16))])
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(BnnfreeError, match="sparse"):
        Bop(table.parameters()).step()


# ---- parameter groups


class Net(nn.Module):
    """A little of everything; `names` renames every module and leaves the structure as it is."""

    def __init__(self, names=("stem", "act", "conv", "gn", "prelu", "fc", "proj", "classifier"), binary=True):
        super().__init__()
        stem, act, conv, gn, prelu, fc, proj, head = names
        self.add_module(stem, ScaledStdConv2d(3, 5, 3))
        self.add_module(act, RSign(5))
        self.add_module(conv, BinaryConv2d(5, 7, 3, scale="learned", bias=True, binary=binary))
        self.add_module(gn, nn.GroupNorm(1, 7))
        self.add_module(prelu, nn.Sequential(RPReLU(7), nn.PReLU(7)))
        self.add_module(fc, BinaryLinear(7, 9, binary=binary))
        self.add_module(proj, nn.Sequential(nn.Linear(9, 11), nn.Conv2d(1, 1, 1)))
        self.add_module(head, nn.Linear(11, 3))


def layout(groups):
    return [(g["kind"], [tuple(p.shape) for p in g["params"]], g["lr"], g["weight_decay"], g["agc"]) for g in groups]


def names_by_kind(model, **options):
    return {g["kind"]: g["names"] for g in parameter_groups(model, lr=0.1, **options)}


def test_groups_follow_the_module_types():
    groups = parameter_groups(Net(), lr=0.1, weight_decay=0.01, affine_lr_mult=0.5)
    kinds = {g["kind"]: g for g in groups}
    assert list(kinds) == ["latent", "real", "affine", "head"]
    assert kinds["latent"]["names"] == ["conv.weight", "fc.weight"]
    assert kinds["real"]["names"] == ["stem.weight", "proj.0.weight", "proj.1.weight"]
    assert kinds["head"]["names"] == ["classifier.weight", "classifier.bias"]
    affine = {"stem.gain", "act.bias", "conv.gain", "conv.scale", "conv.bias", "gn.weight", "prelu.0.slope"}
    assert affine | {"prelu.1.weight", "proj.0.bias", "gn.bias", "fc.gain"} < set(kinds["affine"]["names"])
    assert {k: (g["lr"], g["weight_decay"], g["agc"]) for k, g in kinds.items()} == {
        "latent": (0.1, 0.01, True),
        "real": (0.1, 0.01, True),
        "affine": (0.05, 0.0, False),
        "head": (0.1, 0.0, False),
    }


@pytest.mark.parametrize("frozen", [(), ("conv.weight", "act.bias", "classifier.bias")])
def test_groups_hold_every_trainable_parameter_once_under_its_full_name(frozen):
    model = Net()
    named = dict(model.named_parameters())
    for name in frozen:
        named.pop(name).requires_grad_(False)
    groups = parameter_groups(model, lr=0.1)
    found = [(n, p) for g in groups for n, p in zip(g["names"], g["params"], strict=True)]
    assert len(found) == len(named) and all(p is named[n] for n, p in found)


def test_groups_do_not_change_when_modules_are_renamed():
    renamed = Net(("fc", "conv1", "fc_a", "head", "weight", "bn", "classifier", "x"))
    options = {"lr": 0.1, "weight_decay": 0.01}
    assert layout(parameter_groups(renamed, **options)) == layout(parameter_groups(Net(), **options))


def test_groups_are_the_same_in_the_stage_with_real_weights():
    assert layout(parameter_groups(Net(binary=False), lr=0.1)) == layout(parameter_groups(Net(), lr=0.1))


def test_a_module_called_fc_that_is_not_the_head_is_clipped_and_the_head_is_not_whatever_its_name():
    body, head = nn.Linear(5, 7), nn.Linear(7, 3)
    model = nn.Sequential()
    model.add_module("fc", body)
    model.add_module("conv_last", head)
    assert find_head(model) is head
    assert names_by_kind(model) == {
        "real": ["fc.weight"],
        "affine": ["fc.bias"],
        "head": ["conv_last.weight", "conv_last.bias"],
    }
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e3)
    rates = adaptive_grad_clip(parameter_groups(model, lr=0.1), 0.01)
    assert len(rates) == 1 and body.weight.grad.norm() < 1 and (head.weight.grad == 1e3).all()


def test_a_model_answers_for_its_own_head():
    class Own(nn.Sequential):
        def get_classifier(self):
            return self[self.answer]

    model = Own(nn.Linear(3, 5), nn.Linear(5, 7), nn.Identity())
    model.answer = 0
    assert find_head(model) is model[0] and names_by_kind(model)["head"] == ["0.weight", "0.bias"]
    model.answer = 2  # timm's headless network
    assert find_head(model) is model[2] and "head" not in names_by_kind(model)
    model.get_classifier = lambda: None
    assert find_head(model) is None
    model.get_classifier = lambda: "fc"
    with pytest.raises(BnnfreeError, match="get_classifier"):
        find_head(model)


def test_the_head_is_the_last_linear_layer_unless_another_weight_follows():
    linear = nn.Linear(5, 3)
    assert find_head(nn.Sequential(nn.Linear(3, 5), linear, nn.LayerNorm(3), nn.PReLU(3))) is linear
    assert find_head(linear) is linear
    for last in (nn.Conv2d(3, 2, 1), ScaledStdConv2d(3, 2, 1), BinaryConv2d(3, 2, 1), BinaryLinear(3, 2)):
        assert find_head(nn.Sequential(linear, last)) is None, type(last)
    assert find_head(nn.ReLU()) is None


def test_subclasses_are_treated_as_their_base():
    class MyConv(BinaryConv2d):
        pass

    class MyLinear(nn.Linear):
        pass

    model = nn.Sequential(MyConv(3, 5, 1, gain=False), MyLinear(5, 7, bias=False), MyLinear(7, 3, bias=False))
    assert names_by_kind(model) == {"latent": ["0.weight"], "real": ["1.weight"], "head": ["2.weight"]}


def test_shared_parameters_appear_once_and_keep_their_strongest_kind():
    first, second = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
    second.weight = first.weight
    assert names_by_kind(nn.Sequential(first, second)) == {"head": ["0.weight"]}
    model = nn.Sequential(BinaryLinear(5, 5, gain=False), nn.Linear(5, 2))
    model.register_parameter("alias", model[0].weight)
    assert names_by_kind(model) == {"latent": ["alias"], "head": ["1.weight", "1.bias"]}


def test_groups_refuse_what_cannot_be_trained():
    with pytest.raises(BnnfreeError, match="requires a gradient"):
        parameter_groups(nn.Linear(3, 2).requires_grad_(False), lr=0.1)
    with pytest.raises(BnnfreeError, match="one batch"):
        parameter_groups(nn.LazyLinear(3), lr=0.1)
    for bad in ({"lr": -1.0}, {"lr": 0.1, "weight_decay": -1.0}, {"lr": 0.1, "affine_lr_mult": math.nan}):
        with pytest.raises(BnnfreeError, match=list(bad)[-1]):
            parameter_groups(nn.Linear(3, 2), **bad)


def test_agc_option_turns_clipping_off_in_every_group():
    assert not any(g["agc"] for g in parameter_groups(Net(), lr=0.1, agc=False))


def test_biases_from_zero_learn_at_full_size_under_sgd_with_agc():
    model = nn.Sequential(RSign(5), nn.Flatten(), nn.Linear(5, 3))
    groups = parameter_groups(model, lr=1.0)
    model[0].bias.grad = torch.full((5,), 8.0)
    adaptive_grad_clip(groups, 0.02)
    make_optimizer(groups, "sgd", momentum=0.0)[0].step()
    assert (model[0].bias == -8).all()


def test_describe_groups_is_a_table_of_fixed_width():
    groups = parameter_groups(Net(), lr=0.1, weight_decay=1e-5)
    lines = describe_groups(groups).splitlines()
    assert [line.split()[0] for line in lines] == ["kind", "latent", "real", "affine", "head"]
    assert lines[1].split() == ["latent", "2", f"{5 * 7 * 9 + 63}", "0.1", "1e-05", "yes"]
    assert lines[4].split()[-1] == "no" and len({line.rindex("  ") for line in lines}) == 1


# ---- optimisers


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_covers_the_groups_keeps_their_lr_and_steps(name):
    torch.manual_seed(18)
    model = Net()
    groups = parameter_groups(model, lr=0.1, affine_lr_mult=0.5)
    options = {"betas": (0.8, 0.9), "eps": 1e-6, "momentum": 0.7, "nesterov": True}
    optimizers = make_optimizer(groups, name, **options)
    kept = [g for optimizer in optimizers for g in optimizer.param_groups]
    assert [(g["kind"], g["initial_lr"], g["lr"]) for g in kept] == [(g["kind"], g["lr"], g["lr"]) for g in groups]
    assert "initial_lr" not in groups[0] and "betas" not in groups[0]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for optimizer in optimizers:
        optimizer.step()
    assert all(not p.equal(before[n]) for n, p in model.named_parameters())


def test_options_reach_their_optimizer():
    groups = parameter_groups(Net(), lr=0.1)
    (adamw,) = make_optimizer(groups, "adamw", betas=(0.8, 0.9), eps=1e-6)
    assert type(adamw) is torch.optim.AdamW and adamw.defaults["betas"] == (0.8, 0.9) and adamw.defaults["eps"] == 1e-6
    (sgd,) = make_optimizer(groups, "sgd", momentum=0.7, nesterov=True)
    assert sgd.defaults["momentum"] == 0.7 and sgd.defaults["nesterov"]
    bop, adam = make_optimizer(groups, "bop", bop_gamma=0.5, bop_threshold=0.25, eps=1e-6)
    assert bop.param_groups[0]["gamma"] == 0.5 and bop.param_groups[0]["threshold"] == 0.25
    assert type(adam) is torch.optim.Adam and adam.defaults["eps"] == 1e-6


def test_a_schedule_scales_every_group_from_its_initial_lr():
    groups = parameter_groups(Net(), lr=0.1, affine_lr_mult=0.5)
    (adam,) = make_optimizer(groups, "adam")
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / 4)
    adam.step()
    schedule.step()
    assert [g["lr"] for g in adam.param_groups] == pytest.approx([0.075, 0.075, 0.0375, 0.075])


def test_bop_takes_the_latents_without_decay_and_adam_the_rest():
    groups = parameter_groups(Net(), lr=0.1, weight_decay=0.01)
    bop, adam = make_optimizer(groups, "bop")
    assert [g["kind"] for g in bop.param_groups] == ["latent"] and bop.param_groups[0]["weight_decay"] == 0
    assert [g["kind"] for g in adam.param_groups] == ["real", "affine", "head"]
    assert len(make_optimizer(parameter_groups(BinaryLinear(3, 2, gain=False), lr=0.1), "bop")) == 1
    with pytest.raises(BnnfreeError, match="latent"):
        make_optimizer(parameter_groups(nn.Linear(3, 2), lr=0.1), "bop")


def test_an_unknown_optimizer_names_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'adamw'"):
        make_optimizer(parameter_groups(nn.Linear(3, 2), lr=0.1), "adamww")
