"""The residual block: its formula, its bookkeeping of variance, and what no sample may know of another.

Compiling for real takes minutes on a busy machine: python -m pytest -m slow tests/test_block.py
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import BATCH, BATCH_FREE, make_model, noise, without_drop
from torch import nn

from bnnfree.errors import BnnfreeError, UnknownNameError
from bnnfree.nn import (
    BETA_MODES,
    BINARIZE,
    NORMS,
    BinaryBlock,
    BlockShape,
    Design,
    ProxyNorm,
    ScaledStdConv2d,
    Sign,
    ThresholdedLinear,
    calibrate,
    expected_betas,
    gradient_centres,
    make_norm,
    plan_step,
    set_part,
)

# name -> cin, cout, further arguments of BinaryBlock, further fields of Design
KINDS = {
    "same": (6, 6, {}, {}),
    "transition": (6, 10, dict(stride=2), {}),
    "wider": (6, 10, {}, {}),
    "pooled": (6, 6, dict(stride=2), {}),
    "duplicate": (6, 12, dict(kernel=1, duplicate=True), {}),
    "two_convs": (6, 6, dict(convs=2), dict(react=False)),
    "two_convs_transition": (6, 10, dict(convs=2, stride=2), dict(react=False)),
    "real_shortcut": (6, 10, dict(stride=2), dict(shortcut="real")),
    "padded_with_ones": (5, 5, {}, dict(pad_value=1)),
    "real_weights": (6, 10, dict(stride=2), dict(binarize="activations")),
    "real_activations": (6, 10, dict(stride=2), dict(binarize="weights")),
    "all_real": (6, 6, dict(convs=2), dict(binarize="none", react=False)),
    "resnet": (6, 10, dict(convs=2, stride=2), dict(real=True, react=False)),
    "activation_in_branch": (6, 10, dict(convs=2, stride=2), dict(activation="branch")),
    "relu_in_branch": (6, 6, {}, dict(real=True, react=False, activation="branch")),
}


BARE = ("none", "free", "free_paper", "ab")  # nothing stands after their convolutions


def randomise(module, seed):
    """Every parameter and constant off its initial value; alpha and beta stay, deviations are positive."""
    module.double()
    with torch.no_grad():
        for i, (name, value) in enumerate(module.state_dict().items()):
            if value.is_floating_point() and not name.endswith(("alpha", "beta")):
                draw = noise(*value.shape, seed=seed + i)
                value.copy_(draw.abs() + 0.2 if name.endswith(("_std", "running_var")) else draw)
    return module


def make_block(norm, kind, **fields):
    cin, cout, arguments, design = KINDS[kind]
    fields = {"alpha": 0.3, **design, **without_drop(norm), **fields}
    return randomise(BinaryBlock(cin, cout, Design(norm=norm, **fields), beta=0.7, **arguments), 7).train()


def explicit_conv(state, x, options, kernel, stride, binary, pad_value):
    """Standardise, sign and scale, centre, gain and bias, from the state and the norm's options."""
    w, size = state["weight"], 1.0
    fan_in = w[0].numel()
    column, row = (-1, 1, 1, 1), (1, -1, 1, 1)
    if options.get("standardize"):
        mean, std = w.mean((1, 2, 3)).view(column), w.std((1, 2, 3), correction=0).view(column)
        w = (w - mean) / ((std + 1e-5) * math.sqrt(fan_in))
    if binary:
        size = w.abs().mean((1, 2, 3)).view(row) if options["scale"] == "mean_abs" else fan_in**-0.5
        w = torch.where(w < 0, -1.0, 1.0).double()

    def linear(x):
        p = kernel // 2
        return size * F.conv2d(F.pad(x, (p, p, p, p), value=float(pad_value)), w, stride=stride)

    y = linear(x)
    if options.get("centre") == "input":
        y = y - linear(state["input_mean"].view(row).expand(1, *x.shape[1:])).mean((2, 3), keepdim=True)
    if options.get("centre") == "output":
        y = y - state["output_mean"].view(row)
    if options.get("unit_output"):
        y = y / state["output_std"].view(row)
    if options.get("gain"):
        y = y * state["gain"].view(row)
    return y + state["bias"].view(row) if "bias" in state else y


