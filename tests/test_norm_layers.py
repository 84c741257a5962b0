"""Filter response normalisation, independent components and batch renormalisation: formulas and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import double_stage, make_model, noise, tiny
from torch import nn

from bnnfree.errors import BnnfreeError
from bnnfree.nn import (
    BatchRenorm2d,
    BinaryConv2d,
    Design,
    FilterResponseNorm,
    GhostBatchNorm2d,
    RSign,
    Sign,
    ThresholdedLinear,
    anneal,
    make_norm,
)

# -- ghost batches


def ghost_and_plain(ghost, momentum=0.3):
    """Both with the same vectors off their start, in float64."""
    layers = GhostBatchNorm2d(4, ghost, momentum=momentum).double(), nn.BatchNorm2d(4, momentum=momentum).double()
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(noise(4, seed=1)), layer.bias.copy_(noise(4, seed=2))
            layer.running_mean.copy_(noise(4, seed=3)), layer.running_var.copy_(noise(4, seed=4).abs())
    return layers


@pytest.mark.parametrize("momentum", [0.3, 1.0, None])
@pytest.mark.parametrize("images, ghost", [(6, 2), (7, 3), (5, 1), (3, 3), (2, 5), (9, 4)])
def test_a_ghost_batch_is_batches_one_after_the_other(images, ghost, momentum):
    """Outputs, gradients and running statistics are those of torch's batch norm, called for each group in turn."""
    layer, plain = ghost_and_plain(ghost, momentum)
    for start in (0, 1):  # momentum None: the mean goes on over calls
        x = noise(images, 4, 3, 5, seed=6 + start).to(memory_format=torch.channels_last)
        upstream = noise(images, 4, 3, 5, seed=8)
        ours, theirs = (x.clone().requires_grad_() for _ in range(2))
        y, expected = layer(ours), torch.cat([plain(part) for part in theirs.split(ghost)])
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
        y.backward(upstream), expected.backward(upstream)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)
        assert y.is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)
    for (name, a), b in zip(layer.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)
    layer.eval(), plain.eval()
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-10, atol=1e-10)


def test_ghost_statistics_of_low_precision_are_those_of_float32():
    layer = GhostBatchNorm2d(3, 2)
    x = (noise(4, 3, 9, 9, seed=10) + 30).bfloat16()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), GhostBatchNorm2d(3, 2)(x.float()), rtol=1e-2, atol=1e-2)
    assert not torch.allclose(y[:2].float().mean((0, 2, 3)), y[:1].float().mean((0, 2, 3)), atol=1e-3)


def test_training_with_ghost_2_is_training_with_accumulated_batches_of_2(monkeypatch):
    """One epoch of steps of 8 images: in 4 passes, or in one."""
    common, found = ("model.norm=bn", "schedule.warmup_steps=0"), []
    for options in (("data.batch_size=2", "accumulate=4"), ("data.batch_size=8", "model.norm_options.ghost=2")):
        stage = double_stage(monkeypatch, tiny(*common, *options))
        stage.train_epoch(lambda: None)
        found.append(stage.model.state_dict())
    for (name, a), b in zip(found[0].items(), found[1].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("ghost", [-1, 0.5])
def test_a_ghost_batch_has_whole_images(ghost):
    with pytest.raises(BnnfreeError, match="ghost"):
        tiny("model.norm=bn", f"model.norm_options.ghost={ghost}")


# -- filter response


def frn(channels=4, learnable_eps=False, eps=1e-6):
    layer = FilterResponseNorm(channels, eps, learnable_eps).double()
    with torch.no_grad():
        layer.weight.copy_(noise(channels, seed=4))
        layer.bias.copy_(noise(channels, seed=5))
    return layer


@pytest.mark.parametrize("learnable_eps", [False, True])
@pytest.mark.parametrize("shape", [(3, 4, 5, 3), (2, 4, 1, 1), (3, 4), (2, 4, 7)])
def test_frn_gradients_are_those_of_finite_differences(shape, learnable_eps):
    layer = frn(eps=1e-2, learnable_eps=learnable_eps)
    if learnable_eps:
        with torch.no_grad():
            layer.eps_l.fill_(-0.05)  # below 0: the absolute value counts
    x = noise(*shape, seed=6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))


def test_frn_gradient_is_the_formula_and_orthogonal_to_the_input():
    layer, x = frn(), noise(3, 4, 7, 5, seed=7).requires_grad_()
    upstream = noise(3, 4, 7, 5, seed=8)
    (got,) = torch.autograd.grad(layer(x), x, upstream)
    scale = (x.square().mean((2, 3), keepdim=True) + 1e-6).rsqrt()
    g, hat = upstream * layer.weight.view(1, -1, 1, 1), x * scale
    torch.testing.assert_close(got, scale * (g - hat * (hat * g).mean((2, 3), keepdim=True)))
    along = (got * x).sum((2, 3)).abs() / (got.norm(dim=(2, 3)) * x.norm(dim=(2, 3)))
    assert along.max() < 1e-5


