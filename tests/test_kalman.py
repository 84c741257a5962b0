"""Batch Kalman normalisation: the mixture, the priors that make it, and that nobody else notices."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import make_model, noise
from torch import nn

from bnnfree.models import MODELS
from bnnfree.nn import (
    NORMS,
    Belief,
    BinaryBlock,
    Design,
    KalmanNorm2d,
    RPReLU,
    first_belief,
)
from bnnfree.nn.norms.kalman import mixture

M, S = torch.tensor([0.0, -1.1, 0.7]).double(), torch.tensor([1.0, 0.6, 1.7]).double()


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


@pytest.mark.parametrize("factor", [0.0, 1e-4, 1e4, math.inf])
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


def test_an_activation_in_the_branch_changes_the_moments_that_it_adds():
    block = BinaryBlock(6, 6, Design(norm="kn", alpha=0.3, activation="branch")).train()
    with torch.no_grad():
        for i, p in enumerate(block.parameters()):
            p.add_(0.3 * noise(*p.shape, seed=80 + i, dtype=torch.float32))
    before = Belief(noise(6, seed=79).float(), torch.full((6,), 2.0))
    _, after = block(noise(3, 6, 8, 8, seed=78, dtype=torch.float32), before)
    norm, act = block.branch[-2:]
    mean, var = Belief(norm.bias, norm.weight.square(), act).moments()
    side_mean, side_var = before.moments()
    torch.testing.assert_close(after.mean, 0.3 * mean + side_mean)
    torch.testing.assert_close(after.var, 0.09 * var + side_var)
    assert isinstance(after.activation, nn.Identity)


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
