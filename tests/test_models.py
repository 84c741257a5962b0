"""Every architecture with every normaliser: it builds, trains, starts fairly, and has the stated shapes."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import KINDS_OF_MODELS, noise, without_drop
from torch import nn

from bnnfree.errors import BnnfreeError, UnknownNameError
from bnnfree.models import MODELS
from bnnfree.nn import (
    BINARIZE,
    NORMS,
    BinaryBlock,
    BinaryConv2d,
    CentredLinear,
    RPReLU,
    Sign,
    WeightLayer,
    calibrate,
)

SHAPES = [(norm, binarize) for norm in NORMS for binarize in BINARIZE if binarize == "both" or "free" in norm]
NARROW = 0.125  # 8 channels where the table has 64; never fewer than 8


def make_model(name, classes=3, seed=0, **options):
    print(f"model seed {seed}")
    torch.manual_seed(seed)
    return MODELS[name](classes, **{"width": NARROW, "stem": "cifar", **options})


@pytest.mark.sample(2)
@pytest.mark.parametrize("norm, binarize", SHAPES)
@pytest.mark.parametrize("name", KINDS_OF_MODELS)
def test_every_parameter_of_every_model_gets_a_gradient(name, norm, binarize):
    """On 1x1 maps, as reactnet_a ends with here, instances are constants and FRN's thresholds are never met."""
    stem = "imagenet" if name == "reactnet_a" else "cifar"
    model = make_model(name, norm=norm, binarize=binarize, stem=stem, width=0.5 if name == "reactnet15" else NARROW)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:  # shifts and biases off 0, so that both sides of every RPReLU are met
                p.add_(0.3 * torch.randn_like(p))
    images = noise(2, 3, 19, 13, seed=1, dtype=torch.float32)
    calibrate(model, images)
    logits = model(images)
    assert logits.shape == (2, 3)
    nn.functional.cross_entropy(logits, torch.tensor([0, 2])).backward()
    for key, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), key
        pointless = norm in ("in", "in_pn") or (norm == "frn" and key.endswith("tau"))
        assert p.grad.abs().max() > 0 or (pointless and name == "reactnet_a"), key


@pytest.mark.sample(2)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["reactnet20", "reactnet_a", "xnor_resnet18", "resnet20"])
def test_all_stages_of_a_model_hold_the_same_keys(name, norm):
    states = [make_model(name, norm=norm, binarize=b).state_dict() for b in BINARIZE]
    shapes = [{key: value.shape for key, value in state.items()} for state in states]
    assert all(shape == shapes[0] for shape in shapes)
    assert sum(key.endswith(("alpha", "beta")) for key in shapes[0]) >= 2 * 8
    late = make_model(name, norm=norm, binarize="both", seed=1)
    late.load_state_dict(states[1])  # strict: the weights of a stage carry over
    assert all(torch.equal(v, states[1][k]) for k, v in late.state_dict().items())


def ceil_halves(size, times):
    for _ in range(times):
        size = tuple(-(-side // 2) for side in size)
    return size


# name -> residual blocks, times a block halves the map, times the imagenet stem halves it
LAYOUT = {
    "reactnet18": (16, 3, 2),
    "birealnet18": (16, 3, 2),
    "xnor_resnet18": (8, 3, 2),
    "reactnet15": (13, 2, 2),
    "reactnet20": (18, 2, 2),
    "birealnet20": (18, 2, 2),
    "xnor_resnet20": (9, 2, 2),
    "reactnet_a": (26, 4, 1),
    "resnet20": (9, 2, 2),
}


def test_the_layout_table_has_every_model():
    assert set(LAYOUT) == set(MODELS)


@pytest.mark.parametrize(
    "stem, size", [("cifar", (13, 10)), ("cifar", (8, 8)), ("half", (13, 10)), ("imagenet", (65, 34))]
)
@pytest.mark.parametrize("name", KINDS_OF_MODELS)
def test_maps_halve_where_the_layout_says_for_odd_and_oblong_images(name, stem, size):
    model, sizes = make_model(name, stem=stem, classes=7, channels=1), []
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, out: sizes.append(tuple(out.shape[2:])))
    assert model(noise(2, 1, *size, seed=2, dtype=torch.float32)).shape == (2, 7)
    blocks, halvings, stem_halvings = LAYOUT[name]
    start = {"cifar": 0, "half": 1, "imagenet": stem_halvings}[stem]
    assert len(sizes) == blocks
    assert list(dict.fromkeys(sizes)) == list(dict.fromkeys(ceil_halves(size, start + i) for i in range(halvings + 1)))


@pytest.mark.parametrize(
    "name, width, expected",
    [
        ("reactnet20", 1.0, [16, 32, 64]),
        ("reactnet20", 0.5, [8, 16, 32]),
        ("birealnet18", 0.125, [8, 16, 32, 64]),
        ("xnor_resnet18", 0.3, [16, 40, 80, 152]),
        ("reactnet18", 1e-3, [8, 8, 8, 8]),
        ("reactnet_a", 0.25, [8, 16, 32, 64, 128, 256]),
        ("reactnet_a", 0.3, [8, 16, 32, 64, 128, 256]),  # doublings stay doublings at any width
        ("reactnet_a", 0.4, [16, 32, 64, 128, 256, 512]),
    ],
)
def test_width_multiplies_the_channels_to_multiples_of_8(name, width, expected):
    model, seen = make_model(name, width=width), []
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, out: seen.extend([args[0].shape[1], out.shape[1]]))
    model(noise(1, 3, 9, 7, seed=3, dtype=torch.float32))
    assert sorted(set(seen)) == sorted(set(expected))
    assert model.get_classifier() is model.head and model.head.in_features == expected[-1]


