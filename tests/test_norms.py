"""Normalisers: their formulas, gradients, and what no sample may know of another.

Each kind: test_norm_layers.py, test_proxy.py, test_kalman.py. Their places in a block: test_block.py.
Compiling for real takes minutes: python -m pytest -m slow tests/test_norms.py
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import BATCH, BATCH_FREE, make_model, noise, without_drop
from torch import nn

from bnnfree.errors import BnnfreeError, UnknownNameError
from bnnfree.nn import (
    NORMS,
    Design,
    RPReLU,
    calibrate,
    make_norm,
)
from bnnfree.nn.norms.group import default_groups

KINDS = ("reactnet20", "xnor_resnet18", "resnet20")  # a block each: RPReLU, two binary convolutions, real


def make_layer(name, channels=6, **options):
    """The layer with its parameters off their start; proxied ones hold an activation."""
    activation = RPReLU(channels) if NORMS[name].proxy else None
    layer = make_norm(name, channels, activation, **options).double()
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.add_(0.3 * noise(*p.shape, seed=50 + i))
    return layer


# -- batch independence: exact, because each sample's statistics are reduced by themselves, in one and the same order


@pytest.mark.parametrize("size", [(7, 5), (1, 3), (1, 1)])
@pytest.mark.parametrize("name", BATCH_FREE)
def test_a_batch_free_layer_gives_a_sample_alone_what_it_gives_it_in_any_batch(name, size):
    layer, x = make_layer(name), noise(5, 6, *size, seed=1)
    together, order = layer.train()(x), torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(layer.eval()(x), together)
    assert torch.equal(layer(x[order]), together[order])
    for i in range(len(x)):
        assert torch.equal(layer(x[i : i + 1])[0], together[i])


@pytest.mark.parametrize("name", BATCH)
def test_a_batch_layer_does_not(name):
    layer, x = make_layer(name).train(), noise(5, 6, 7, 5, seed=1)
    assert not torch.allclose(layer(x)[:2], layer(x[:2]), atol=1e-3)
    assert not torch.allclose(layer.eval()(x), layer.train()(x), atol=1e-3)


@pytest.mark.sample(2)
@pytest.mark.parametrize("norm", BATCH_FREE)
@pytest.mark.parametrize("name", KINDS)
def test_a_batch_free_network_has_no_batch_effect(name, norm):
    """To float64's tolerance: a convolution may sum in another order for another batch size."""
    model, x = make_model(name, norm, **without_drop(norm)).double(), noise(3, 3, 16, 16, seed=2)
    calibrate(model, x)
    trained = model.train()(x)
    for got, wanted in [
        (model(x[1:2]), trained[1:2]),
        (model(x[[2, 0, 1]]), trained[[2, 0, 1]]),
        (model.eval()(x), trained),
    ]:
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


# -- a step of training; the gradients of every model: test_models.py


@pytest.mark.sample(2)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", KINDS)
def test_a_network_trains_a_step_and_is_deterministic_after(name, norm):
    model, images = make_model(name, norm), noise(3, 3, 16, 16, seed=3, dtype=torch.float32)
    calibrate(model, images)
    loss = F.cross_entropy(model.train()(images), torch.tensor([0, 2, 1]))
    loss.backward()
    for key, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), key
    copied = copy.deepcopy(model).eval()  # no tensor of the forward pass may have stayed on a layer
    first = model.eval()(images)
    assert torch.isfinite(first).all() and torch.equal(model(images), first) and torch.equal(copied(images), first)


@pytest.mark.parametrize("norm", BATCH)
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
        ("gn", dict(grups=4), "norm_options: got 'grups', expected one of groups, eps. Did you mean 'groups'?"),
        ("gn", dict(groups=5), "norm_options.groups: got 5 for 12 channels"),
        ("gn", dict(groups=0), "norm_options.groups: got 0, expected a number from 1 on"),
        ("gn", dict(groups=2.0), r"norm_options.groups: got 2.0 \(float\), expected int or null"),
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
        ("free", dict(eps=1e-5), "got 'eps', expected none: this norm has no options"),
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
        make_norm("gnpn", 8)


@pytest.mark.parametrize("channels, groups", [(8, 1), (16, 1), (24, 1), (32, 2), (40, 2), (64, 4), (152, 8), (7, 1)])
def test_default_groups_have_16_channels_or_a_few_more_and_divide(channels, groups):
    assert default_groups(channels) == groups == make_norm("gn", channels).num_groups
    assert make_norm("ln", channels).num_groups == 1 and make_norm("in", channels).num_groups == channels


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_a_compiled_network_of_any_normaliser_is_the_eager_one(norm):
    """Of reactnet20 stem, two blocks and head. With a prior only that it trains: a compiler draws other noise."""
    torch._dynamo.reset()
    options = without_drop(norm)
    model, x = make_model("reactnet20", norm, **options), noise(3, 3, 9, 9, seed=78)
    model.blocks = model.blocks[:2]
    model.tail, model.head = Design(norm=norm, **options).make_tail(8), nn.Linear(8, 3)
    calibrate(model.double(), x)
    eager = copy.deepcopy(model).train()(x)
    logits = torch.compile(model.train())(x)
    logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    if norm != "kn":
        torch.testing.assert_close(logits, eager, rtol=1e-7, atol=1e-7)
    copy.deepcopy(model).eval()(x)
