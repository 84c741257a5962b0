"""Signs, their estimators, RSign, RPReLU and Clip; the formulas are written out here again, in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import noise
from torch import nn

from bnnfree.errors import UnknownNameError
from bnnfree.nn import STE_WINDOWS, STES, Clip, RPReLU, RSign, Sign, anneal, sign, sign_of_weight


def logistic(u):
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-u))


def sech_squared(u):
    with np.errstate(over="ignore"):
        return 1 / np.cosh(u) ** 2


# name -> slope(t, parameter), in another algebraic form than the code's wherever there is one
SLOPES = {
    "clip": lambda t, w: np.where(np.abs(t) <= w, 1.0, 0.0),
    "approx": lambda t, w: np.where(np.abs(t) < w, 2 / w - 2 * np.abs(t) / w**2, 0.0),
    # d/dt of 2 s(kt) (1 + kt (1 - s(kt))) - 1, s the logistic function
    "swish": lambda t, k: (
        2 * k * logistic(k * t) * logistic(-k * t) * (2 + k * t * (logistic(-k * t) - logistic(k * t)))
    ),
    "sigmoid": lambda t, k: k / 2 * sech_squared(k * t / 2),
    "ede": lambda t, k: max(k, 1.0) * sech_squared(k * t),
    "identity": lambda t, _: np.ones_like(t),
}
PARAMETERS = (0.1, 0.5, 1.0, 1.25, 3.0, 5.0, 10.0)
CASES = [(name, p) for name in SLOPES for p in PARAMETERS]


def grid(parameter):
    """Zero of both signs, +-1, both sides of +-the window's edge, and large values."""
    edges = [parameter * f for f in (1 - 1e-9, 1.0, 1 + 1e-9, 0.5)]
    half = [0.0, 0.01, 0.25, 0.5, 1.0, 1.5, 3.0, 300.0, 1e4, *edges]
    return torch.tensor([*half, *(-v for v in half)], dtype=torch.float64)


def gradient(module, x, upstream):
    """dL/dx for L = sum(upstream * module(x))."""
    x = x.clone().requires_grad_()
    module(x).backward(upstream)
    return x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_sign_is_plus_one_at_both_zeros_and_never_zero(dtype):
    x = torch.tensor([0.0, -0.0, 1e-7, -1e-7, 3.5, -3.5, math.inf, -math.inf], dtype=dtype)
    expected = torch.tensor([1, 1, 1, -1, 1, -1, 1, -1], dtype=dtype)
    for function in (sign, Sign(), Sign(window="sample"), RSign(1)):
        y = function(x.view(4, 1, 2) if function is not sign else x).flatten()
        assert y.dtype == dtype or isinstance(function, RSign)
        assert torch.equal(y.to(dtype), expected)


@pytest.mark.parametrize("window", STE_WINDOWS)
@pytest.mark.parametrize("ste", STES)
def test_forward_is_the_same_sign_for_every_estimator(ste, window):
    x = noise(3, 5, 7, seed=1)
    x[0, 0, :2] = torch.tensor([0.0, -0.0])
    y = Sign(ste, window)(x)
    assert torch.equal(y, torch.where(x < 0, -1.0, 1.0).double())


def test_every_estimator_has_a_formula_here():
    assert set(SLOPES) == set(STES)


@pytest.mark.parametrize("ste, parameter", CASES)
def test_backward_is_upstream_times_the_stated_slope(ste, parameter):
    t = grid(parameter)
    upstream = noise(t.numel(), seed=2)
    # clip and approx are tested at their very edge: the parameter is a float32 buffer
    module = Sign(ste, parameter=parameter).double()
    module.parameter.fill_(parameter)
    got = gradient(module, t, upstream)
    expected = upstream.numpy() * SLOPES[ste](t.numpy(), parameter)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ste, parameter", [c for c in CASES if c[0] != "identity"])
def test_integral_of_a_slope_is_the_step_of_the_sign(ste, parameter):
    expected = {"clip": 2 * parameter, "ede": 2 / min(parameter, 1.0)}.get(ste, 2.0)
    reach = 2 * parameter if ste in ("clip", "approx") else 40 / parameter
    t = torch.linspace(-reach, reach, 20_001, dtype=torch.float64)
    module = Sign(ste, parameter=parameter).double()
    area = torch.trapezoid(gradient(module, t, torch.ones_like(t)), t).item()
    step = (t[1] - t[0]).item()  # clip jumps at its two edges: the rule is off by up to a step there
    assert area == pytest.approx(expected, rel=3e-3, abs=step if ste == "clip" else 0.0)


