"""Networks that are exported compute what they do in eval mode, or are refused by name: never wrong silently."""

from __future__ import annotations

import contextlib
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnnfree.engine import Engine
from bnnfree.errors import BnnfreeError
from bnnfree.export import ExportError, check_packed, export, pack
from bnnfree.export import check as checking
from bnnfree.export.verify import sample_images, verify
from bnnfree.nn import BinaryConv2d, BinaryLinear, RPReLU, RSign, Sign

SIZE = (12, 10)
DATA = {"image_size": SIZE, "mean": 0.41, "std": 0.3}
FLOAT = {"stem": "float", "head": "float"}


def pixels_and_images(count=4, channels=3):
    pixels = np.random.RandomState(0).randint(0, 256, (count, *SIZE, channels)).astype(np.uint8)
    return pixels, ((torch.from_numpy(pixels).float() / 255 - 0.41) / 0.3).permute(0, 3, 1, 2)


def assert_same(net, near=1e-4):
    """The packed network gives what the network itself gives, which stays as it was."""
    pixels, images = pixels_and_images()
    packed = pack(net, **DATA, **FLOAT)
    with torch.no_grad():
        expected = net.eval()(images.clone())
    expected = (expected.permute(0, 2, 3, 1) if expected.dim() == 4 else expected).numpy()
    got = Engine(packed.model).run(pixels)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= near * np.abs(expected).max()


class Net(nn.Module):
    """A stem, a body that is a function of the net and its map, and a head."""

    def __init__(self, body):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.sign, self.conv = nn.Conv2d(3, 8, 3, padding=1), Sign(), BinaryConv2d(8, 8, 3, padding=1)
        self.relu, self.leaky = nn.ReLU(inplace=True), nn.LeakyReLU(0.2, inplace=True)
        self.hard, self.six = nn.Hardtanh(-0.5, 0.7, inplace=True), nn.ReLU6(inplace=True)
        self.drop = nn.Dropout(0.5, inplace=True)
        self.register_buffer("count", torch.zeros(()))
        self.weight = nn.Parameter(torch.ones(8, 1, 1))
        self.body = body

    def forward(self, x):
        x = self.stem(x)
        # 0.37: no sum that a sign reads is 0
        return self.body(self, x).mean((2, 3))


def changed(net, x, change):
    """The residual and the branch see the change, made between them."""
    residual = x
    change(net, x)
    return net.conv(net.sign(x - 0.37)) + residual


def iadd(n, x):
    x += 1.0


def isub(n, x):
    x -= n.weight


def imul(n, x):
    x *= 0.5


def idiv(n, x):
    x /= 2


