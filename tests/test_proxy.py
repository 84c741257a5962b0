"""Proxy normalisation: closed forms against samples and the 256-point rule, and what it keeps from happening."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import noise
from torch import nn

from bnnfree.nn import (
    NORMS,
    Clip,
    ProxyNorm,
    RPReLU,
    RSign,
    Sign,
    ThresholdedLinear,
    gaussian_moments,
    make_norm,
)
from bnnfree.nn.norms.gaussian import MOMENTS
from bnnfree.nn.react import PowerRPReLU


def activations(channels=3):
    """Every activation with a closed form, and others; parameters off their start."""
    torch.manual_seed(15)
    found = [None, nn.Identity(), nn.ReLU(), nn.PReLU(), nn.PReLU(channels), RPReLU(channels)]
    found += [RPReLU(channels, input_shift=False), ThresholdedLinear(channels), Sign(), RSign(channels)]
    found.append(PowerRPReLU(channels))
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
    # a rounded exponent has no differences; tests/test_block.py has its gradient
    named = [] if act is None else [p for name, p in act.named_parameters() if name != "exponent"]
    inputs = [M.clone().requires_grad_(), S.clone().requires_grad_(), *named]
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