@pytest.mark.parametrize("window", STE_WINDOWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ste", STES)
def test_gradients_of_large_values_are_finite(ste, dtype, window):
    x = torch.tensor([[300.0, -300.0, 0.5], [1e4, -6e4, 0.0], [300.0, 300.0, 299.0]], dtype=dtype)
    got = gradient(Sign(ste, window), x, torch.ones_like(x))
    assert got.dtype == dtype
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("parameter", [0.7, 3.0])
@pytest.mark.parametrize("ste", STES)
def test_sample_window_divides_by_the_deviation_of_the_sample_alone(ste, parameter):
    x = noise(3, 5, 7, 3, seed=3) * torch.tensor([1e-2, 1.0, 50.0], dtype=torch.float64).view(3, 1, 1, 1)
    x = x + torch.tensor([0.0, 0.4, -9.0], dtype=torch.float64).view(3, 1, 1, 1)
    upstream = noise(3, 5, 7, 3, seed=4)
    module = Sign(ste, "sample", parameter).double()
    module.parameter.fill_(parameter)
    got = gradient(module, x, upstream).numpy()
    for n, sample in enumerate(x.numpy()):
        k = 1 / math.sqrt(((sample - sample.mean()) ** 2).mean())
        expected = upstream[n].numpy() * k * SLOPES[ste](k * sample, parameter)
        np.testing.assert_allclose(got[n], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ste", STES)
def test_sample_window_sees_no_other_sample(ste):
    x, upstream = noise(2, 5, 7, 3, seed=5), noise(2, 5, 7, 3, seed=6)
    module = Sign(ste, "sample")
    before = gradient(module, x, upstream)[0]
    other = torch.cat([x[:1], 1000 * noise(3, 5, 7, 3, seed=7)])
    after = gradient(module, other, upstream[[0, 1, 1, 1]])[0]
    assert torch.equal(before, after)


@pytest.mark.parametrize("ste", STES)
@pytest.mark.parametrize("factor", [1e-3, 0.5, 77.0])
def test_sample_window_gradient_goes_as_one_over_the_scale(ste, factor):
    x, upstream = noise(2, 5, 7, 3, seed=8), noise(2, 5, 7, 3, seed=9)
    module = Sign(ste, "sample")
    torch.testing.assert_close(
        gradient(module, factor * x, upstream), gradient(module, x, upstream) / factor, rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, 0.25, -40.0])
@pytest.mark.parametrize("ste", STES)
def test_constant_sample_has_the_fixed_window(ste, value, dtype):
    x = torch.full((2, 3, 5), value, dtype=dtype)
    got = gradient(Sign(ste, "sample"), x, torch.ones_like(x))
    fixed = gradient(Sign(ste, "fixed"), x.double(), torch.ones_like(x, dtype=torch.float64))
    torch.testing.assert_close(got.double(), fixed, rtol=2e-2, atol=1e-2 if dtype.itemsize < 4 else 1e-6)


@pytest.mark.parametrize("progress, expected", [(0.0, 0.1), (0.5, 1.0), (1.0, 10.0)])
def test_anneal_moves_ede_log_linearly_and_leaves_the_others_alone(progress, expected):
    model = nn.Sequential(*(nn.Sequential(Sign(ste), RSign(3, ste)) for ste in STES))
    before = {m: m.parameter.item() for m in model.modules() if isinstance(m, Sign)}
    assert len(before) == 2 * len(STES)
    anneal(model, progress)
    for module, was in before.items():
        now = module.parameter.item()
        assert now == (pytest.approx(expected) if module.ste == "ede" else was)


def test_annealed_ede_is_used_by_the_next_backward():
    module, t = Sign("ede"), torch.tensor([[0.0, 0.3]])
    for progress, k in [(0.0, 0.1), (0.5, 1.0), (1.0, 10.0)]:
        module.anneal(progress)
        got = gradient(module, t, torch.ones_like(t)).numpy()
        np.testing.assert_allclose(got, SLOPES["ede"](t.double().numpy(), k), rtol=1e-5)


@pytest.mark.parametrize(
    "make, hint",
    [
        (lambda: Sign("aprox"), "approx"),
        (lambda: Sign("ed"), "ede"),
        (lambda: Sign(window="samples"), "sample"),
        (lambda: RSign(3, "swich"), "swish"),
    ],
)
def test_unknown_names_get_the_nearest_known_one(make, hint):
    with pytest.raises(UnknownNameError, match=f"Did you mean '{hint}'"):
        make()


@pytest.mark.parametrize("scale", [0.2, 1.0, 7.0])
def test_sign_of_weight_passes_the_gradient_of_the_product(scale):
    w, upstream = noise(5, 3, seed=10).requires_grad_(), noise(5, 3, seed=11)
    product = scale * sign_of_weight(w, torch.tensor(scale, dtype=torch.float64))
    assert torch.equal(product, scale * torch.where(w < 0, -1.0, 1.0).double())
    product.backward(upstream)
    torch.testing.assert_close(w.grad, upstream, rtol=1e-14, atol=0)


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 7, 3)])
@pytest.mark.parametrize("window", STE_WINDOWS)
def test_rsign_is_the_sign_of_the_shifted_input(window, shape):
    x, upstream, shift = noise(*shape, seed=12), noise(*shape, seed=13), noise(5, seed=14)
    module = RSign(5, "approx", window).double()
    assert torch.equal(module.bias, torch.zeros(5, dtype=torch.float64))
    with torch.no_grad():
        module.bias.copy_(shift)
    t = x.numpy() + shift.numpy().reshape(1, 5, *[1] * (len(shape) - 2))
    x = x.requires_grad_()
    y = module(x)
    np.testing.assert_array_equal(y.detach().numpy(), np.where(t < 0, -1.0, 1.0))
    y.backward(upstream)
    others = tuple(range(1, len(shape)))
    k = 1 / t.std(axis=others, keepdims=True) if window == "sample" else np.ones_like(t)
    expected = upstream.numpy() * k * SLOPES["approx"](k * t, 1.0)
    np.testing.assert_allclose(x.grad.numpy(), expected, rtol=1e-9, atol=1e-12)
    sums = expected.sum(axis=tuple(d for d in range(len(shape)) if d != 1))
    np.testing.assert_allclose(module.bias.grad.numpy(), sums, rtol=1e-9)


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 7, 3)])
@pytest.mark.parametrize("input_shift", [True, False])
def test_rprelu_is_a_shifted_prelu_with_its_exact_gradient(input_shift, shape):
    module = RPReLU(5, input_shift).double()
    assert torch.equal(module.slope, torch.full((5,), 0.25, dtype=torch.float64))
    assert all(torch.equal(p, torch.zeros_like(p)) for n, p in module.named_parameters() if "shift" in n)
    assert len(list(module.parameters())) == (3 if input_shift else 2)
    names = ["input_shift", "slope", "output_shift"][0 if input_shift else 1 :]
    values = [noise(5, seed=15 + i) for i in range(len(names))]
    with torch.no_grad():
        for name, value in zip(names, values, strict=True):
            getattr(module, name).copy_(value)
    x = noise(*shape, seed=19)
    view = (1, 5) + (1,) * (len(shape) - 2)
    b1 = values[0].numpy().reshape(view) if input_shift else 0.0
    slope, b2 = (v.numpy().reshape(view) for v in values[-2:])
    t = x.numpy() + b1
    np.testing.assert_allclose(module(x).detach().numpy(), np.where(t > 0, t, slope * t) + b2, rtol=1e-12)

    def function(x, *params):
        return torch.func.functional_call(module, dict(zip(names, params, strict=True)), x)

    inputs = [v.clone().requires_grad_() for v in (x, *values)]
    assert torch.autograd.gradcheck(function, inputs)


def test_rprelu_keeps_float32_under_autocast():
    module, x = RPReLU(3), noise(2, 3, 5, seed=20, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(x)
    assert got.dtype == torch.float32 and torch.equal(got, torch.where(x > 0, x, 0.25 * x))


@pytest.mark.parametrize("channels", [None, 5])
def test_clip_is_the_clamp_whose_derivative_the_clip_estimator_is(channels):
    module = Clip(channels).double()
    x, upstream = 2 * noise(3, 5, 7, 3, seed=21), noise(3, 5, 7, 3, seed=22)
    shift = noise(5, seed=23).view(1, 5, 1, 1) if channels else torch.zeros(1, 5, 1, 1)
    if channels:
        with torch.no_grad():
            module.bias.copy_(shift.flatten())
    t = (x + shift).numpy()
    np.testing.assert_allclose(module(x).detach().numpy(), np.minimum(np.maximum(t, -1), 1), rtol=1e-14)
    expected = upstream.numpy() * SLOPES["clip"](t, 1.0)
    np.testing.assert_allclose(gradient(module, x, upstream).numpy(), expected)
    if channels:
        np.testing.assert_allclose(module.bias.grad.numpy(), expected.sum(axis=(0, 2, 3)), rtol=1e-12)
