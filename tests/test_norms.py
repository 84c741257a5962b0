"""Normalisers: their formulas, gradients, and what no sample may know of another.

The layers here are tested alone; their places in a block are in test_block.py, what models share in test_models.py.
Compiling for real takes minutes: python -m pytest -m slow tests/test_norms.py
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnnfree.errors import BnnfreeError, UnknownNameError
from bnnfree.nn import (
    NORMS,
    BatchRenorm2d,
    Belief,
    BinaryBlock,
    BinaryConv2d,
    Clip,
    Design,
    FilterResponseNorm,
    KalmanNorm2d,
    ProxyNorm,
    RPReLU,
    RSign,
    Sign,
    ThresholdedLinear,
    anneal,
    calibrate,
    check_norm,
    first_belief,
    gaussian_moments,
    make_norm,
)
from bnnfree.nn.norms.gaussian import MOMENTS
from bnnfree.nn.norms.group import default_groups
from bnnfree.nn.norms.kalman import mixture
from models import MODELS

BATCH_FREE = ("none", "free", "free_paper", "gn", "ln", "in", "frn", "ic_gn", "ic_frn", "ln_pn", "gn_pn", "in_pn")
BATCH = ("bn", "brn", "ic", "kn")
NARROW = {"reactnet20": 0.5, "resnet20": 0.5}


def noise(*shape, seed, dtype=torch.float64):
    print(f"seed {seed}")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_layer(name, channels=6, **options):
    """The layer with its parameters off their start; proxied ones hold an activation."""
    activation = RPReLU(channels) if NORMS[name].proxy else None
    layer = make_norm(name, channels, activation, **options).double()
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.add_(0.3 * noise(*p.shape, seed=50 + i))
    return layer


def make_model(name, norm, seed=0, **options):
    torch.manual_seed(seed)
    return MODELS[name](3, norm=norm, width=NARROW.get(name, 0.125), stem="cifar", **options)


def test_every_normaliser_is_known_as_batch_free_or_not():
    assert sorted(BATCH_FREE + BATCH) == sorted(NORMS)


# -- batch independence: exact, because each sample's statistics are reduced by themselves, in one and the same order


@pytest.mark.parametrize("size", [(7, 5), (1, 3), (1, 1)])
@pytest.mark.parametrize("name", BATCH_FREE)
def test_a_batch_free_layer_gives_a_sample_alone_what_it_gives_it_in_any_batch(name, size):
    layer, x = make_layer(name), noise(5, 6, *size, seed=1)
    together, order = layer.train()(x), torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(layer.eval()(x), together)
    assert torch.equal(layer(x[order]), together[order])
    for i in range(len(x)):
        if name in ("in", "in_pn") and size == (1, 1):
            continue  # torch refuses one value per channel; in a batch it gives beta
        assert torch.equal(layer(x[i : i + 1])[0], together[i])


@pytest.mark.parametrize("name", ["bn", "brn", "kn", "ic"])
def test_a_batch_layer_does_not(name):
    layer, x = make_layer(name).train(), noise(5, 6, 7, 5, seed=1)
    assert not torch.allclose(layer(x)[:2], layer(x[:2]), atol=1e-3)
    assert not torch.allclose(layer.eval()(x), layer.train()(x), atol=1e-3)


@pytest.mark.parametrize("norm", BATCH_FREE)
@pytest.mark.parametrize("name", ["reactnet20", "xnor_resnet18", "resnet20"])
def test_a_batch_free_network_has_no_batch_effect(name, norm):
    """To float64's tolerance: a convolution may sum in another order for another batch size."""
    options = {"norm_options": {"drop": 0.0}} if NORMS[norm].before else {}
    model, x = make_model(name, norm, **options).double(), noise(3, 3, 16, 16, seed=2)
    calibrate(model, x)
    trained = model.train()(x)
    for got, wanted in [
        (model(x[1:2]), trained[1:2]),
        (model(x[[2, 0, 1]]), trained[[2, 0, 1]]),
        (model.eval()(x), trained),
    ]:
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


# -- every model with every normaliser


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_trains_a_step_and_is_deterministic_after(name, norm):
    model, images = make_model(name, norm), noise(3, 3, 16, 16, seed=3, dtype=torch.float32)
    calibrate(model, images)
    loss = F.cross_entropy(model.train()(images), torch.tensor([0, 2, 1]))
    loss.backward()
    for key, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), key
    copied = copy.deepcopy(model).eval()  # no tensor of the forward pass may have stayed on a layer
    first = model.eval()(images)
    assert torch.isfinite(first).all() and torch.equal(model(images), first) and torch.equal(copied(images), first)


