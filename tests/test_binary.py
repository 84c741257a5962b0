"""Standardisation, binary and real layers and the constants of data, against slow loops in numpy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import noise
from torch import nn

from bnnfree.errors import BnnfreeError, UnknownNameError
from bnnfree.nn import (
    SCALES,
    BinaryConv2d,
    BinaryLinear,
    CentredLinear,
    ScaledStdConv2d,
    calibrate,
    centred_layers,
    plan_step,
    set_part,
    standardize_weight,
    update_input_means,
)
from bnnfree.nn.centring import SHRINKAGE, weight_of_each

PADS = (0, 1, -1)
# kernel, stride, dilation, groups, pad_value; the padding grows with the kernel, unlike in rows and columns
GEOMETRIES = list(itertools.product((1, 2, 3, 5), (1, 2, 3), (1, 2), (1, 2), PADS))
FEW = [(3, 2, 1, 1, 0), (2, 1, 2, 2, 1), (1, 1, 1, 1, 0), (3, 3, 1, 2, -1), (5, 1, 1, 1, 1)]


def randomise(layer, seed):
    """Every parameter and constant off its initial value; scales and deviations positive."""
    layer.double()
    with torch.no_grad():
        for i, (name, value) in enumerate(layer.state_dict().items()):
            draw = noise(*value.shape, seed=seed + i)
            value.copy_(draw.abs() + 0.2 if name in ("scale", "output_std") else draw)
    return layer


def make_conv(kernel, stride, dilation, groups, pad_value, channels=(3, 5), cls=BinaryConv2d, **options):
    """A layer of `channels` inputs and outputs per group in a random state, and an input of signs."""
    cin, cout = (groups * c for c in channels)
    span = dilation * (kernel - 1)
    geometry = dict(stride=stride, dilation=dilation, groups=groups, pad_value=pad_value)
    layer = cls(cin, cout, kernel, padding=((span + 1) // 2, span), **geometry, **options)
    seed = 100 * kernel + 10 * stride + dilation + groups
    x = noise(2, cin, 9, 7, seed=seed)
    return randomise(layer, seed + 1), x if kernel == 1 else torch.where(x < 0, -1.0, 1.0).double()


def make_linear(**options):
    return randomise(BinaryLinear(7, 5, **options), 31), noise(3, 7, seed=32)


def standardized(w):
    """Row by row: mean 0 and biased deviation 1/sqrt(fan_in), eps 1e-5 beside the deviation."""
    out = np.empty_like(w)
    for o, row in enumerate(w):
        fan_in = row.size
        mean = row.sum() / fan_in
        std = math.sqrt(((row - mean) ** 2).sum() / fan_in)
        out[o] = (row - mean) / ((std + 1e-5) * math.sqrt(fan_in))
    return out


def effective_weight(layer):
    """The weight of the map before gain and deviation: scale * sign(What), or What of the scale's size."""
    latent = layer.weight.detach().numpy()
    latent = standardized(latent) if layer.standardize else latent
    rule = getattr(layer, "scale_rule", None)
    size = np.abs(latent).reshape(len(latent), -1).mean(1)
    scale = {
        "fan_in": np.full(len(latent), 1 / math.sqrt(latent[0].size)),
        "mean_abs": size,
        "learned": layer.scale.detach().numpy() if rule == "learned" else None,
        "none": np.ones(len(latent)),
    }.get(rule)
    column = (-1,) + (1,) * (latent.ndim - 1)
    if getattr(layer, "binary", False):
        return scale.reshape(column) * np.where(latent < 0, -1.0, 1.0)
    return latent * (scale / size).reshape(column) if rule == "learned" else latent


def convolve(layer, x, w):
    """One output value at a time."""
    (ph, pw), (sh, sw), (dh, dw) = layer.padding, layer.stride, layer.dilation
    padding = ((0, 0), (0, 0), (ph, ph), (pw, pw))
    x = np.pad(x, padding, constant_values=layer.pad_value)
    cout, per_group, kh, kw = w.shape
    height = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
    width = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    y = np.zeros((len(x), cout, height, width))
    for o, i, j in np.ndindex(cout, height, width):
        first = o // (cout // layer.groups) * per_group
        rows = slice(i * sh, i * sh + dh * (kh - 1) + 1, dh)
        columns = slice(j * sw, j * sw + dw * (kw - 1) + 1, dw)
        patch = x[:, first : first + per_group, rows, columns]
        y[:, o, i, j] = (patch * w[o]).sum(axis=(1, 2, 3))
    return y


