"""The plain formulation is the same function as the layers, and its step the released one."""

import pytest
import torch
import torch.nn.functional as F
from helpers import NARROW, noise
from torch import nn

from bnnfree.analysis.memory import saved_per_image
from bnnfree.analysis.plain import PlainConv, PlainSign, clip_gradients, move_input_means, plain, two_group_adam
from bnnfree.errors import BnnfreeError
from bnnfree.models import MODELS
from bnnfree.nn import BinaryConv2d, RSign, ScaledStdConv2d, Sign, calibrate, update_input_means
from bnnfree.nn.standard import WeightLayer
from bnnfree.optim import adaptive_grad_clip

LABELS = torch.tensor([0, 1, 2, 1, 0])


def network(name, norm, **options):
    """A calibrated narrow network in float64 whose vectors are no constants; no latent beyond +-1."""
    torch.manual_seed(0)
    model = MODELS[name](3, norm=norm, width=NARROW.get(name, 0.125), **{"stem": "cifar", **options}).double()
    calibrate(model, noise(16, 3, 13, 13, seed=1))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter.clamp_(-0.99, 0.99)  # at 1 the two estimators of `none` part
            elif parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.train()


def gradients(model, images, labels=LABELS):
    """(loss, gradient of each parameter by name)."""
    loss = F.cross_entropy(model(images), labels)
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return loss.detach(), {name: g for (name, _), g in zip(model.named_parameters(), found, strict=True)}


def assert_same_function(model, images, labels=LABELS):
    ours, theirs = gradients(model, images, labels), gradients(plain(model), images, labels)
    assert abs(ours[0] - theirs[0]) <= 1e-10 * ours[0]
    assert ours[1].keys() == theirs[1].keys()
    for name, mine in ours[1].items():
        other = theirs[1][name]
        assert (mine is None) == (other is None), name
        if mine is not None:
            assert (mine - other).abs().max() <= 1e-10 * mine.abs().max(), name


@pytest.mark.parametrize("norm, centre_gradient", [("free", None), ("free", False), ("bn", None)])
def test_so_is_a_network_with_a_centred_classifier(norm, centre_gradient):
    model = network("reactnet20", norm, centre_head=True, centre_gradient=centre_gradient)
    images = noise(5, 3, 13, 13)
    assert_same_function(model, images)
    other = plain(model)
    move_input_means(other), update_input_means(model)
    model(images), other(images)
    move_input_means(other), update_input_means(model)
    torch.testing.assert_close(other.head.input_mean, model.head.input_mean, rtol=1e-10, atol=1e-12)
    assert_same_function(model, images)


NAMES = ("reactnet20", "reactnet18", "birealnet18", "xnor_resnet18", "reactnet_a")


@pytest.mark.parametrize("norm", ["free_paper", "free", "none", "bn"])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_every_gradient_are_the_layers(name, norm):
    assert_same_function(network(name, norm), noise(5, 3, 13, 13))


@pytest.mark.parametrize(
    "options",
    [{"binarize": "none"}, {"binarize": "activations"}, {"binarize": "weights"}, {"scale": "learned"},
     {"scale": "learned", "binarize": "activations"}, {"scale": "none"}, {"scale": "fan_in", "centre": True},
     {"pad_value": -1}, {"pad_value": 1, "centre": True}, {"ste_window": "sample"}, {"beta": "measured", "alpha": 0.7},
     {"stem": "imagenet"}, {"shortcut": "real"}],
    ids=str,
)  # fmt: skip
def test_so_they_are_for_every_option_of_a_network(options):
    assert_same_function(network("reactnet20", "free_paper", **options), noise(5, 3, 13, 13))


def test_a_real_network_is_the_same_too():
    assert_same_function(network("resnet20", "free"), noise(5, 3, 13, 13))


def test_the_state_has_the_same_keys_and_values_and_is_another():
    model = network("reactnet20", "free")
    copied = plain(model)
    own, state = model.state_dict(), copied.state_dict()
    assert own.keys() == state.keys() and all(torch.equal(own[key], state[key]) for key in own)
    model.load_state_dict(state)
    with torch.no_grad():
        next(copied.parameters()).zero_()
    assert next(model.parameters()).abs().sum() > 0, "a copy, so that both can be trained"