@pytest.mark.parametrize("norm", ["bn", "brn", "ic", "kn"])
def test_what_folds_is_batch_normalisation_to_the_keys(norm):
    keys = [k for k in make_model("reactnet18", norm).state_dict() if k.startswith("blocks.3.branch")]
    if norm == "ic":
        keys = [k.replace("branch.0", "branch.2") for k in keys if "branch.0" in k]
    assert {"running_mean", "running_var", "weight", "bias"} <= {k.split(".")[-1] for k in keys if "branch.2" in k}
    if norm != "ic":
        make_model("reactnet18", "bn").load_state_dict(make_model("reactnet18", norm).state_dict())


# -- options


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("gn", dict(grups=4), "norm_options of 'gn': got 'grups', expected one of groups, eps. Did you mean 'groups'?"),
        ("gn", dict(groups=5), "norm_options of 'gn': groups: got 5 for 12 channels"),
        ("gn", dict(groups=0), "norm_options of 'gn': groups: got 0 for 12 channels"),
        ("gn", dict(groups=2.0), r"norm_options of 'gn': groups: got 2.0 \(float\), expected int or null"),
        ("gn_pn", dict(activation=None), "got 'activation', expected one of groups, eps, proxy_eps"),
        ("ln", dict(groups=1), "got 'groups', expected one of eps"),
        ("in", dict(eps=0), "eps: got 0, expected a number from 1e-12 on"),
        ("frn", dict(tlu=1), r"tlu: got 1 \(int\), expected bool"),
        ("ic", dict(drop=1), "drop: got 1, expected a number from 0 to 0.99"),
        ("ic_gn", dict(drop=-0.1), "drop: got -0.1"),
        ("kn", dict(prior=1.5), "prior: got 1.5, expected a number from 0 to 1"),
        ("kn", dict(prior=float("nan")), "prior: got nan"),
        ("brn", dict(rmax=0.5), "rmax: got 0.5, expected a number from 1 on"),
        ("bn", dict(momentum=2), "momentum: got 2"),
        ("free", dict(eps=1e-5), "got option 'eps', expected none: this norm has no options"),
    ],
)
def test_an_option_that_is_unknown_or_out_of_range_is_named(name, options, message):
    with pytest.raises(BnnfreeError, match=message):
        make_norm(name, 12, **options)
    if options != dict(groups=5):  # some width is a multiple of 5: the layer knows, the design does not yet
        with pytest.raises(BnnfreeError, match=message.replace("12 channels", "16 channels")):
            Design(norm=name, norm_options=options)


def test_options_reach_every_layer_of_a_model():
    model = make_model("reactnet18", "gn", norm_options={"groups": 4, "eps": 1e-3})
    layers = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert len(layers) == 16 + 3 + 1 and {(m.num_groups, m.eps) for m in layers} == {(4, 1e-3)}
    with pytest.raises(BnnfreeError, match="groups: got 3 for 8 channels"):
        make_model("reactnet18", "gn", norm_options={"groups": 3})


def test_an_activation_is_refused_where_no_proxy_takes_it():
    with pytest.raises(BnnfreeError, match="got an activation for 'gn'"):
        make_norm("gn", 8, nn.ReLU())
    with pytest.raises(UnknownNameError, match="Did you mean 'gn_pn'"):
        check_norm("gnpn", {})


@pytest.mark.parametrize("channels, groups", [(8, 1), (16, 1), (24, 1), (32, 2), (40, 2), (64, 4), (152, 8), (7, 1)])
def test_default_groups_have_16_channels_or_a_few_more_and_divide(channels, groups):
    assert default_groups(channels) == groups == make_norm("gn", channels).num_groups
    assert make_norm("ln", channels).num_groups == 1 and make_norm("in", channels).num_groups == channels


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
    with torch.autocast("cpu", torch.bfloat16):
        x = noise(2, 3, 9, 9, seed=10, dtype=torch.float32)
        assert torch.equal(layer(x), layer(x.clone())) and layer(x).dtype == torch.float32


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


# -- proxy