CHANGES = {
    "a layer's result dropped": lambda n, x: n.relu(x),
    "leaky": lambda n, x: n.leaky(x),
    "hardtanh": lambda n, x: n.hard(x),
    "relu6": lambda n, x: n.six(x),
    "dropout": lambda n, x: n.drop(x),
    "add_": lambda n, x: x.add_(1.0),
    "sub_": lambda n, x: x.sub_(0.25),
    "mul_": lambda n, x: x.mul_(-0.5),
    "div_": lambda n, x: x.div_(3),
    "clamp_": lambda n, x: x.clamp_(-0.2, 0.4),
    "clip_": lambda n, x: x.clip_(min=-0.2),
    "relu_": lambda n, x: x.relu_(),
    "F.relu inplace": lambda n, x: F.relu(x, inplace=True),
    "F.relu inplace by place": lambda n, x: F.relu(x, True),
    "F.relu_": lambda n, x: F.relu_(x),
    "torch.relu_": lambda n, x: torch.relu_(x),
    "torch.clamp_": lambda n, x: torch.clamp_(x, -0.2, 0.3),
    "F.leaky_relu": lambda n, x: F.leaky_relu(x, 0.1, inplace=True),
    "F.hardtanh": lambda n, x: F.hardtanh(x, -0.3, 0.3, inplace=True),
    "out": lambda n, x: torch.add(x, 0.5, out=x),
    "+=": iadd,
    "-=": isub,
    "*=": imul,
    "/=": idiv,
    "twice": lambda n, x: (n.relu(x), x.add_(-0.4)),
    "through detach": lambda n, x: x.detach().relu_(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_value_changed_in_place_is_changed_for_all_who_read_it(name):
    assert_same(Net(lambda n, x: changed(n, x, CHANGES[name])))


def test_the_result_of_a_change_in_place_may_be_read_beside_what_was_changed():
    assert_same(Net(lambda n, x: n.conv(n.sign(n.relu(x) - 0.37)) + x))
    assert_same(Net(lambda n, x: (lambda y: x.add_(1.0) * 0.5 + y)(x * 2)))  # y was made before


def test_the_image_may_be_changed_in_place():
    assert_same(nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))


def setitem(n, x):
    x[:, :2] = 0.0


VIEWS = {
    "a slice": lambda n, x: x[:, :4].relu_(),
    "a step": lambda n, x: x[:, :, ::2].add_(1.0),
    "a part by name": lambda n, x: x.narrow(1, 0, 4).mul_(0.0),
    "a view": lambda n, x: x.view(x.shape[0], -1).relu_(),
    "flattened": lambda n, x: x.flatten(1).clamp_(min=0),
    "transposed": lambda n, x: x.transpose(2, 3).relu_(),
    "set": setitem,
    "filled": lambda n, x: x.fill_(1.0),
    "a parameter": lambda n, x: n.weight.mul_(2.0),
    "a buffer": lambda n, x: n.count.add_(1.0),
}


@pytest.mark.parametrize("name", VIEWS)
def test_what_cannot_be_taken_out_is_refused_with_the_line(name, tmp_path):
    net = Net(lambda n, x: changed(n, x, VIEWS[name]))
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ExportError, match=r"export: ") as caught:
        export(net, tmp_path / "m.bnnf", **DATA)
    stateful = name.startswith("a ") and "parameter" in name or "buffer" in name
    assert re.search("changes its (weight|count)" if stateful else r"test_export_same\.py:\d+", str(caught.value))
    assert list(tmp_path.iterdir()) == []


PERHAPS = {  # the tensor itself, a view of it, or a copy, by what tensor it is
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "float": lambda x: x.float(),
    "double": lambda x: x.double(),
    "to a type": lambda x: x.to(torch.float32),
    "to a device": lambda x: x.to("cpu"),
    "cpu": lambda x: x.cpu(),
    "type": lambda x: x.type(torch.float32),
    "type_as": lambda x: x.type_as(x),
    "reshape": lambda x: x.reshape(x.shape),
    "reshape_as": lambda x: x.reshape_as(x),
    "torch.reshape": lambda x: torch.reshape(x, x.shape),
    "flatten": lambda x: x.flatten(1, 1),
    "torch.flatten": lambda x: torch.flatten(x, 1, 1),
    "a chain": lambda x: x.detach().contiguous().view(x.shape).float(),
}


@pytest.mark.parametrize("name", PERHAPS)
def test_a_change_of_what_may_be_a_copy_is_refused_with_the_lines(name):
    def of_the_copy(n, x):
        y = PERHAPS[name](x)
        y.relu_()
        return y + x

    def of_the_tensor(n, x):
        y = PERHAPS[name](x)
        n.relu(x)
        return n.conv(n.sign(y - 0.37))

    def of_one_by_the_other(n, x):
        y = PERHAPS[name](x)
        x.sub_(y)
        return y + x

    for body in (of_the_copy, of_the_tensor, of_one_by_the_other):
        with pytest.raises(ExportError, match=r"test_export_same\.py:\d+ reads what is the same tensor or a copy"):
            pack(Net(body), **DATA)


@pytest.mark.parametrize("name", [name for name in PERHAPS if "type" not in name and name not in (
    "double", "cpu", "to a device", "reshape_as")])  # fmt: skip