def slow_forward(layer, x):
    """y_o = g_o (W_o * x - c_o) / sd_o + b_o, every option of the layer, in numpy."""
    w = effective_weight(layer)
    linear = (lambda x: x @ w.T) if w.ndim == 2 else (lambda x: convolve(layer, x, w))
    y = linear(x.numpy())
    view = (1, -1) + (1,) * (y.ndim - 2)
    if layer.centre == "input":  # the mean over positions of the map of a constant: taps on padding too
        constant = np.broadcast_to(layer.input_mean.numpy().reshape(view), (1, *x.shape[1:]))
        y = y - linear(constant).mean(axis=tuple(range(2, y.ndim)), keepdims=True)
    if layer.centre == "output":
        y = y - layer.output_mean.numpy().reshape(view)
    if layer.unit_output:
        y = y / layer.output_std.numpy().reshape(view)
    y = y if layer.gain is None else y * layer.gain.detach().numpy().reshape(view)
    return y if layer.bias is None else y + layer.bias.detach().numpy().reshape(view)


def same(got, expected, tolerance=1e-12):
    got, expected = (torch.as_tensor(v).detach() for v in (got, expected))
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(5, 3, 3, 2), (4, 7), (3, 1, 5, 5), (1, 3)])
def test_standardized_rows_have_mean_0_and_biased_deviation_1_over_sqrt_fan_in(shape):
    w = 1e3 * noise(*shape, seed=1) + 50
    rows = standardize_weight(w).flatten(1)
    same(rows.mean(1), np.zeros(len(rows)))
    same(rows.std(1, correction=0) * math.sqrt(rows.shape[1]), np.ones(len(rows)), 1e-7)
    same(standardize_weight(w), standardized(w.numpy()))


@pytest.mark.parametrize("shape", [(5, 3, 3, 2), (4, 7)])
def test_standardization_ignores_shift_and_scale_of_a_row(shape):
    w = 1e3 * noise(*shape, seed=2)
    per_row = (-1,) + (1,) * (len(shape) - 1)
    scale, shift = 1 + noise(shape[0], seed=3).abs(), 1e3 * noise(shape[0], seed=4)
    moved = scale.view(per_row) * w + shift.view(per_row)
    torch.testing.assert_close(standardize_weight(moved), standardize_weight(w), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(5, 3, 3, 2), (4, 7)])
def test_gradient_of_the_standardization_passes_gradcheck(shape):
    assert torch.autograd.gradcheck(standardize_weight, noise(*shape, seed=5).requires_grad_())


@pytest.mark.parametrize("kernel, stride, dilation, groups, pad_value", GEOMETRIES)
def test_centred_binary_convolution_equals_a_loop_in_every_geometry(kernel, stride, dilation, groups, pad_value):
    channels = {1: (5, 3), 2: (3, 5), 3: (3, 1), 5: (1, 3)}[kernel]
    geometry = (kernel, stride, dilation, groups, pad_value)
    layer, x = make_conv(*geometry, channels=channels, centre="input", bias=True)
    same(layer(x), slow_forward(layer, x))