def activations(channels=3):
    """Every activation with a closed form, and others; parameters off their start."""
    torch.manual_seed(15)
    found = [None, nn.Identity(), nn.ReLU(), nn.PReLU(), nn.PReLU(channels), RPReLU(channels)]
    found += [RPReLU(channels, input_shift=False), ThresholdedLinear(channels), Sign(), RSign(channels)]
    for act in found[3:]:
        with torch.no_grad():
            for p in act.parameters():
                p.add_(0.3 * torch.randn_like(p))
    return [act if act is None else act.double() for act in found]


def test_every_closed_form_is_tested():
    assert {type(act) for act in activations()} == set(MOMENTS)


M, S = torch.tensor([0.0, -1.1, 0.7]).double(), torch.tensor([1.0, 0.6, 1.7]).double()


@pytest.mark.parametrize("act", activations(), ids=repr)
def test_closed_forms_are_the_moments_of_a_million_samples(act):
    z = noise(1_000_000, 3, seed=16) * S + M
    z = z if act is None else act(z)
    mean, var = gaussian_moments(act, M, S)
    torch.testing.assert_close(mean, z.mean(0), rtol=0, atol=6e-3)
    torch.testing.assert_close(var, z.var(0), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("act", activations(), ids=repr)
def test_the_256_points_agree_with_the_closed_form(act):
    class Unknown(nn.Module):
        def forward(self, x):
            return x if act is None else act(x)

    closed, points = gaussian_moments(act, M, S), gaussian_moments(Unknown(), M, S)
    torch.testing.assert_close(points[0], closed[0], rtol=0, atol=1e-2)
    torch.testing.assert_close(points[1], closed[1], rtol=1e-2, atol=1e-2)


def test_the_256_points_take_activations_of_maps_per_channel():
    act = Clip(3).double()
    act.bias.data.copy_(torch.tensor([0.0, 5.0, -0.4]))
    z = act((noise(1_000_000, 3, seed=17) * S + M)[..., None, None])[..., 0, 0]
    mean, var = gaussian_moments(act, M, S)
    torch.testing.assert_close(mean, z.mean(0), rtol=0, atol=1e-2)
    torch.testing.assert_close(var, z.var(0), rtol=2e-2, atol=1e-2)
    one = torch.ones(1).double()
    assert gaussian_moments(nn.Tanhshrink(), 0 * one, one)[1] > 0
    unit = gaussian_moments(nn.Hardtanh(-1e9, 1e9), 0 * one, one)[1].item()
    assert unit == pytest.approx(0.995, abs=1e-3)  # the tails that 256 points cut


@pytest.mark.parametrize("act", activations(), ids=repr)
def test_gradients_of_the_moments_are_those_of_finite_differences(act):
    inputs = [M.clone().requires_grad_(), S.clone().requires_grad_(), *(act.parameters() if act is not None else ())]
    assert torch.autograd.gradcheck(lambda m, s, *_: gaussian_moments(act, m, s), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_moments_keep_their_digits_far_from_0(dtype):
    m, s = torch.tensor([-1e4, -40.0, 40.0, 1e4], dtype=dtype), torch.ones(4, dtype=dtype)
    mean, var = gaussian_moments(nn.ReLU(), m, s)
    torch.testing.assert_close(mean, m.clamp_min(0))
    torch.testing.assert_close(var, torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=dtype))
    mean, var = gaussian_moments(Sign(), m, s)
    assert torch.equal(mean, m.sign()) and torch.equal(var, torch.zeros(4, dtype=dtype))


def test_the_published_constants_of_relu_and_prelu():
    zero, one = torch.zeros(1).double(), torch.ones(1).double()
    mean, var = (v.item() for v in gaussian_moments(nn.ReLU(), zero, one))
    assert (round(mean, 4), round(var, 4)) == (0.3989, 0.3408)
    mean, var = (v.item() for v in gaussian_moments(nn.PReLU().double(), zero, one))
    assert (round(mean, 3), round(var, 3)) == (0.299, 0.442)


def test_proxy_norm_is_its_formula():
    layer, y = ProxyNorm(3, nn.ReLU()).double(), noise(4, 3, 5, 7, seed=18)
    with torch.no_grad():
        for i, p in enumerate((layer.weight, layer.bias, layer.proxy_shift, layer.proxy_gain)):
            p.add_(0.4 * noise(3, seed=19 + i))
    row = (1, -1, 1, 1)
    gamma, beta, bt, gt = (p.view(row) for p in (layer.weight, layer.bias, layer.proxy_shift, layer.proxy_gain))
    proxy = bt + (1 + gt) * noise(1_000_000, 1, 1, 1, seed=23)
    z = (gamma * proxy + beta).clamp_min(0)
    expected = ((gamma * y + beta).clamp_min(0) - z.mean(0, keepdim=True)) / (z.var(0, keepdim=True) + 0.03).sqrt()
    torch.testing.assert_close(layer(y), expected, rtol=1e-2, atol=1e-2)


def test_proxy_norm_gives_a_gaussian_unit_channels_and_no_gain_divides_by_zero():
    layer = ProxyNorm(2, nn.PReLU(2)).double()
    y = noise(1, 2, 500, 400, seed=24)
    z, (_, var) = layer(y), layer.moments()
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(2).double(), rtol=0, atol=1e-2)
    torch.testing.assert_close(z.var((0, 2, 3)), var / (var + 0.03), rtol=1e-2, atol=0)
    with torch.no_grad():
        layer.weight.zero_()
    layer(y).square().sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in layer.parameters())