def test_frn_takes_no_mean_off_and_forgets_the_scale():
    layer, x = FilterResponseNorm(4).double(), noise(3, 4, 7, 5, seed=9) + 2
    y = layer(x)
    torch.testing.assert_close(y.square().mean((2, 3)), torch.ones(3, 4).double(), rtol=1e-5, atol=0)
    assert (y.mean((2, 3)) > 0.7).all()
    torch.testing.assert_close(layer(1e3 * x), y, rtol=1e-5, atol=0)


def test_frn_of_half_precision_has_statistics_of_float32():
    layer, x = FilterResponseNorm(3), torch.full((2, 3, 40, 40), 300.0).half()  # its square overflows in float16
    torch.testing.assert_close(layer(x), torch.ones(2, 3, 40, 40))
    x = noise(2, 3, 9, 9, seed=10).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.float32 and torch.equal(y, layer(x.float()))


def test_frn_of_a_map_of_zeros_is_beta_with_a_finite_gradient():
    layer, x = frn(), torch.zeros(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, layer.bias.view(1, -1, 1, 1).expand_as(y)) and x.grad.abs().max() < 1.01e3 * 3


def test_on_1x1_maps_a_learned_eps_lets_gradients_through():
    grads = []
    for layer in (FilterResponseNorm(6), make_norm("frn", 6, tlu=False)):
        x = noise(64, 6, 1, 1, seed=11, dtype=torch.float32).requires_grad_()
        layer(x).sum().backward()
        grads.append(x.grad.abs().median())
    assert grads[1] > 50 * grads[0] > 0
    layer = make_norm("frn", 6)[0]
    assert layer.effective_eps().item() == pytest.approx(1e-6 + 1e-4)
    layer.eps_l.data.fill_(-0.3)
    assert layer.effective_eps().item() == pytest.approx(0.300001)


def test_tlu_is_the_maximum_and_trains_its_threshold_by_what_relu_discards():
    layer, x = ThresholdedLinear(2, tau=-0.5).double(), noise(3, 2, 5, 4, seed=12).requires_grad_()
    y, upstream = layer(x), noise(3, 2, 5, 4, seed=13)
    y.backward(upstream)
    below = x < -0.5
    assert torch.equal(y, torch.where(below, -0.5, x)) and below.any() and not below.all()
    assert torch.equal(x.grad, torch.where(below, 0.0, upstream))
    torch.testing.assert_close(layer.tau.grad, (upstream * below).sum((0, 2, 3)))


@pytest.mark.parametrize("name", ["reactnet18", "birealnet18", "xnor_resnet18"])
def test_signs_after_frn_are_of_both_kinds_at_the_start(name):
    """The paper's threshold of 0 would make them all +1."""
    model, shares = make_model(name, "frn"), []
    for layer in model.modules():
        if isinstance(layer, Sign):
            layer.register_forward_hook(lambda _, args, out: shares.append((out > 0).float().mean().item()))
    model(noise(4, 3, 32, 32, seed=14, dtype=torch.float32))
    assert len(shares) == 16 and 0.2 < min(shares) and max(shares) < 0.9


# -- independent components


@pytest.mark.parametrize("norm", ["ic", "ic_gn", "ic_frn"])
@pytest.mark.parametrize("drop", [0.05, 0.4])
def test_correlation_of_a_convolutions_inputs_shrinks_by_the_keep_rate(norm, drop):
    design = Design(norm=norm, norm_options={"drop": drop})
    layer, sign, dropout, conv = design.make_unit(2, 4, 3, 1, last=True)
    assert isinstance(sign, RSign) and isinstance(conv, BinaryConv2d)
    torch.manual_seed(28)
    x = torch.randn(40, 1, 100, 100) + 0.8 * torch.randn(40, 2, 100, 100)
    signs = sign(layer.train()(x))

    def correlation(s):
        return torch.corrcoef(s.transpose(0, 1).flatten(1))[0, 1].item()

    kept, full = correlation(dropout.train()(signs)), correlation(signs)
    assert full > 0.3 and kept / full == pytest.approx(1 - drop, rel=0.02)
    assert dropout(signs).mean().item() == pytest.approx(signs.mean().item(), abs=0.01)
    assert torch.equal(dropout.eval()(signs), signs)


def test_without_drop_there_is_no_dropout_layer():
    for drop, count in [(0.0, 0), (0, 0), (0.1, 16)]:
        model = make_model("reactnet18", "ic", norm_options={"drop": drop})
        assert sum(isinstance(m, nn.Dropout) for m in model.modules()) == count


@pytest.mark.parametrize("name", ["reactnet18", "xnor_resnet18", "resnet20"])
def test_ic_stands_before_every_convolution_of_a_branch_and_before_the_pool(name):
    model = make_model(name, "ic")
    convs = sum(sum(hasattr(m, "latent") or "Conv" in type(m).__name__ for m in b.branch) for b in model.blocks)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == convs + 1 and model.tail in norms
    for block in model.blocks:
        kinds = [type(m).__name__ for m in block.branch]
        assert kinds[0] == "BatchNorm2d" and "Conv" in kinds[-1]
    assert len(model.stem) == (2 if name == "resnet20" else 1)