OPTIONS = [
    *(dict(scale=s, gain=g, bias=b) for s in SCALES for g in (True, False) for b in (True, False)),
    *(dict(scale=s, standardize=False) for s in SCALES),
    *(dict(scale=s, binary=False, centre="input") for s in SCALES),
    *(dict(centre=c, unit_output=u, bias=True) for c in (None, "input", "output") for u in (True, False)),
    *(dict(centre=c, unit_output=True, gain=False) for c in (None, "input", "output")),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_of_binary_layers_equals_the_formula(options):
    layer, x = make_conv(3, 2, 1, 1, 1, **options)
    same(layer(x), slow_forward(layer, x))
    layer, x = make_linear(**options)
    same(layer(x), slow_forward(layer, x))


@pytest.mark.parametrize("geometry", FEW)
@pytest.mark.parametrize("centre", [None, "input", "output"])
@pytest.mark.parametrize("standardize", [True, False])
def test_real_convolution_equals_the_formula(geometry, centre, standardize):
    options = dict(cls=ScaledStdConv2d, centre=centre, unit_output=True, standardize=standardize)
    layer, x = make_conv(*geometry, **options)
    same(layer(x), slow_forward(layer, x))


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("scale", SCALES)
def test_each_filter_holds_exactly_two_values_of_opposite_sign(scale, standardize):
    layer = BinaryConv2d(3, 5, 3, scale=scale, standardize=standardize)
    taps = layer(torch.eye(27).view(27, 3, 3, 3)).flatten(1)
    for column in taps.T.tolist():
        low, high = sorted(set(column))
        assert low == -high


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("centre, unit", [(None, False), ("input", True), ("output", True)])
def test_real_and_binary_layers_hold_the_same_keys_and_shapes(scale, centre, unit):
    options = dict(scale=scale, centre=centre, unit_output=unit, bias=True)
    for cls, shape in ((BinaryConv2d, (3, 5, 3)), (BinaryLinear, (7, 5))):
        real, binary = (cls(*shape, binary=b, **options).state_dict() for b in (False, True))
        assert {k: v.shape for k, v in real.items()} == {k: v.shape for k, v in binary.items()}


def autograd_forward(layer, x):
    """The layer from torch primitives: scale sign(What) + (What - What.detach()), a constant map's mean."""
    w = layer.weight
    if layer.standardize:
        rows = w.flatten(1)
        centred = rows - rows.mean(1, keepdim=True)
        std = centred.square().mean(1, keepdim=True).sqrt()
        w = (centred / ((std + 1e-5) * rows.shape[1] ** 0.5)).view_as(w)
    column = (-1,) + (1,) * (w.dim() - 1)
    scale = {
        "fan_in": w[0].numel() ** -0.5,
        "mean_abs": w.detach().abs().flatten(1).mean(1).view(column),
        "learned": layer.scale.view(column) if layer.scale is not None else None,
        "none": 1.0,
    }[layer.scale_rule]
    if layer.binary:
        w = scale * torch.where(w < 0, -1.0, 1.0).double() + (w - w.detach())

    def linear(x):
        if w.dim() == 2:
            return x @ w.T
        (ph, pw), value = layer.padding, float(layer.pad_value)
        x = F.pad(x, (pw, pw, ph, ph), value=value)
        return F.conv2d(x, w, None, layer.stride, 0, layer.dilation, layer.groups)

    y = linear(x)
    view = (1, -1) + (1,) * (y.dim() - 2)
    if layer.centre == "input":
        c = linear(layer.input_mean.view(view).expand(1, *x.shape[1:]))
        y = y - (c.mean((2, 3), keepdim=True) if y.dim() == 4 else c)
    y = y / layer.output_std.view(view) if layer.unit_output else y
    y = y * layer.gain.view(view) if layer.gain is not None else y
    return y + layer.bias.view(view) if layer.bias is not None else y


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("centre", [None, "input"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("geometry", [*FEW, "linear"])
def test_gradients_are_those_of_the_identity_estimator(geometry, scale, centre, standardize):
    options = dict(scale=scale, centre=centre, standardize=standardize, bias=True, unit_output=True)
    linear = geometry == "linear"
    layer, x = make_linear(**options) if linear else make_conv(*geometry, **options)
    inputs = [x.requires_grad_(), *layer.parameters()]
    assert len(inputs) == (5 if scale == "learned" else 4)
    y = layer(x)
    upstream = noise(*y.shape, seed=43)
    got = torch.autograd.grad(y, inputs, upstream)
    expected = torch.autograd.grad(autograd_forward(layer, x), inputs, upstream)
    for g, e in zip(got, expected, strict=True):
        same(g, e, 1e-10)
        assert g.abs().max() > 0


@pytest.mark.parametrize("geometry", [(3, 2, 1, 1, 0), (1, 1, 1, 2, 0)])
def test_centring_makes_the_weight_gradient_one_of_centred_inputs(geometry):
    # without padding: dL/dW_b = sum over samples and positions of g (s - mu)
    layer, x = make_conv(*geometry, centre="input", standardize=False, scale="none", gain=False)
    layer.padding = (0, 0)
    upstream = noise(*layer(x).shape, seed=44)
    layer(x).backward(upstream)
    centred = x - layer.input_mean.view(1, -1, 1, 1)
    sums = torch.nn.grad.conv2d_weight(
        centred, layer.weight.shape, upstream, layer.stride, 0, layer.dilation, layer.groups
    )
    same(layer.weight.grad, sums, 1e-10)
    assert not layer.input_mean.requires_grad


CENTRED = {
    "convolution": (lambda **kw: BinaryConv2d(4, 3, 3, padding=1, **kw), (5, 4, 5, 7)),
    "strided": (lambda **kw: BinaryConv2d(4, 6, 1, stride=2, **kw), (4, 4, 5, 3)),
    "linear": (lambda **kw: BinaryLinear(4, 3, **kw), (6, 4)),
    "real linear": (lambda centre, **kw: CentredLinear(4, 3, **kw), (6, 4)),
}


def input_gradient(layer, x, upstream):
    x = x.clone().requires_grad_()
    layer(x).backward(upstream)
    return x.grad


def centred_pair(kind):
    """The same layer with and without centre_gradient, inputs, and a gradient of its outputs."""
    make, shape = CENTRED[kind]
    layers = []
    for centred in (True, False):
        torch.manual_seed(3)
        layers.append(make(centre="input", centre_gradient=centred).double().train())
    x = noise(*shape, seed=45).sign()
    return *layers, x, noise(*layers[0](x).shape, seed=46)


@pytest.mark.parametrize("kind", CENTRED)
def test_a_centred_gradient_loses_the_mean_of_the_other_samples(kind):
    layer, bare, x, upstream = centred_pair(kind)
    got, whole = (input_gradient(each, x, upstream) for each in (layer, bare))
    own = whole.flatten(2).mean(2) if whole.dim() > 2 else whole
    for n in range(len(x)):
        others = sum(own[m] for m in range(len(x)) if m != n) / (len(x) - 1)
        others = others * (len(x) - 1) ** 2 / ((len(x) - 1) ** 2 + SHRINKAGE**2)
        same(got[n], whole[n] - others.view(-1, *[1] * (x.dim() - 2)))
    for (name, a), (_, b) in zip(layer.named_parameters(), bare.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad) and a.grad.abs().max() > 0, name


def test_the_mean_of_seven_others_counts_nearly_whole_and_one_other_little():
    """recipes/NOTES.md, section 15: with 43 % of it steps of 8 images fall behind batch norm, with 80 % those of 2."""
    assert 7 * weight_of_each(7) > 0.9 and weight_of_each(1) < 0.25


@pytest.mark.parametrize("kind", CENTRED)
def test_what_centring_takes_is_the_same_on_average_for_any_batch_size(kind):
    """Over all batches of two of these samples, but for the shrinkage; a sample alone keeps its gradient."""
    layer, bare, x, upstream = centred_pair(kind)
    pairs = [list(pair) for pair in itertools.combinations(range(len(x)), 2)]
    whole = input_gradient(bare, x, upstream)
    found = torch.zeros_like(x)
    for pair in pairs:
        found[pair] += input_gradient(layer, x[pair], upstream[pair]) / (len(x) - 1)
    all_at_once, n = input_gradient(layer, x, upstream), len(x)
    share = [m**2 / (m**2 + SHRINKAGE**2) for m in (1, n - 1)]
    same((found - whole) / share[0], (all_at_once - whole) / share[1])
    assert torch.equal(input_gradient(layer, x[:1], upstream[:1]), whole[:1])


@pytest.mark.parametrize("kind", CENTRED)
@pytest.mark.parametrize("size", [0, 2])
@pytest.mark.parametrize("sizes", [(1, 2, 3), (2, 4), (3, 3)])
def test_a_step_divided_into_passes_takes_what_one_pass_does(kind, sizes, size):
    """Parameters before the layer have the same gradient, and inputs are counted once, of groups of 2 or of all."""
    layer, _, x, upstream = centred_pair(kind)
    x, upstream = x.repeat(2, *[1] * (x.dim() - 1))[:6], upstream.repeat(2, *[1] * (upstream.dim() - 1))[:6]
    upstream = upstream * noise(6, seed=48).view(-1, *[1] * (upstream.dim() - 1))
    scale = noise(*x.shape, seed=47)  # the inputs' response to the shift differs from place to place
    centres = [layer.gradient_centre]
    centres[0].size = size

    def shift_gradient(sizes):
        shift = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True)
        layer.input_sum.zero_(), layer.input_count.zero_()

        def run(rows, grad):
            layer(x[rows] + scale[rows] * shift.view(-1, *[1] * (x.dim() - 2))).backward(grad)

        parts, again = plan_step(sizes, size, sizes, x)
        for i, part in enumerate(parts):
            set_part(centres, part, first=i == 0)
            run(rows := list(range(sum(sizes[:i]), sum(sizes[: i + 1]))), upstream[rows])
        for pairs, part in again:
            set_part(centres, part)
            run(rows := [sum(sizes[:i]) + n for i, n in pairs], torch.zeros_like(upstream[rows]))
        set_part(centres, None)
        assert layer.input_count == len(x)
        return shift.grad

    whole = shift_gradient((6,))
    same(shift_gradient(sizes), whole, 1e-10)
    assert whole.abs().max() > 0


def test_a_centred_gradient_is_that_of_batch_centring_but_for_the_own_share():
    """Of a 1x1 convolution, whose positions are alike: autograd through y less its batch mean."""
    torch.manual_seed(3)
    layer = BinaryConv2d(4, 3, 1, centre="input", centre_gradient=True, gain=False).double().train()
    x = noise(5, 4, 3, 4, seed=45).requires_grad_()
    upstream = noise(5, 3, 3, 4, seed=46)
    weight, factor, _ = layer.fold(x)
    y = layer.linear(x, weight * factor.view(-1, 1, 1, 1), None)
    (whole,) = torch.autograd.grad(y, x, upstream, retain_graph=True)
    (batch,) = torch.autograd.grad(y - y.mean((0, 2, 3), keepdim=True), x, upstream)
    own = whole.mean((2, 3), keepdim=True)
    got = input_gradient(layer, x.detach(), upstream)
    taken = (own.sum(0, keepdim=True) - own) * 4 / (4**2 + SHRINKAGE**2)
    same(got + taken, batch + own.mean(0, keepdim=True), 1e-10)


def test_a_centred_linear_layer_is_torchs_on_centred_inputs():
    """The same start, output, and gradients; what it folds to is one weight and one bias."""
    torch.manual_seed(5)
    ours = CentredLinear(7, 3).double()
    torch.manual_seed(5)
    theirs = nn.Linear(7, 3).double()
    same(ours.weight, theirs.weight), same(ours.bias, theirs.bias)
    x = noise(9, 7, seed=6) + 3
    calibrate(nn.Sequential(ours), x)
    same(ours.input_mean, x.mean(0))
    other, upstream = noise(5, 7, seed=7) + 2, noise(5, 3, seed=8)
    y, expected = ours(other), theirs(other - x.mean(0))
    same(y, expected)
    y.backward(upstream), expected.backward(upstream)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        same(a.grad, b.grad)
    weight, factor, bias = ours.fold(other)
    assert factor is None
    same(other @ weight.T + bias, expected)
    update_input_means(nn.Sequential(ours), window=5.0)
    same(ours.input_mean, x.mean(0) + (1 - math.exp(-1)) * (other.mean(0) - x.mean(0)))


def test_negative_learned_scale_still_points_downhill():
    layer = BinaryLinear(3, 1, scale="learned", standardize=False, gain=False).double()
    with torch.no_grad():
        layer.scale.fill_(-0.5)
        layer.weight.copy_(torch.tensor([[0.1, -0.2, 0.3]]))
    layer(torch.tensor([[1.0, 2.0, -3.0]]).double()).sum().backward()
    # raising w_1 flips nothing or makes its sign +1, which lowers y by 0.5 x_1: the slope has the sign of -x
    same(layer.weight.grad, np.array([[-1.0, -2.0, 3.0]]))


@pytest.mark.parametrize("groups", [1, 2])
def test_calibrated_1x1_convolution_has_output_mean_0_on_the_calibration_images(groups):
    x = noise(5, 6, 7, 3, seed=51).abs() + 1
    layer = BinaryConv2d(6, 10, 1, groups=groups, centre="input", unit_output=True).double()
    calibrate(layer, x)
    same(layer.input_mean, x.mean((0, 2, 3)))
    std, mean = torch.std_mean(layer(x), (0, 2, 3), correction=0)
    same(mean, np.zeros(10))
    same(std, np.ones(10))


@pytest.mark.parametrize("cls", [BinaryConv2d, ScaledStdConv2d])
@pytest.mark.parametrize("geometry", FEW)
def test_calibrated_output_has_mean_0_and_deviation_1_per_channel(cls, geometry):
    layer, x = make_conv(*geometry, cls=cls, centre="output", unit_output=True)
    with torch.no_grad():
        layer.gain.fill_(1.0)
    calibrate(layer, x)
    y = layer(x).detach().transpose(0, 1).flatten(1)
    same(y.mean(1), np.zeros(len(y)))
    same(y.std(1, correction=0), np.ones(len(y)))


def test_a_constant_channel_keeps_deviation_1():
    layer = BinaryConv2d(3, 5, 3, centre="output", unit_output=True)
    images = torch.ones(2, 3, 7, 5)
    calibrate(layer, images)
    assert torch.equal(layer.output_std, torch.ones(5)) and layer(images).abs().max() < 1e-5


@pytest.mark.parametrize("window", [3.0, 256.0])
@pytest.mark.parametrize("sizes", [(5,), (2, 3), (1, 1, 3)])
def test_input_means_follow_the_samples_of_a_step_however_they_are_split(sizes, window):
    model = nn.Sequential(BinaryConv2d(3, 5, 3, padding=1, centre="input")).double().train()
    [(_, layer)] = centred_layers(model)
    layer.input_mean.copy_(noise(3, seed=61))
    before, x = layer.input_mean.clone(), noise(5, 3, 7, 4, seed=62)
    for part in x.split(sizes):
        model(part)
        same(layer.input_mean, before)  # within a step it stays
    update_input_means(model, window)
    share = 1 - math.exp(-5 / window)
    same(layer.input_mean, before + share * (x.mean((0, 2, 3)) - before))
    update_input_means(model, window)  # nothing was seen since
    same(layer.input_mean, before + share * (x.mean((0, 2, 3)) - before))


def test_two_processes_with_half_the_samples_do_what_one_does():
    def network():
        torch.manual_seed(63)
        conv, linear = BinaryConv2d(3, 5, 3, centre="input"), BinaryLinear(75, 2, centre="input")
        return nn.Sequential(conv, nn.Flatten(), linear).double()

    x = noise(5, 3, 7, 5, seed=64)
    whole, first, second = network(), network(), network()
    _ = whole(x), first(x[:2]), second(x[2:])
    packed = []
    update_input_means(second, 7.0, reduce=lambda t: packed.append(t.clone()))
    update_input_means(first, 7.0, reduce=lambda t: t.add_(packed[0]))
    update_input_means(whole, 7.0)
    assert len(packed) == 1
    for i in (0, 2):
        same(first[i].input_mean, whole[i].input_mean)
        assert not torch.allclose(second[i].input_mean, whole[i].input_mean)


def test_means_stay_without_an_update_and_eval_collects_nothing():
    layer = BinaryConv2d(3, 5, 3, centre="input").double()
    x = noise(2, 3, 7, 5, seed=65)
    calibrate(layer, x)
    calibrated = layer.input_mean.clone()
    layer(5 * x)
    assert torch.equal(layer.input_mean, calibrated)
    calibrate(layer, x)  # forgets what was collected before it
    layer.eval()(5 * x)
    layer.train()(x)
    update_input_means(layer, 1e-3)
    same(layer.input_mean, calibrated)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("binary_input", [True, False])
def test_autocast_keeps_products_of_signs_exact_and_real_inputs_in_float32(low, binary_input):
    layer = BinaryConv2d(17, 6, 3, padding=1, centre="input", bias=True, binary_input=binary_input)
    x = noise(2, 17, 7, 5, seed=66).float()
    x = torch.where(x < 0, -1.0, 1.0) if binary_input else x
    calibrate(layer, x)
    with torch.autocast("cpu", low):
        got = layer(x)
    torch.testing.assert_close(got, layer(x), rtol=1e-5, atol=1e-5)


def test_layers_run_in_bfloat16_throughout():
    layer = BinaryConv2d(3, 5, 3, centre="input", unit_output=True).bfloat16()
    y = layer(noise(2, 3, 7, 5, seed=67).bfloat16())
    assert y.dtype == torch.bfloat16 and torch.isfinite(y).all()


@pytest.mark.parametrize(
    "error, match, options",
    [
        (UnknownNameError, "Did you mean 'mean_abs'", dict(scale="meanabs")),
        (UnknownNameError, "Did you mean 'input'", dict(centre="inputs")),
        (BnnfreeError, "groups: got 2 for 3 input", dict(groups=2)),
        (BnnfreeError, "pad_value: got 2, expected 0, 1 or -1", dict(pad_value=2)),
        (BnnfreeError, "stride: got 0", dict(stride=0)),
        (BnnfreeError, "padding: got", dict(padding=(1, 2, 3))),
        (BnnfreeError, "latent_std: got -1", dict(latent_std=-1.0)),
    ],
)
def test_wrong_options_say_what_is_allowed(error, match, options):
    with pytest.raises(error, match=match):
        BinaryConv2d(3, 4, 3, **options)