def test_in_proxy_norm_of_the_identity_beta_cancels():
    layer, y = ProxyNorm(3).double(), noise(2, 3, 5, 4, seed=25)
    before = layer(y)
    layer.bias.data.add_(noise(3, seed=26))
    torch.testing.assert_close(layer(y), before)


def channel_power(y):
    """P1: the share of the power that lies in the channels' means."""
    return (y.mean((0, 2, 3)).square().mean() / y.square().mean()).item()


def test_layer_norm_lets_channel_means_take_over_with_depth_and_proxy_norm_does_not():
    """24 random convolutions and ReLUs, plain normal weights: P1 of each normaliser's output."""
    powers = {}
    for name in ("bn", "ln", "ln_pn", "gn_pn"):
        generator = torch.Generator().manual_seed(27)
        x, powers[name] = torch.randn(8, 32, 12, 12, generator=generator), []
        for _ in range(24):
            w = torch.randn(32, 32, 3, 3, generator=generator) / math.sqrt(32 * 9)
            x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), w)
            if NORMS[name].proxy:
                layer = make_norm(name, 32, nn.ReLU())
                powers[name].append(channel_power(layer[0](x)))
                x = layer(x)
            else:
                x = make_norm(name, 32).train()(x)
                powers[name].append(channel_power(x))
                x = x.relu()
    ln = powers["ln"]
    assert ln[0] < 0.01 and ln[4] > 0.3 and ln[-1] > 0.8, ln
    assert max(powers["bn"]) < 1e-6
    assert max(powers["ln_pn"] + powers["gn_pn"]) < 0.05, powers


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


# -- Kalman


def test_kalman_without_a_prior_is_bn_to_the_bit():
    x, labels = noise(4, 3, 16, 16, seed=60, dtype=torch.float32), torch.tensor([0, 1, 2, 0])
    runs = []
    for norm, options in (("bn", {}), ("kn", {"prior": 0.0})):
        model = make_model("reactnet20", norm, norm_options=options).train()
        F.cross_entropy(model(x), labels).backward()
        runs.append([*(p.grad for p in model.parameters()), *model.state_dict().values(), model.eval()(x)])
    assert len(runs[0]) == len(runs[1]) and all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_mixture_has_the_moments_of_samples_from_both():
    a, b = noise(1000, 4, seed=61) * 2 + 1, noise(1000, 4, seed=62) - 2
    both = torch.cat([a, a, a, b])
    moments = [v for s in (a, b) for v in (s.mean(0), s.var(0, correction=0))]
    mean, var = mixture(0.75, *moments)
    torch.testing.assert_close(mean, both.mean(0))
    torch.testing.assert_close(var, both.var(0, correction=0))


def kalman(prior, channels=4):
    layer = KalmanNorm2d(channels, prior=prior, momentum=1.0).double().train()
    with torch.no_grad():
        layer.weight.copy_(noise(channels, seed=63))
        layer.bias.copy_(noise(channels, seed=64))
    return layer