def test_a_copy_that_is_changed_and_alone_read_is_exported(name):
    def body(n, x):
        residual = x.clone()
        x = PERHAPS[name](x)
        x = n.relu(x)
        return n.conv(n.sign(x - 0.37)) + residual + PERHAPS[name](x)

    assert_same(Net(body))


def test_a_view_that_is_certain_and_a_clone_are_told_apart():
    for view in (lambda x: x.detach(), lambda x: x.view(x.shape), lambda x: x.view_as(x), lambda x: x.expand(x.shape)):
        with contextlib.suppress(ExportError):  # of a function without a rule
            assert_same(Net(lambda n, x: view(x).relu_() + x))  # noqa: B023
    assert_same(Net(lambda n, x: x.clone().relu_() + x))
    assert_same(Net(lambda n, x: n.relu(x.clone(memory_format=torch.channels_last)) + x))


def test_dropout_that_is_active_in_eval_mode_is_refused_and_one_that_is_not_passes():
    for body in (lambda n, x: F.dropout(x, 0.5), lambda n, x: F.dropout2d(x, training=True)):
        with pytest.raises(ExportError, match=r"drops values at random.*training=self\.training"):
            pack(Net(body), **DATA)
    assert_same(Net(lambda n, x: F.dropout(x, 0.5, n.training) + F.dropout(x, 0.0)))


def test_a_forward_that_depends_on_what_tracing_cannot_see_is_refused():
    calls = []

    def body(n, x):
        calls.append(1)
        return x * len(calls)

    with pytest.raises(ExportError, match="computes something else than the graph"):
        pack(Net(body), **DATA)


def counted(n, x):
    n.calls = getattr(n, "calls", 0) + 1
    return x * n.calls


def first_otherwise(n, x):
    before, n.before = getattr(n, "before", None), True
    return x if before is None else x + 1.0


def remembered(n, x):
    n.kept = [*getattr(n, "kept", []), 1.0]
    return x + sum(n.kept)


def hidden(n, x):
    n.count.data = n.count.data + 1
    return x + n.count


def trained(n, x):
    n.weight.data.mul_(1.01)
    return x * n.weight


@pytest.mark.parametrize("body", [counted, first_otherwise, remembered, hidden, trained])
def test_a_network_whose_second_call_gives_something_else_is_refused(body):
    with pytest.raises(
        ExportError, match="computes something else than the graph.* from call to call|cannot be traced"
    ):
        pack(Net(body), **DATA)


@pytest.mark.parametrize("method", ["forward", "_call_impl"])
def test_a_method_put_on_a_layer_is_followed_or_refused(method):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    setattr(net[1], method, lambda x: x * 3)
    try:
        assert_same(net)
    except ExportError as error:
        assert "a method put on an object" in str(error)
    binary = nn.Sequential(nn.Conv2d(3, 4, 3), Sign(), BinaryConv2d(4, 4, 3))
    setattr(binary[2], method, lambda x: x * 3)
    with pytest.raises(ExportError, match=rf"layer 2 .* with {method} of its own"):
        pack(binary, **DATA)


# -- numbers that are none


def poisoned(path, value):
    torch.manual_seed(0)
    net = nn.Sequential()
    for name, layer in (
        ("stem", nn.Conv2d(3, 8, 3)), ("norm", nn.BatchNorm2d(8)), ("sign", RSign(8)),
        ("conv", BinaryConv2d(8, 8, 3, bias=True, unit_output=True, centre="input")), ("act", RPReLU(8)),
        ("pool", nn.AdaptiveAvgPool2d(1)), ("flat", nn.Flatten()), ("sign2", Sign()),
        ("inner", BinaryLinear(8, 8)), ("head", nn.Linear(8, 3)),
    ):  # fmt: skip
        net.add_module(name, layer)
    *parents, name = path.split(".")
    with torch.no_grad():
        tensor = getattr(net.get_submodule(".".join(parents)), name)
        tensor.view(-1)[-1] = value
    return net


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("path", sorted(
    name for named in (poisoned("head.bias", 0.0).named_parameters(), poisoned("head.bias", 0.0).named_buffers())
    for name, tensor in named if tensor.is_floating_point()))  # fmt: skip