@pytest.mark.parametrize("norm", NORMS)
def test_any_network_can_have_a_centred_classifier_and_one_of_norm_free_has_it(norm):
    assert type(make_model("reactnet20", norm=norm).head) is (CentredLinear if norm == "free" else nn.Linear)
    assert type(make_model("reactnet20", norm=norm, centre_head=False).head) is nn.Linear
    for asked, centred in ((None, True), (True, True), (False, False)):
        head = make_model("reactnet20", norm=norm, centre_head=True, centre_gradient=asked).head
        assert type(head) is CentredLinear and (head.gradient_centre is not None) == centred


@pytest.mark.parametrize("name", KINDS_OF_MODELS)
def test_activations_are_rprelu_in_react_models_and_relu_in_the_real_one(name):
    model = make_model(name)
    acts = {type(b.act) for b in model.modules() if isinstance(b, BinaryBlock)}
    assert acts == {RPReLU if "react" in name else nn.ReLU if name == "resnet20" else nn.Identity}


@pytest.mark.parametrize("binarize", BINARIZE)
@pytest.mark.parametrize("norm", ["bn", "frn", "gn_pn", "ic"])
def test_the_real_twin_is_an_ordinary_resnet20_whatever_is_to_be_1_bit(norm, binarize):
    model = make_model("resnet20", norm=norm, width=1.0, binarize=binarize)
    kinds = [type(m).__name__ for m in model.modules()]
    assert kinds.count("ScaledStdConv2d") == 19 + 2 and not {"BinaryConv2d", "RSign", "Sign", "Clip"} & set(kinds)
    relu = {"frn": "ThresholdedLinear"}.get(norm, "ReLU")
    assert kinds.count(relu) == 19 and (relu == "ReLU" or "ReLU" not in kinds)
    if norm == "bn":
        twin = make_model("reactnet20", norm=norm, width=1.0)
        sizes = [sum(m.weight.numel() for m in net.modules() if isinstance(m, WeightLayer)) for net in (model, twin)]
        assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    "name, beta, expected",
    [
        ("reactnet18", None, [1, 0.9806, 0.9623, 0.9449] + 3 * [0.9285, 0.9806, 0.9623, 0.9449]),
        ("reactnet18", "ref", [1, 1, 0.9806, 0.9623] + 3 * [0.9449, 1, 0.9806, 0.9623]),
        ("reactnet18", "none", [1] * 16),
        ("reactnet_a", "ref", [1, 0.9806, 0.9623, 0.9449] + [1, 0.9806, 0.9623, 0.9449] * 2),
        ("reactnet_a", "nf", [1, 0.9806, 0.9623, 0.9806, 0.9623, 0.9449, 0.9285, 0.9806, 0.9623, 0.9449]),
    ],
)
def test_blocks_of_the_paper_have_alpha_and_beta_in_their_state(name, beta, expected):
    state = make_model(name, norm="free_paper", beta=beta).state_dict()
    betas = [round(v.item(), 4) for k, v in state.items() if k.endswith("beta")]
    assert len(betas) == LAYOUT[name][0] and betas[: len(expected)] == expected
    assert {round(v.item(), 6) for k, v in state.items() if k.endswith("alpha")} == {0.2}