def test_a_step_moves_the_input_means_alike():
    model = network("reactnet20", "free")
    copied, images = plain(model), noise(5, 3, 13, 13)
    for net, move in ((model, update_input_means), (copied, move_input_means)):
        net(images)
        move(net, 100.0)
    moved = [name for name in model.state_dict() if name.endswith("input_mean")]
    assert len(moved) == 20 + 1  # the convolutions and the classifier
    for name in moved:
        assert torch.allclose(model.state_dict()[name], copied.state_dict()[name], rtol=1e-12, atol=1e-14), name


def test_a_binary_weight_beyond_one_gets_no_gradient_where_ours_gets_one():
    layer = BinaryConv2d(2, 3, 3, standardize=False, gain=False, scale="mean_abs").double()
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = 1.5
    x = noise(2, 2, 5, 5)
    (ours,) = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    released = PlainConv(layer)
    (theirs,) = torch.autograd.grad(released(x).square().sum(), released.weight)
    inside = layer.weight.detach().abs() < 1
    assert not inside.all() and torch.allclose(ours[inside], theirs[inside], rtol=1e-12)
    assert theirs[~inside].abs().max() == 0 < ours[~inside].abs().min()


def test_groups_and_dilation_are_the_layers():
    layer = BinaryConv2d(4, 6, 3, groups=2, dilation=2, stride=2, padding=2, centre="input", pad_value=1).double()
    layer.input_mean.copy_(noise(4, seed=3) / 3)
    x = noise(2, 4, 9, 7)
    assert torch.allclose(PlainConv(layer)(x), layer(x), rtol=1e-12, atol=1e-12)


def test_signs_are_one_at_zero_and_exactly_one_elsewhere():
    x = torch.tensor([[-0.0, 0.0, 1e-30, -1e-30, 0.3, -0.7, 1.0, -1.0, 250.0]])
    got = PlainSign(Sign())(x)
    assert got.tolist() == [[1, 1, 1, -1, 1, -1, 1, -1, 1]]


def test_a_block_keeps_eight_times_what_one_map_takes():
    """Four masks, t, -t, the signs, what PReLU reads: 32 bytes a value of a block, as the released code's."""
    model = MODELS["reactnet20"](3, norm="free_paper", width=1.0, stem="cifar")
    shape = (3, 16, 16)
    maps = 6 * 4 * (16 * 16 * 16 + 8 * 8 * 32 + 4 * 4 * 64)
    each, _ = saved_per_image(plain(model), shape, 3)
    assert 8 * maps <= each <= 9 * maps
    ours, _ = saved_per_image(model, shape, 3)
    assert ours < 0.6 * each


@pytest.mark.parametrize(
    ("model", "named"),
    [(lambda: network("reactnet20", "gn"), "GroupNorm at stem.1"),
     (lambda: nn.Sequential(nn.Dropout(0.1)), "Dropout at 0"),
     (lambda: RSign(3, ste="ede"), "ste 'ede'")],
)  # fmt: skip
def test_what_has_no_plain_formulation_is_one_line(model, named):
    with pytest.raises(BnnfreeError, match=named) as caught:
        plain(model())
    assert len(str(caught.value).splitlines()) == 1


def test_released_clipping_is_ours_where_gradients_are_not_tiny():
    torch.manual_seed(0)
    shapes = ((5, 3, 3, 3), (4, 7), (6,), (5, 1, 1, 1))
    ours = [torch.randn(shape).requires_grad_() for shape in shapes]
    theirs = [weight.detach().clone().requires_grad_() for weight in ours]
    for mine, other in zip(ours, theirs, strict=True):
        mine.grad = torch.randn_like(mine) * torch.rand(mine.shape[0]).view(-1, *[1] * (mine.dim() - 1)) * 0.1
        other.grad = mine.grad.clone()
    before = [weight.grad.clone() for weight in ours]
    adaptive_grad_clip(ours, 0.02)
    clip_gradients([*theirs, torch.zeros(3)], 0.02)
    assert not torch.equal(before[0], ours[0].grad), "some units are clipped"
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine.grad, other.grad, rtol=1e-6)


def test_adam_decays_what_the_released_code_decays():
    net = nn.Sequential()
    net.add_module("conv", ScaledStdConv2d(2, 3, 3, bias=True))
    net.add_module("head", nn.Linear(3, 2))
    others, decays = two_group_adam(net, 0.1, 0.5).param_groups
    assert [g["weight_decay"] for g in (others, decays)] == [0, 0.5]
    assert len(decays["params"]) == 3 and len(others["params"]) == 2, "the gain and bias of a conv decay too"
    assert isinstance(net.conv, WeightLayer) and decays["params"][0] is net.conv.weight