def test_kalman_normalises_by_the_fused_moments_and_keeps_them():
    layer, x = kalman(0.7), noise(3, 4, 5, 7, seed=65) * 2 + 1
    prior = noise(4, seed=66), noise(4, seed=67).abs() + 0.5
    batch = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    mean, var = mixture(0.7, *prior, *batch)
    y = layer.correct(x, *prior)
    row = (1, -1, 1, 1)
    expected = (x - mean.view(row)) / (var + 1e-5).sqrt().view(row) * layer.weight.view(row) + layer.bias.view(row)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, var + 0.3 * batch[1] / (3 * 5 * 7 - 1))  # the batch's part unbiased
    assert layer.num_batches_tracked == 1
    torch.testing.assert_close(layer.output_moments()[1], layer.weight.square())


def test_gradients_flow_through_batch_and_prior():
    layer = kalman(0.7)
    layer.momentum = 0.0
    inputs = [noise(3, 4, 2, 3, seed=68), noise(4, seed=69), noise(4, seed=70).abs() + 0.5]
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda x, m, v, *_: layer.correct(x, m, v), (*inputs, *layer.parameters()))


@pytest.mark.parametrize("factor", [0.0, 1e-4, 1e4])
def test_a_prior_of_degenerate_variance_is_not_fused(factor):
    layer, x = kalman(0.9), noise(3, 4, 5, 7, seed=71) * 2 + 1
    prior = torch.full((4,), 50.0).double(), x.var((0, 2, 3)) * factor
    got = layer.correct(x, *prior)
    torch.testing.assert_close(got, layer(x))
    assert torch.isfinite(got).all()


def test_the_share_of_the_prior_falls_with_the_samples_unless_it_is_given():
    shares = [round(KalmanNorm2d(2).share(n), 2) for n in (1, 2, 16, 128)]
    assert shares == [0.94, 0.89, 0.5, 0.11]
    assert KalmanNorm2d(2, prior=0.3).share(2) == KalmanNorm2d(2, prior=0.3).share(128) == 0.3


def test_a_belief_of_a_map_has_the_moments_of_its_samples():
    belief = Belief(M, S.square(), RPReLU(3).double())
    torch.manual_seed(72)
    sample = belief.sample(torch.empty(2, 3, 700, 900))
    assert sample.shape == (1, 3, 700, 900)
    for got, wanted in zip(belief.moments(), (sample.mean((0, 2, 3)), sample.var((0, 2, 3))), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["same", "pooled", "transition", "duplicate"])
def test_a_residual_sum_adds_the_moments_of_branch_and_shortcut(kind):
    cout, options = {"same": (6, {}), "pooled": (6, {"stride": 2}), "transition": (10, {"stride": 2})}.get(
        kind, (12, {"duplicate": True})
    )
    block = BinaryBlock(6, cout, Design(norm="kn", alpha=0.3), beta=0.7, **options).train()
    with torch.no_grad():
        for i, p in enumerate(block.parameters()):
            p.add_(0.3 * noise(*p.shape, seed=80 + i, dtype=torch.float32))
    before = Belief(noise(6, seed=79).float(), torch.full((6,), 2.0), nn.ReLU())
    y, after = block(noise(3, 6, 8, 8, seed=78, dtype=torch.float32), before)
    assert y.shape[1] == cout and after.activation is block.act
    norm, side = block.branch[-1], before.moments()
    if kind == "transition":
        side = block.shortcut[1].bias, block.shortcut[1].weight.square()
    elif kind == "pooled":
        side = 0.7 * side[0], 0.49 * side[1]
    elif kind == "duplicate":
        side = [torch.cat([v, v]) for v in side]
    torch.testing.assert_close(after.mean, 0.3 * norm.bias + side[0])
    torch.testing.assert_close(after.var, 0.09 * norm.weight.square() + side[1])


@pytest.mark.parametrize("name, activation", [("reactnet20", None), ("resnet20", nn.ReLU)])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_the_first_belief_is_the_stems(name, activation, stem):
    model = MODELS[name](3, norm="kn", width=0.5, stem=stem)
    mean, var, act = first_belief(model.stem)
    assert mean is model.stem[1].bias and torch.equal(var, model.stem[1].weight.square())
    assert act is None if activation is None else type(act) is activation


def priors(monkeypatch, name, batch=48, shuffled=False):
    """(error of the predicted mean in deviations, ratio of variances) of each layer, in a new network."""
    model, seen, fused = make_model(name, "kn").train(), [], KalmanNorm2d._fused

    def spy(layer, x, prior, share):
        var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        expected = prior.mean.roll(1) if shuffled else prior.mean
        error = ((expected - mean) / var.sqrt()).square().mean().sqrt().item()
        seen.append((error, (prior.var / var).mean().item()))
        return fused(layer, x, prior, share)

    monkeypatch.setattr(KalmanNorm2d, "_fused", spy)
    x = F.interpolate(noise(batch, 3, 8, 8, seed=73, dtype=torch.float32), size=24, mode="bilinear")
    torch.manual_seed(74)
    model(x / x.std())
    return torch.tensor(seen)