def test_a_number_that_is_not_finite_is_refused_by_name(path, value, tmp_path):
    with pytest.raises(ExportError, match=rf"export: {re.escape(path)}: got .* expected finite"):
        export(poisoned(path, value), tmp_path / "m.bnnf", **DATA)
    assert list(tmp_path.iterdir()) == []


# -- after a Flatten


FLAT = {
    "softmax": (lambda x: F.softmax(x.flatten(1), 1), "softmax over flattened maps of 4x5"),
    "concat": (lambda x: torch.cat([x.flatten(1), x.mean((2, 3))], 1), "joins flattened maps of 4x5 and 1x1"),
    "output": (lambda x: x.flatten(1), "gives flattened maps of 6 channels and 4x5"),
    "output by view": (lambda x: F.relu(x.view(x.shape[0], -1)), "gives flattened maps"),
    "vector and map": (lambda x: x.mean((2, 3)) + x, r"gives a tensor of shape|combines|fails"),
    "mean of a flat one": (lambda x: x.flatten(1).mean(1), "averages over dimensions"),
}


@pytest.mark.parametrize("name", FLAT)
def test_flattened_maps_are_refused_where_torchs_order_of_values_counts(name):
    function, words = FLAT[name]

    class Tail(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 6, 3, stride=3, padding=1)

        def forward(self, x):
            return function(self.stem(x))

    with pytest.raises(ExportError, match=words):
        pack(Tail(), **{**DATA, "image_size": (12, 15)})


def test_what_reads_flattened_maps_by_weights_gives_torchs_numbers():
    torch.manual_seed(1)
    stem = nn.Conv2d(3, 6, 3, stride=3)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = stem, nn.Linear(2 * 6 * 4 * 3, 5)

        def forward(self, x):
            x = self.stem(x)
            return self.head(torch.cat([x.flatten(1), F.relu(x).flatten(1)], 1))

    assert_same(Two())
    assert_same(nn.Sequential(stem, nn.Flatten(), nn.PReLU(), nn.Linear(72, 4), nn.Softmax(1)))


# -- options