def explicit_norm(norm, state, x):
    """The normaliser from its state, statistics written out; a threshold or a proxied activation after it."""
    if norm in BARE:
        return x
    row = (1, -1, 1, 1)
    inner = {k.removeprefix("0."): v for k, v in state.items() if not k.startswith("1.")}
    if "frn" in norm:
        e = 1e-6 + inner["eps_l"].abs()
        y = x / (x.square().mean((2, 3), keepdim=True) + e).sqrt()
    else:
        size = {"gn": 6, "ln": 6, "in": 1}.get(norm.removeprefix("ic_").removesuffix("_pn"))
        if size is None:  # bn, brn before its limits open, kn without a prior, ic
            var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0, keepdim=True)
        else:  # 6 and 10 channels make one group
            dims = (2, 3) if size == 1 else (1, 2, 3)
            var, mean = torch.var_mean(x, dim=dims, correction=0, keepdim=True)
        y = (x - mean) / (var + 1e-5).sqrt()
    if "weight" in inner:
        y = y * inner["weight"].view(row) + inner["bias"].view(row)
    if "1.tau" in state:
        y = y.maximum(state["1.tau"].view(row))
    return y


def explicit_proxy(state, y, slope):
    """PN(PReLU of this slope) in place of affine and activation; the proxy's moments by a fine sum over quantiles."""
    row = (1, -1, 1, 1)
    gamma, beta, bt, gt = (state[f"1.{k}"].view(row) for k in ("weight", "bias", "proxy_shift", "proxy_gain"))

    def act(z):
        return torch.where(z > 0, z, slope * z)

    n = 100_000
    quantiles = math.sqrt(2) * torch.erfinv(2 * (torch.arange(n).double() + 0.5) / n - 1).view(1, 1, n, 1)
    z = act(gamma * (bt + (1 + gt) * quantiles) + beta)
    var, mean = torch.var_mean(z, dim=2, correction=0, keepdim=True)
    return (act(gamma * y + beta) - mean) / (var + 0.03).sqrt()