# -- batch renormalisation


def renorm_pair(channels=4, **options):
    """A BatchRenorm2d and a BatchNorm2d of the same parameters."""
    ours, theirs = BatchRenorm2d(channels, **options).double(), nn.BatchNorm2d(channels).double()
    with torch.no_grad():
        for i, (p, q) in enumerate(zip(ours.parameters(), theirs.parameters(), strict=True)):
            p.copy_(noise(channels, seed=30 + i))
            q.copy_(p)
    return ours.train(), theirs.train()


def gradients(layer, x, upstream):
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], upstream)]


def test_brn_with_r_1_and_d_0_is_bn():
    ours, theirs = renorm_pair()
    for seed in range(3):  # past the cold start
        x, upstream = noise(5, 4, 7, 3, seed=32 + seed) * 2 + 1, noise(5, 4, 7, 3, seed=40)
        for a, b in zip(gradients(ours, x, upstream), gradients(theirs, x, upstream), strict=True):
            assert torch.equal(a, b)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("progress", [0.1, 0.2, 1.0])
def test_brn_is_its_formula_with_r_and_d_constant_in_the_gradient(progress):
    ours, _ = renorm_pair(rmax=1.5, dmax=0.8)
    for seed in range(2):
        ours(noise(5, 4, 7, 3, seed=42 + seed))
    anneal(nn.Sequential(ours), progress)
    rmax, dmax = 1 + 0.5 * min((progress - 0.03) / 0.22, 1), 0.8 * min((progress - 0.03) / 0.12, 1)
    mean, sd = ours.running_mean.clone(), (ours.running_var + 1e-5).sqrt()
    x = noise(5, 4, 7, 3, seed=44) * torch.tensor([0.3, 1, 1, 4]).view(1, -1, 1, 1) + 0.5
    row = (1, -1, 1, 1)
    x1 = x.clone().requires_grad_()
    var_b, mean_b = torch.var_mean(x1, (0, 2, 3), correction=0)
    sd_b = (var_b + 1e-5).sqrt()
    r = (sd_b / sd).clamp(1 / rmax, rmax).detach()
    d = ((mean_b - mean) / sd).clamp(-dmax, dmax).detach()
    y = ((x1 - mean_b.view(row)) / sd_b.view(row) * r.view(row) + d.view(row)) * ours.weight.view(row)
    y = y + ours.bias.view(row)
    upstream = noise(5, 4, 7, 3, seed=45)
    wanted = [y, *torch.autograd.grad(y, [x1, *ours.parameters()], upstream)]
    for a, b in zip(gradients(ours, x, upstream), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # the limits are float32 buffers
    assert ((r == r.max()) | (r == r.min())).sum() >= 2  # some were clipped


def test_brn_unclipped_trains_on_the_output_of_inference():
    ours, _ = renorm_pair(rmax=1e6, dmax=1e6)
    ours(noise(5, 4, 7, 3, seed=46))
    anneal(ours, 1.0)
    x = noise(2, 4, 2, 3, seed=47) * 3 - 1
    inference = copy.deepcopy(ours).eval()(x)
    torch.testing.assert_close(ours(x), inference)


def test_brn_statistics_are_warm_from_the_first_batch_and_then_slow():
    ours, xs = BatchRenorm2d(3, momentum=0.25).double().train(), [noise(4, 3, 5, 5, seed=48 + i) + i for i in range(6)]
    anneal(ours, 1.0)
    means = []
    for i, x in enumerate(xs):
        ours(x)
        means.append(x.mean((0, 2, 3)))
        if i < 4:
            torch.testing.assert_close(ours.running_mean, sum(means) / len(means))
    plain = sum(means[:4]) / 4
    for mean in means[4:]:
        plain = plain + 0.25 * (mean - plain)
    torch.testing.assert_close(ours.running_mean, plain)


def test_brn_of_the_first_batch_is_bn_however_far_the_limits_are():
    ours, theirs = renorm_pair()
    anneal(ours, 1.0)
    x = noise(5, 4, 7, 3, seed=49) * 2 + 1
    assert torch.equal(ours(x), theirs(x)) and not torch.allclose(ours(x + 1), theirs(x + 1))


@pytest.mark.parametrize(
    "progress, rmax, dmax", [(0, 1, 0), (0.03, 1, 0), (0.09, 1 + 2 * 0.06 / 0.22, 2.5), (0.15, None, 5), (0.25, 3, 5)]
)
def test_brn_limits_open_at_the_shares_of_the_paper(progress, rmax, dmax):
    layer = BatchRenorm2d(2)
    anneal(nn.Sequential(nn.Sequential(layer)), progress)
    assert layer.dmax.item() == pytest.approx(dmax, abs=1e-6)
    assert rmax is None or layer.rmax.item() == pytest.approx(rmax)
    assert not {"rmax", "dmax"} & set(layer.state_dict())