@pytest.mark.parametrize(
    "options, words",
    [
        ({"mean": 128.0}, "mean: got .* expected 0 to 1"), ({"std": 64.0}, "std: got .* at most 1"),
        ({"mean": -0.1}, "expected 0 to 1"), ({"classes": 5}, "classes: got 5, expected a list"),
        ({"classes": "abc"}, "classes: got 'abc'"), ({"channels": 0}, "channels: got 0"),
                ({"channels": 1}, "fails on an image of 1x12x10"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_are_one_line(options, words, capfd, tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(BnnfreeError, match=words) as caught:
        export(net, tmp_path / "m.bnnf", **{**DATA, **options})
    assert "\n" not in str(caught.value) and capfd.readouterr().err == "" and list(tmp_path.iterdir()) == []


def test_no_classes_and_an_unknown_option():
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert pack(net, **DATA, classes=None).model.classes == []
    with pytest.raises(TypeError, match="size"):
        export(net, "never.bnnf", size=32)


@pytest.mark.parametrize(
    "layer, words",
    [
        (nn.Mish(), "Use ReLU, PReLU"), (nn.Softplus(), "SiLU, GELU or ELU"), (nn.LogSoftmax(1), "Return the logits"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_a_refusal_names_a_remedy_that_helps(layer, words):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), layer, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ExportError, match=words) as caught:
        pack(net, **DATA)
    assert "Did you mean" not in str(caught.value) and "has no engine op. " in str(caught.value)


CALLS = {
    "one channel": (lambda x: x[:, 1], "takes a part of an activation.*Slices of channels"),
    "a slice of images": (lambda x: x[:1], "takes a part of an activation|gives a tensor of shape|computes something"),
    "chunks of rows": (lambda x: torch.chunk(x, 2, 2)[0], r"divides dimension 2, expected the channels"),
    "unpacked": (lambda x: (lambda a, b: a + b)(*torch.chunk(x, 2, 1)), r"test_export_same\.py:\d+.*unpacks"),
    "a product": (lambda x: x.mean((2, 3), True) * x.mean(1, True), r"of 1x1x3 and \d+x\d+x1 by mul|by mul"),
    "max": (lambda x: torch.max(x), "takes a maximum"),
    "max of two": (lambda x: torch.maximum(x, -x), "takes a maximum"),
    "floor": (lambda x: x // 2, "divides an activation without a rest"),
    "by the image": (lambda x: x if x.mean() > 0 else -x, "decides by a value of the image"),
    "alpha": (lambda x: torch.add(x, x, alpha=2), "has alpha"),
    "permute": (lambda x: x.permute(0, 2, 3, 1), r"a map with its channels last \(\[N, H, W, C\]\)"),
    "assert": (lambda x: (torch._assert(x.size(1) == 3, ""), x)[1], "calls eq.*Leave checks of the image"),
    "a dict": (lambda x: {"out": x}, "gives a dict, expected one tensor.*returns that tensor alone"),
    "data": (lambda x: x.data, "takes a part|cannot be traced"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_is_not_known_is_refused_by_name(name):
    function, words = CALLS[name]

    class Call(nn.Module):
        def forward(self, x):
            return function(F.relu(x))

    with pytest.raises(ExportError, match=words):
        pack(Call(), **DATA)


def test_calls_by_keyword_are_those_by_place():
    low = nn.Parameter(torch.rand(3, 1, 1) - 0.5)

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.low = low

        def forward(self, x):
            y = torch.add(input=x, other=F.relu(x))
            y = torch.clamp(torch.maximum(y, other=torch.zeros(1)), min=self.low)
            return torch.clamp(input=y, max=2.0)

    assert_same(Call())


def test_wrappers_for_training_are_taken_off():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    plain = pack(net, **DATA).model
    for wrapped in (nn.DataParallel(net), torch.compile(net), torch.compile(nn.DataParallel(net))):
        assert [op.name for op in pack(wrapped, **DATA).model.ops] == [op.name for op in plain.ops]


# -- what is written was run


def test_a_packed_model_that_is_another_is_not_written(tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), Sign(), BinaryConv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    honest = checking.to_bytes

    def falsified(model):
        weights = next(t for t in model.tensors if t.dtype == "bits" and t.place == "constant")
        weights.data = ~weights.data
        weights.data &= np.uint64(0xFF)
        return honest(model)

    monkeypatch.setattr(checking, "to_bytes", falsified)
    with pytest.raises(ExportError, match="differs from the network at .*nothing was written"):
        export(net, tmp_path / "m.bnnf", **DATA)
    assert list(tmp_path.iterdir()) == []
    export(net, tmp_path / "m.bnnf", check=False, **DATA)
    assert [path.name for path in tmp_path.iterdir()] == ["m.bnnf"]


@pytest.mark.parametrize("seed", range(3))
def test_an_untrained_network_full_of_ties_is_written(seed, tmp_path):
    """Biases are 0 and sums of an even number of signs are often 0: no sign of them may count as a difference."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 16, 3, padding=1)]
    for _ in range(4):
        layers += [RSign(16), BinaryConv2d(16, 16, 3, padding=1), RPReLU(16)]
    export(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)), tmp_path / "m.bnnf", **DATA)


def test_a_map_as_output_is_verified_position_by_position():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), RSign(8), BinaryConv2d(8, 5, 3, bias=True))
    packed = pack(net, **DATA, **FLOAT)
    report = verify(packed, packed.model, sample_images((*SIZE, 3), 8))
    assert report.equal and report.logit_error < 1e-5 and report.agreement == 1


def test_layers_that_leave_the_fast_kernels_are_named_with_reason_and_remedy():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3), Sign(), nn.AvgPool2d(2), BinaryConv2d(64, 64, 3, padding=1),
        Sign(), BinaryConv2d(64, 64, 1, groups=2), Sign(), BinaryConv2d(64, 8, 1),
    )  # fmt: skip
    pooled, grouped = pack(net, **DATA).slow
    assert (
        pooled.startswith("3: ") and "(2)" in pooled and "float convolution" in pooled and "right before it" in pooled
    )
    assert grouped.startswith("5: ") and "2 groups" in grouped
    plain = nn.Sequential(nn.Conv2d(3, 64, 3), Sign(), BinaryConv2d(64, 64, 3), BinaryConv2d(64, 8, 1))
    assert pack(plain, **DATA).slow == []  # real inputs, as shortcuts have them


# -- at random


class Block(nn.Module):
    """A residual block as torchvision writes it, with one layer for all its activations, changed in place."""

    def __init__(self, random, width):
        super().__init__()
        self.relu = [nn.ReLU(inplace=True), nn.LeakyReLU(0.1, True), nn.Hardtanh(inplace=True)][random.randint(3)]
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.sign = RSign(width)
        self.conv1, self.conv2 = BinaryConv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1, bias=False)
        self.order, self.join, self.odd = random.randint(4), random.randint(3), random.randint(16)

    def forward(self, x):
        identity = x
        if self.order == 0:
            x = self.relu(x)  # the identity too
        out = self.norm1(self.conv1(self.sign(x)))
        if self.order == 1:
            out = self.relu(out)
        elif self.order == 2:
            self.relu(out)
        out = self.norm2(self.conv2(out))
        if self.odd == 0:
            out[:, :2].mul_(0.5)
        elif self.odd == 1:
            out = torch.cat([out[:, :2], out[:, 2:]], 1)
        elif self.odd == 2:
            out.view(out.size(0), -1).clamp_(-1, 1)
        if self.join == 0:
            out += identity
        elif self.join == 1:
            out = out.add_(identity)
        else:
            identity += out
            out = identity
        return self.relu(out)


class Whole(nn.Module):
    def __init__(self, seed):
        super().__init__()
        random = np.random.RandomState(seed)
        torch.manual_seed(seed)
        width = int(random.choice([6, 8, 13]))
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        first = Block(random, width)
        self.blocks = nn.Sequential(first, *[Block(random, width) for _ in range(random.randint(3))])
        self.again = first if random.randint(2) else nn.Identity()  # a module in two places
        self.drop, self.head = nn.Dropout(0.2, inplace=True), nn.Linear(width, 4)

    def forward(self, x):
        x = self.again(self.blocks(self.stem(x)))
        return self.head(self.drop(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)))


def shaken(net, seed):
    """Off its start, so that no sum is 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*net.named_parameters(), *net.named_buffers()):
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(0.5 + noise if name.endswith("var") else tensor + 0.2 * (noise - 0.5))
    return net


@pytest.mark.parametrize("seed", range(24))
def test_networks_in_torchvisions_style_are_exported_right_or_refused_by_name(seed, tmp_path):
    net = shaken(Whole(seed), seed)
    views = any(block.odd in (0, 2) for block in net.blocks)
    try:
        export(net, tmp_path / "m.bnnf", **DATA, **FLOAT)
    except ExportError as error:
        assert views and re.search(r"test_export_same\.py:\d+", str(error)), error
        return
    assert not views
    assert_same(net)


def test_most_of_the_networks_at_random_are_exported():
    odd = [any(block.odd in (0, 2) for block in Whole(seed).blocks) for seed in range(24)]
    assert 3 <= sum(odd) <= 18
    check_packed(pack(shaken(Whole(odd.index(False)), 0), **DATA))