def explicit_pool(x, stride):
    """The mean of each stride x stride window, cut off at the border; one window at a time."""
    height, width = (-(-side // stride) for side in x.shape[2:])
    rows = [
        torch.stack([
            x[:, :, i * stride : (i + 1) * stride, j * stride : (j + 1) * stride].mean((2, 3))
            for j in range(width)
        ], -1)
        for i in range(height)
    ]  # fmt: skip
    return torch.stack(rows, 2)


def explicit_block(norm, kind, block, x, alpha, beta):
    """out = act(alpha h + id) from the block's state alone."""
    state = block.state_dict()

    def part(prefix):
        return {k[len(prefix) + 1 :]: v for k, v in state.items() if k.startswith(prefix + ".")}

    cin, cout, arguments, design = KINDS[kind]
    kernel, stride = arguments.get("kernel", 3), arguments.get("stride", 1)
    signs, binary = BINARIZE[design.get("binarize", "both")]
    real, pad_value = design.get("real", False), design.get("pad_value", 0)
    react = design.get("react", True) and not real
    before, proxy = NORMS[norm].before, NORMS[norm].proxy
    own = Design(norm=norm)
    options, row = own.real_options if real else own.binary_options, (1, -1, 1, 1)
    convs, place = arguments.get("convs", 1), iter(range(99))

    def relu(y, where):
        if norm == "frn":  # its threshold, which starts at 0 here
            return y.maximum(part(where)["tau"].view(row))
        return y.clamp_min(0)

    def activated(y, where):
        if real:
            return relu(y, where)
        if not react:
            return y
        act = part(where)
        y = y + act["input_shift"].view(row) if "input_shift" in act else y
        slope = 2 ** act["exponent"].round() if norm == "ab" else act["slope"]
        return torch.where(y > 0, y, slope.view(row) * y) + act["output_shift"].view(row)

    u = h = beta * x
    for i in range(convs):
        last = i + 1 == convs
        if before:
            h = explicit_norm(norm, part(f"branch.{next(place)}"), h)
        if not real:
            sign = part(f"branch.{next(place)}")
            t = h + sign["bias"].view(row) if react else h
            h = torch.where(t < 0, -1.0, 1.0).double() if signs else t.clamp(-1, 1)
        conv = part(f"branch.{next(place)}")
        h = explicit_conv(conv, h, options, kernel, stride if i == 0 else 1, binary and not real, pad_value)
        if not before:
            its = part(f"branch.{next(place)}")
            h = explicit_norm(norm, its, h)
            if proxy and (real or (react and last)):
                slope = its["1.activation.weight"].view(row) if react else 0.0
                h = explicit_proxy(its, h, slope)
        if real and not last and not proxy:
            h = relu(h, f"branch.{next(place)}")
    identity = u if (stride > 1 or part("shortcut")) and norm != "ab" else x
    identity = explicit_pool(identity, stride)
    if arguments.get("duplicate"):
        identity = torch.cat([identity, identity], 1)
    elif cin != cout:
        one_bit = binary and not real and design.get("shortcut", "binary") == "binary"
        identity = explicit_conv(part("shortcut.0"), identity, options, 1, 1, one_bit, 0)
        if not before:
            identity = explicit_norm(norm, part("shortcut.1"), identity)
    if design.get("activation") == "branch" and not proxy:
        return alpha * activated(h, f"branch.{next(place)}") + identity
    y = alpha * h + identity
    return y if proxy else activated(y, "act")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", NORMS)
def test_block_equals_its_formula(norm, kind):
    block, x = make_block(norm, kind), noise(3, KINDS[kind][0], 7, 5, seed=1)
    expected = explicit_block(norm, kind, block, x, 0.3, 0.7)
    loose = 1e-4 if NORMS[norm].proxy else 1e-6  # the sum over quantiles; alpha and beta were float32
    torch.testing.assert_close(block(x), expected, rtol=loose, atol=loose)
    assert expected.shape[1] == KINDS[kind][1]
    assert block.shortcut is None or block.shortcut[0].bias is None  # the branch has one


def test_a_sum_of_signs_that_is_0_is_plus_1_for_the_next_sign():
    block = BinaryBlock(6, 6, Design(norm="none", react=False), convs=2)
    x, second = noise(8, 6, 7, 5, seed=11).float(), []
    block.branch[3].register_forward_pre_hook(lambda _, args: second.append(args[0]))
    block(x)
    signs = torch.where(x < 0, -1.0, 1.0)
    weight = torch.where(block.branch[1].weight < 0, -1.0, 1.0)
    sums = F.conv2d(signs, weight, padding=1)
    assert 50 < (sums == 0).sum()
    assert torch.equal(second[0] >= 0, sums >= 0)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (7, 5), (8, 3), (2, 2)])