@pytest.mark.parametrize("name", ["reactnet20", "xnor_resnet18", "resnet20", "reactnet_a"])
def test_every_layer_but_the_stems_has_a_prior_and_it_predicts(monkeypatch, name):
    found = priors(monkeypatch, name)
    norms = sum(isinstance(m, KalmanNorm2d) for m in make_model(name, "kn").modules())
    assert len(found) == norms - 1 and (found[:, 0] < 1).all()
    if "react" in name:  # RPReLU gives the trunk means to predict
        assert found[:, 0].mean() < 0.6 * priors(monkeypatch, name, shuffled=True)[:, 0].mean()
    assert (found[:, 1] > 0.15).all() and (found[:, 1] < 4).all()


def test_the_prior_trains_what_it_is_made_of():
    """Gradients of a layer's own input cut: what is left came through the prior."""
    model, x = make_model("reactnet20", "kn", norm_options={"prior": 0.9}).train(), torch.randn(2, 3, 9, 9)
    first, second = model.blocks[0], model.blocks[1]
    belief = first_belief(model.stem)
    with torch.no_grad():
        x = model.stem(x)
    out, belief = first(x.detach(), belief)
    y, _ = second(out.detach(), belief)
    y.sum().backward()
    assert model.stem[1].weight.grad is not None and model.stem[1].weight.grad.abs().max() > 0
    assert first.branch[2].bias.grad.abs().max() > 0 and first.act.slope.grad.abs().max() > 0
    assert first.branch[1].weight.grad is None  # its convolution made a prior for its own layer alone


@pytest.mark.parametrize("name", ["reactnet18", "reactnet_a", "xnor_resnet18", "resnet20"])
def test_kalman_leaves_inference_and_hooks_to_the_real_maps(name):
    model, x = make_model(name, "kn").train(), noise(3, 3, 16, 16, seed=75, dtype=torch.float32)
    calls = []
    for module in model.blocks.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda m, args, out: calls.append((m, args[0].shape[0])))
    model(x)
    normal = [m for m, n in calls if n == 3 and not isinstance(m, KalmanNorm2d)]
    assert len(normal) == len(set(normal)) and all(n == 3 for _, n in calls)
    twin = make_model(name, "bn").eval()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), model.eval()(x))


def test_only_models_that_believe_take_the_other_path():
    believing = [norm for norm in NORMS if make_model("reactnet20", norm).believes]
    assert believing == ["kn"]
    assert not make_model("reactnet20", "kn", norm_options={"prior": 0}).believes
    assert first_belief(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))) is None
    block, x = BinaryBlock(6, 6, Design(norm="kn")).train(), noise(3, 6, 5, 5, seed=76, dtype=torch.float32)
    assert isinstance(block(x), torch.Tensor)  # outside a trunk: batch normalisation


def test_kalman_repeats_with_the_seed_and_not_without():
    x, outputs = noise(4, 3, 16, 16, seed=77, dtype=torch.float32), []
    for seed in (0, 0, 1):
        model = make_model("reactnet20", "kn", norm_options={"prior": 0.9}).train()
        torch.manual_seed(seed)
        outputs.append(model(x))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_a_compiled_network_of_any_normaliser_is_the_eager_one(norm):
    """Of reactnet20 stem, two blocks and head. With a prior only that it trains: a compiler draws other noise."""
    torch._dynamo.reset()
    options = {"drop": 0.0} if NORMS[norm].before else {}
    model, x = make_model("reactnet20", norm, norm_options=options), noise(3, 3, 9, 9, seed=78)
    model.blocks = model.blocks[:2]
    model.tail, model.head = Design(norm=norm, norm_options=options).make_tail(8), nn.Linear(8, 3)
    calibrate(model.double(), x)
    eager = copy.deepcopy(model).train()(x)
    logits = torch.compile(model.train())(x)
    logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    if norm != "kn":
        torch.testing.assert_close(logits, eager, rtol=1e-7, atol=1e-7)
    copy.deepcopy(model).eval()(x)