@pytest.mark.parametrize("norm", ["none", "free", "free_paper", "bn", "ic_frn"])
@pytest.mark.parametrize("name", KINDS_OF_MODELS)
def test_half_of_the_initial_latents_are_positive_in_every_layer(name, norm):
    for key, layer in make_model(name, norm=norm, width=0.25).named_modules():
        if isinstance(layer, WeightLayer):
            n = layer.weight.numel()
            share = (layer.weight > 0).double().mean().item()
            tolerance = max(0.1, 4 * 0.5 / n**0.5) if n < 400 else 0.1  # 4 standard errors of n coins
            assert abs(share - 0.5) < tolerance, (key, share, n)
            assert layer.weight.abs().min() > 0


@pytest.mark.parametrize("latent_std", [None, 0.04])
@pytest.mark.parametrize("norm, variance", [("none", 1.0), ("free", 1.0), ("bn", 1.0), ("free_paper", 0.64)])
@pytest.mark.parametrize("name", ["reactnet20", "reactnet_a"])
def test_initial_binary_convolutions_of_random_signs_have_unit_variance(name, norm, variance, latent_std):
    # mean-abs scale of standardised Gaussian latents: (2 / pi) instead of 1
    convs = {}
    for layer in make_model(name, norm=norm, width=0.5, latent_std=latent_std).modules():
        if isinstance(layer, BinaryConv2d):
            convs[tuple(layer.weight.shape)] = layer
    assert len(convs) > 5
    for shape, layer in convs.items():
        if layer.in_channels > 64:
            continue
        layer.padding = (0, 0)  # zeros at the border would lower it
        x = noise(16, layer.in_channels, 9, 9, seed=5, dtype=torch.float32)
        got = layer(torch.where(x < 0, -1.0, 1.0)).var().item()
        assert got == pytest.approx(variance, rel=0.12), shape


@pytest.mark.sample(2)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name, width", [("reactnet20", 0.5), ("xnor_resnet18", NARROW)])
def test_signs_under_bfloat16_autocast_are_those_of_float32(name, width, norm):
    # xnor: a sign reads whole sums of signs, many of them 0; reactnet: it reads the trunk
    # dropout leaves no signs to the convolution, so it is off; a prior is drawn at random, so it has a seed
    model = make_model(name, norm=norm, width=width, **without_drop(norm))
    images = noise(2, 3, 12, 11, seed=6, dtype=torch.float32)
    calibrate(model, images)
    model.train()
    signs = []
    for layer in model.modules():
        if isinstance(layer, Sign):
            layer.register_forward_hook(lambda _, args, out: signs.append(out.detach().float()))
    torch.manual_seed(7)
    logits = model(images)
    count = len(signs)
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(images)
    assert count == sum(isinstance(m, Sign) for m in model.modules()) and len(signs) == 2 * count
    for i, (a, b) in enumerate(zip(signs[:count], signs[count:], strict=True)):
        assert torch.equal(a, b), f"sign {i}: {(a != b).sum()} of {a.numel()} differ"
    # real layers of ours stay float32, a centred classifier too
    assert low.dtype == (torch.float32 if isinstance(model.head, CentredLinear) else torch.bfloat16)
    torch.testing.assert_close(low.float(), logits, rtol=2e-2, atol=2e-2)
    nn.functional.cross_entropy(low.float(), torch.tensor([0, 2])).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


WRONG = [
    (dict(norm="fre"), "free"),
    (dict(stem="cifar10"), "cifar"),
    (dict(binarize="weight"), "weights"),
    (dict(shortcut="rel"), "real"),
    (dict(ste="swich"), "swish"),
    (dict(beta="measure"), "measured"),
]


@pytest.mark.parametrize("name, wrong", list(itertools.product(MODELS, WRONG)), ids=str)
def test_unknown_names_get_the_nearest_known_one(name, wrong):
    options, hint = wrong
    with pytest.raises(UnknownNameError, match=f"Did you mean '{hint}'"):
        make_model(name, **options)


@pytest.mark.parametrize("name", KINDS_OF_MODELS)
@pytest.mark.parametrize("width", [0, -1.0])
def test_a_width_that_is_not_positive_is_refused(name, width):
    with pytest.raises(BnnfreeError, match="width: got"):
        make_model(name, width=width)