@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_branch_and_shortcut_agree_on_the_size_when_stepping(kernel, stride, size):
    for cout in (6, 10):
        block = BinaryBlock(6, cout, Design(), kernel=kernel, stride=stride)
        shape = block(torch.randn(2, 6, *size)).shape
        assert shape == (2, cout, -(-size[0] // stride), -(-size[1] // stride))


def test_duplicate_of_another_width_is_refused():
    with pytest.raises(BnnfreeError, match="duplicate: got 6 -> 10 channels"):
        BinaryBlock(6, 10, Design(), duplicate=True)


@pytest.mark.parametrize("kind", ["same", "transition"])
def test_a_checkpoint_determines_alpha_and_beta(kind):
    cin, cout, arguments, _ = KINDS[kind]
    source = make_block("free", kind)
    target = BinaryBlock(cin, cout, Design(norm="free"), **arguments).double()
    x = noise(2, cin, 7, 5, seed=2)
    assert {"alpha", "beta"} <= set(source.state_dict())
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(x), source(x))


RESNET18 = [BlockShape(1, transition=b == 0 and s > 0, ref_resets=b == 0) for s in range(3) for b in range(4)]
REACTNET_A = [BlockShape(2, transition=t, ref_resets=t) for t in (False, True, False, True, False)]


@pytest.mark.parametrize(
    "blocks, mode, expected",
    [
        (RESNET18, "nf", [1, 0.9806, 0.9623, 0.9449] + 2 * [0.9285, 0.9806, 0.9623, 0.9449]),
        (RESNET18, "ref", [1, 1, 0.9806, 0.9623] + 2 * [0.9449, 1, 0.9806, 0.9623]),
        (REACTNET_A, "nf", [1, 0.9806, 0.9623, 0.9806, 0.9623, 0.9449, 0.9285, 0.9806, 0.9623, 0.9449]),
        (REACTNET_A, "ref", [1, 0.9806, 0.9623, 0.9449, 1, 0.9806, 0.9623, 0.9449, 1, 0.9806]),
        (RESNET18, "none", [1] * 12),
        (REACTNET_A, "measured", [1] * 10),
    ],
)
def test_expected_betas_are_those_of_the_paper_and_of_its_code(blocks, mode, expected):
    betas = expected_betas(blocks, 0.2, mode)
    assert [len(units) for units in betas] == [block.units for block in blocks]
    assert [round(b, 4) for units in betas for b in units] == expected


def test_every_beta_mode_is_known_and_others_are_not():
    for mode in BETA_MODES:
        assert expected_betas([BlockShape()], 0.2, mode) == [[1.0]]
    with pytest.raises(UnknownNameError, match="Did you mean 'measured'"):
        expected_betas([], 0.2, "measure")


def network(norm, **fields):
    """Stem, a same and a transition block, mean pool; calibrated, with parameters off their start."""
    torch.manual_seed(3)
    design = Design(norm=norm, **{**without_drop(norm), **fields})
    blocks = [BinaryBlock(6, 6, design), BinaryBlock(6, 10, design, stride=2), BinaryBlock(10, 10, design)]
    model = nn.Sequential(design.make_stem(3, 6, 3, 1), *blocks, nn.AdaptiveAvgPool2d(1)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    calibrate(model, noise(5, 3, 9, 7, seed=4))
    return model


@pytest.mark.parametrize("norm", NORMS)
def test_measured_beta_gives_every_block_inputs_of_deviation_1(norm):
    model, seen = network(norm, beta="measured"), []
    for block in model[1:4]:
        block.branch.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.eval()
    model(noise(5, 3, 9, 7, seed=4))
    assert [u.std(correction=0).item() for u in seen] == [pytest.approx(1.0)] * 3
    assert all(block.beta != 1 for block in model[1:4])


def eval_is_train(model, x):
    model.train()
    trained = model(x)
    return torch.equal(model.eval()(x), trained)


def sample_alone_is_sample_in_a_batch(model, x):
    model.train()
    together = model(x)
    return all(torch.allclose(model(x[i : i + 1])[0], together[i], rtol=1e-12, atol=1e-12) for i in range(len(x)))


def batch_gradient_is_the_sum_of_single_ones(model, x):
    model.train()
    weight = noise(*model(x).shape, seed=5)

    def gradients(rows):
        model.zero_grad()
        (model(x[rows]).tanh() * weight[rows]).sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    whole = gradients(slice(None))
    single = [gradients(slice(i, i + 1)) for i in range(len(x))]
    sums = [sum(parts) for parts in zip(*single, strict=True)]
    assert all(g.abs().max() > 0 for g in whole)
    return all(torch.allclose(a, b, rtol=1e-10, atol=1e-10) for a, b in zip(whole, sums, strict=True))


def order_does_not_matter(model, x):
    model.train()
    order = torch.tensor([3, 0, 4, 1, 2])
    return torch.allclose(model(x[order]), model(x)[order], rtol=1e-12, atol=1e-12)


INDEPENDENCE = [
    eval_is_train,
    sample_alone_is_sample_in_a_batch,
    batch_gradient_is_the_sum_of_single_ones,
    order_does_not_matter,
]


@pytest.mark.parametrize("holds", INDEPENDENCE)
@pytest.mark.parametrize("norm", BATCH_FREE)
def test_batch_free_network_has_no_batch_effect(norm, holds):
    """But that the gradient of `free`'s bits is centred by the other samples', where it is not left out."""
    assert holds(network(norm, centre_gradient=False), noise(5, 3, 9, 7, seed=6))


@pytest.mark.parametrize("holds", INDEPENDENCE)
def test_a_centred_gradient_is_the_only_batch_effect_of_free(holds):
    of_gradients = holds is batch_gradient_is_the_sum_of_single_ones
    assert holds(network("free"), noise(5, 3, 9, 7, seed=6)) != of_gradients


def test_without_centring_what_is_wrong_with_gradients_of_biases_is_larger_than_these():
    """Of a random ReActNet-20, against centring over all its images: more than that of weights."""
    model = make_model("reactnet20", "free", latent_std=0.04).double().train()
    images = noise(24, 3, 16, 16, seed=7)
    calibrate(model, images)
    weight = noise(24, 3, seed=8)

    def gradients():
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
        return found, {name: p for name, p in found.items() if name.endswith(("bias", "shift")) and "head" not in name}

    parts, _ = plan_step([24, 1], 0, [24, 1], images)  # of a group that is not complete nothing is taken
    set_part(gradient_centres(model), parts[0]._replace(own=torch.zeros_like(parts[0].own)))
    (model(images).log_softmax(1) * weight).sum().backward()
    (whole, biases) = gradients()
    model.zero_grad()
    set_part(gradient_centres(model), None)
    (model(images).log_softmax(1) * weight).sum().backward()
    (right, right_biases) = gradients()

    def error(got, expected):
        return math.sqrt(sum((got[k] - e).square().sum().item() for k, e in expected.items())
                         / sum(e.square().sum().item() for e in expected.values()))  # fmt: skip

    weights = {name: p for name, p in right.items() if p.dim() == 4}
    print(error(biases, right_biases), error(whole, weights))
    assert error(biases, right_biases) > 1 > error(whole, weights) > 0.05


@pytest.mark.parametrize("holds", INDEPENDENCE[:3])
@pytest.mark.parametrize("norm", BATCH)
def test_other_networks_have_a_batch_effect(norm, holds):
    assert not holds(network(norm), noise(5, 3, 9, 7, seed=6))


@pytest.mark.parametrize("window, norm", [("sample", "none"), ("fixed", "free")])
def test_gradients_stay_per_sample_in_either_window(window, norm):
    model = network(norm, ste_window=window, centre_gradient=False)
    assert batch_gradient_is_the_sum_of_single_ones(model, noise(5, 3, 9, 7, seed=8))


@pytest.mark.parametrize("norm", NORMS)
def test_make_norm_and_the_stem_have_what_the_norm_says(norm):
    layer, stem = make_norm(norm, 7), Design(norm=norm).make_stem(3, 7, 3, 2)
    bare = norm in BARE
    assert isinstance(layer, nn.Identity) == bare
    assert isinstance(stem[0], ScaledStdConv2d)
    if NORMS[norm].before:
        assert len(stem) == 1 and type(Design(norm=norm).make_tail(7)) is type(layer)
    else:
        assert type(stem[1]) is type(layer) and Design(norm=norm).make_tail(7) is None
    assert stem(torch.randn(2, 3, 9, 7)).shape == layer(torch.randn(2, 7, 5, 4)).shape == (2, 7, 5, 4)


def test_a_proxied_block_has_nothing_after_its_sum_and_a_bare_one_no_proxy():
    react, bare = (BinaryBlock(6, 6, Design(norm="ln_pn", react=react)) for react in (True, False))
    assert isinstance(react.branch[-1][1], ProxyNorm) and isinstance(react.branch[-1][1].activation, nn.PReLU)
    assert isinstance(react.act, nn.Identity)
    assert isinstance(bare.branch[-1], nn.GroupNorm) and bare.branch[-1].weight is None


def test_the_activation_of_a_proxy_is_not_for_the_trunk():
    with pytest.raises(BnnfreeError, match="got 'trunk' for norm 'ln_pn'.*expected 'branch'"):
        Design(norm="ln_pn", activation="trunk")
    assert Design(norm="ln_pn", activation="branch").activation == "branch"


def test_slopes_of_ab_are_powers_of_two_whose_gradient_passes_the_rounding():
    act = BinaryBlock(6, 6, Design(norm="ab")).act
    with torch.no_grad():
        act.exponent += noise(6, seed=3).float()
    x = noise(2, 6, 3, 4, seed=4).float()
    slope = 2 ** act.exponent.detach().round()
    torch.testing.assert_close(act(x), torch.where(x > 0, x, slope.view(1, -1, 1, 1) * x), rtol=1e-6, atol=0)
    act(x).sum().backward()
    expected = math.log(2) * slope * x.clamp(max=0).sum((0, 2, 3))
    torch.testing.assert_close(act.exponent.grad, expected)
    signs = [m for m in BinaryBlock(6, 6, Design(norm="ab")).branch if isinstance(m, Sign)]
    assert [m.ste for m in signs] == ["sigmoid"]
    assert Design(norm="ab", ste="clip").ste == "clip" and Design().ste == "approx"


def test_a_threshold_stands_where_no_sign_follows():
    block = BinaryBlock(6, 10, Design(norm="frn", react=False), stride=2, convs=2)
    found = [any(isinstance(m, ThresholdedLinear) for m in layer.modules()) for layer in block.branch]
    assert found == [False] * 5 + [True] and isinstance(block.shortcut[1][1], ThresholdedLinear)
    plain = BinaryBlock(6, 6, Design(norm="frn", norm_options={"tlu": False}))
    assert not any(isinstance(m, ThresholdedLinear) for m in plain.modules())


@pytest.mark.parametrize(
    "fields, hint",
    [
        (dict(norm="fre"), "free"),
        (dict(norm="free_papr"), "free_paper"),
        (dict(binarize="weight"), "weights"),
        (dict(shortcut="binry"), "binary"),
        (dict(ste="aprox"), "approx"),
        (dict(ste_window="sampel"), "sample"),
        (dict(beta="measure"), "measured"),
        (dict(activation="trunck"), "trunk"),
    ],
)
def test_unknown_names_in_a_design_get_the_nearest_known_one(fields, hint):
    with pytest.raises(UnknownNameError, match=f"Did you mean '{hint}'"):
        Design(**fields)


def compiled_equals_eager(norm, kind, backend):
    torch._dynamo.reset()
    block, x = make_block(norm, kind), noise(3, KINDS[kind][0], 7, 5, seed=9).requires_grad_()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    inputs = [x, *block.parameters()]
    y = block(x)
    upstream = noise(*y.shape, seed=10)
    expected = torch.autograd.grad(y, inputs, upstream)
    z = compiled(x)
    torch.testing.assert_close(z, y, rtol=1e-9, atol=1e-9)
    for got, wanted in zip(torch.autograd.grad(z, inputs, upstream), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


def test_block_is_one_graph_for_the_compiler_and_its_gradients_stay():
    compiled_equals_eager("free", "transition", "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["same", "transition"])
@pytest.mark.parametrize("norm", NORMS)
def test_compiled_block_equals_the_eager_one(norm, kind):
    compiled_equals_eager(norm, kind, "inductor")
