"""Networks as users write them: exported with their own numbers, or refused by one line that names the place."""

from __future__ import annotations

import random
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_export_same import DATA, FLOAT, assert_same, pixels_and_images
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel

from bnnfree.engine import Engine
from bnnfree.errors import BnnfreeError
from bnnfree.export import ExportError, check_packed, export, mutation, pack
from bnnfree.export.own import is_own, load_own
from bnnfree.export.verify import LayerReport, Report
from bnnfree.format import to_bytes
from bnnfree.nn import BinaryConv2d, RPReLU, RSign, ScaledStdConv2d, Sign


def seeded(make):
    torch.manual_seed(0)
    return make()


def stem(**options):
    return nn.Conv2d(3, 8, 3, **options)


def tail():
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]


def net(*layers):
    return nn.Sequential(stem(), *layers, *tail())


class Body(nn.Module):
    """A network whose forward is a function of itself and the stem's map."""

    def __init__(self, body):
        super().__init__()
        self.stem, self.tail = stem(), nn.Sequential(*tail())
        self.conv, self.sign = BinaryConv2d(8, 8, 3, padding=1, bias=True), Sign()
        self.relu, self.one = nn.ReLU(inplace=True), nn.Conv2d(16, 8, 1)
        self.gain = nn.Parameter(torch.rand(8) - 0.3)
        self.register_buffer("shift", torch.rand(8))
        self.body = body

    def forward(self, x):
        return self.tail(self.body(self, self.stem(x)))


# -- the same numbers


class Init(nn.Conv2d):
    """Another constructor, the same layer."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, 3, padding=1, bias=False)

    def extra_repr(self):
        return "mine"


class Doubled(nn.ReLU):
    def forward(self, x):
        return super().forward(x) * 2


class Called(nn.ReLU):
    def __call__(self, x):
        return super().__call__(x) * 2


class UnitWeight(ScaledStdConv2d):
    """A method that the exporter calls, as forward does."""

    def unit_weight(self):
        weight, scale = super().unit_weight()
        return weight * 2, scale


class Negative(nn.Module):
    def forward(self, weight):
        return -weight


def parametrized(layer, name):
    parametrize.register_parametrization(layer, name, Negative())
    return layer


def patched(layer, forward):
    layer.forward = forward
    return layer


def hooked(layer, hook=lambda module, args, output: output * 2):
    layer.register_forward_hook(hook)
    return layer


class Options(Body):
    def forward(self, x, mask=None, *more, scale=2.0, features=False, **rest):
        x = self.stem(x) if mask is None else self.stem(x) * mask
        return x if features else self.tail(x * scale)


class Several(Body):
    def forward(self, *images):
        return self.tail(self.stem(images[0]))


class Training(Body):
    def forward(self, x):
        y = self.tail(self.stem(x))
        return (y, y) if self.training else y


def named(*names):
    return nn.Sequential(
        OrderedDict(zip(names, [stem(), nn.ReLU(True), RSign(8), BinaryConv2d(8, 8, 3), *tail()], strict=True))
    )


def dense(n, x):
    features = [x]
    features.append(n.conv(n.sign(n.relu(features[-1]) - 0.37)))
    return n.one(torch.cat(features, 1))


def swapped(n, x):
    y = x * 2
    y.add_(x)
    x.add_(y)
    return x - y * 0.3


SAME = {
    "a constructor": lambda: nn.Sequential(Init(3, 8), nn.BatchNorm2d(8), *tail()),
    "a forward": lambda: net(Doubled()),
    "a call": lambda: net(Called()),
    "a method of ours": lambda: nn.Sequential(UnitWeight(3, 8, 3), *tail()),
    "a class of ours": lambda: net(Sign(), type("Mine", (BinaryConv2d,), {})(8, 8, 3, bias=True)),
    "a forward on an object": lambda: net(patched(nn.ReLU(), lambda x: x * 2)),
    "a forward on a group": lambda: net(patched(nn.Sequential(nn.ReLU()), lambda x: x * 2)),
    "a hook on a group": lambda: net(hooked(nn.Sequential(nn.ReLU()))),
    "weight norm": lambda: nn.Sequential(parametrizations.weight_norm(stem()), *tail()),
    "spectral norm": lambda: net(parametrizations.spectral_norm(nn.Conv2d(8, 8, 1))),
    "a parametrized latent": lambda: net(Sign(), parametrized(BinaryConv2d(8, 8, 3, bias=True), "weight")),
    "a parametrized threshold": lambda: net(parametrized(RSign(8), "bias"), BinaryConv2d(8, 8, 3, bias=True)),
    "wrappers inside": lambda: net(nn.DataParallel(nn.Sequential(nn.ReLU(True))), torch.compile(nn.Conv2d(8, 8, 1))),
    "averaged weights": lambda: AveragedModel(net(nn.ReLU())),
    "half": lambda: net(nn.ReLU(True)).half(),
    "bfloat16": lambda: net(RSign(8), BinaryConv2d(8, 8, 3)).bfloat16(),
    "double": lambda: net(nn.ReLU(True)).double(),
    "channels last": lambda: net(nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2)).to(memory_format=torch.channels_last),
    "training mode": lambda: net(nn.BatchNorm2d(8), nn.Dropout(0.5, True)).train(),
    "two outputs in training": lambda: Training(None),
    "options": lambda: Options(None),
    "several": lambda: Several(None),
    "a traced graph": lambda: torch.fx.symbolic_trace(net(nn.ReLU(True))),
    "a layer alone": lambda: stem(),
    "a binary layer alone": lambda: BinaryConv2d(3, 8, 3, bias=True),
    "an activation alone": lambda: nn.ReLU(inplace=True),
    "names of fx": lambda: named("image", "output", "inner", "input", "add", "x", "1a"),
    "names": lambda: named("a-b", "ü", "a#2", "a", "__", "f", "forward1"),
    "nested": lambda: net(nn.Sequential(nn.Sequential(), nn.Sequential(nn.Sequential(nn.ReLU(True))))),
    "a clone": lambda: Body(lambda n, x: (lambda y: n.relu(x) + y)(x.clone())),
    "a gain": lambda: Body(lambda n, x: x * n.gain.view(1, -1, 1, 1) + n.shift[None, :, None, None]),
    "a computed gain": lambda: Body(lambda n, x: x * (n.gain.abs() * 2).view(-1, 1, 1)),
    "a computed number": lambda: Body(lambda n, x: x * F.softplus(n.gain.mean())),
    "a shape of a gain": lambda: Body(lambda n, x: x * n.gain.view(1, n.gain.shape[0], 1, 1)),
    "bounds": lambda: Body(lambda n, x: x.clamp(min=n.gain.view(-1, 1, 1), max=n.gain.view(-1, 1, 1) + 1)),
    "a part of slopes": lambda: Body(lambda n, x: F.prelu(x, n.gain[:1])),
    "keywords": lambda: Body(lambda n, x: n.conv(x=n.sign(x=n.relu(input=x) - 0.37))),
    "axis": lambda: Body(lambda n, x: n.one(torch.concat((x, x * 2), axis=1))),
    "a list that grows": lambda: Body(dense),
    "changed by each other": lambda: Body(swapped),
    "a joined value changed": lambda: Body(lambda n, x: n.one(torch.cat([x, x.relu_()], 1))),
    "a sum of a list": lambda: Body(lambda n, x: sum([x, x * 2, n.conv(n.sign(x - 0.37))])),
    "signs changed after use": lambda: Body(lambda n, x: (lambda s: n.conv(s) + s.mul_(2))(n.sign(x - 0.37))),
    "attributes set": lambda: Body(lambda n, x: (setattr(n, "last", x), x)[1]),
    "checkpointed": lambda: Body(
        lambda n, x: torch.utils.checkpoint.checkpoint(n.conv, n.sign(x - 0.37), use_reentrant=False)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_what_users_write_gives_the_same_numbers(name):
    made = seeded(SAME[name])
    assert_same(made.float() if name in ("half", "bfloat16", "double") else made)


def test_precisions_of_training_are_taken_as_float32():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        rounded = seeded(lambda: net(nn.ReLU(True))).to(dtype)
        assert to_bytes(pack(rounded, **DATA).model) == to_bytes(pack(rounded.float(), **DATA).model)


def test_activations_have_names_of_their_own():
    made = seeded(lambda: named("c", "r", "s", "a#2", "p", "f", "a"))
    twice = Body(lambda n, x: getattr(n, "relu#2")(n.relu(n.relu(x * 2) - 0.1)))
    twice.add_module("relu#2", nn.Conv2d(8, 8, 1))
    for model in (pack(made, **DATA).model, pack(twice, **DATA).model):
        names = [tensor.name for tensor in model.tensors if tensor.place == "activation"]
        assert len(set(names)) == len(names)
    check_packed(pack(twice, **DATA))


@pytest.mark.parametrize("mode", ["inference", "autocast", "float64", "bfloat16", "meta"])
def test_modes_of_torch_change_nothing(mode, tmp_path):
    made = seeded(lambda: net(nn.ReLU(True), RSign(8), BinaryConv2d(8, 8, 3, bias=True), RPReLU(8)))
    expected = to_bytes(pack(made, **DATA).model)
    modes = {"inference": torch.inference_mode, "meta": lambda: torch.device("meta")}
    before = torch.get_default_dtype()
    try:
        if mode in ("float64", "bfloat16"):
            torch.set_default_dtype(getattr(torch, mode))
        with modes[mode]() if mode in modes else torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            got = to_bytes(export(made, tmp_path / "m.bnnf", **DATA).model)
        assert torch.get_default_dtype() == (getattr(torch, mode) if mode in ("float64", "bfloat16") else before)
    finally:
        torch.set_default_dtype(before)
    assert got == expected


def test_weights_of_inference_mode_export():
    with torch.inference_mode():
        made = seeded(lambda: net(nn.ReLU(True)))
    check_packed(pack(made, **DATA))


# -- refused by name


class Forward(BinaryConv2d):
    def linear(self, x, weight, bias):
        return super().linear(x, weight, bias) * 2


class Compared(RSign):
    def compared(self, x):
        return super().compared(x) * -1


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.tail = [stem()], nn.Sequential(*tail())

    def forward(self, x):
        return self.tail(self.layers[0](x))


class Stays(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(True)


class Two(Body):
    def forward(self, x, y):
        return self.tail(self.stem(x) + y)


class Scripted(nn.Module):
    def forward(self, x):
        return F.relu(x)


def with_variance(value, eps):
    norm = nn.BatchNorm2d(8, eps=eps)
    norm.running_var.fill_(value)
    return net(norm)


def with_lock():
    made = net()
    made.lock = __import__("threading").Lock()
    return made


def in_bfloat16(n, x):
    with torch.autocast("cpu", torch.bfloat16):
        return n.one(torch.cat([x, x], 1)).float()


REFUSED = {
    "a class": (lambda: Body, "got the class Body, expected a torch module.*Make one of it"),
    "a name": (lambda: "net.pt", "got a str, expected a torch module"),
    "weights": (lambda: net().state_dict(), "Load these weights into their network"),
    "nothing": (lambda: None, "got a NoneType"),
    "scripted": (lambda: torch.jit.script(Scripted()), "network: got a scripted"),
    "scripted inside": (lambda: net(torch.jit.script(Scripted())), "export: 1: got a scripted"),
    "meta": (lambda: net().to("meta"), r"0\.weight: has no values"),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(8, 3), *tail()), r"0\.weight: has no shape yet. Run the network"),
    "a lock": (with_lock, "cannot be copied"),
    "old weight norm": (lambda: nn.Sequential(hooked(stem()), *tail()), r"layer 0 \(Conv2d\) has forward hooks"),
    "pruned": (lambda: net(prune.l1_unstructured(nn.Conv2d(8, 8, 1), "weight", 0.5)), "prune.remove"),
    "a hook on the head": (lambda: nn.Sequential(stem(), *tail()[:2], hooked(nn.Linear(8, 4))), "layer 3.*hooks"),
    "a hook on the whole": (lambda: hooked(net()), "a hook or a __call__ of the whole network"),
    "a changed layer": (lambda: net(Sign(), Forward(8, 8, 3)), r"layer 2 \(Forward\) is a BinaryConv2d with linear of"),
    "a changed sign": (lambda: net(Compared(8), BinaryConv2d(8, 8, 3)), "with compared of its own.*plain RSign"),
    "a forward on a layer": (
        lambda: net(Sign(), patched(BinaryConv2d(8, 8, 3), lambda x: x)), "layer 2.*forward of its own"),
    "a plain list": (Plain, r"nn\.ModuleList"),
    "a norm in training": (lambda: net(Stays(8)), "changes its 1.num_batches_tracked"),
    "two inputs": (lambda: Two(None), "takes 2 inputs, expected one"),
    "indices": (lambda: nn.Sequential(stem(), nn.MaxPool2d(2, return_indices=True)), "gives no tensor"),
    "a size": (lambda: Body(lambda n, x: x / x.shape[0]), "computes with a size of its input"),
    "a branch on a size": (lambda: Body(lambda n, x: x if x.shape[2] > 3 else -x), "counts by its size"),
    "a keyword in names": (lambda: nn.Sequential(OrderedDict([("class", stem())])), "torch.fx cannot write .'class'"),
    "a line in names": (lambda: nn.Sequential(OrderedDict([("a\nb'", stem())])), "torch.fx cannot write"),
    "a negative variance": (lambda: with_variance(-1.0, 1e-5), "layer 1 gives NaN or infinity"),
    "a variance of 0": (lambda: with_variance(0.0, 0.0), "layer 1 gives NaN or infinity"),
    "infinite": (lambda: Body(lambda n, x: x / 0), r"test_export_users\.py:\d+ gives NaN or infinity"),
    "random": (lambda: Body(lambda n, x: x + torch.randn(8, 1, 1)), "random numbers"),
    "autocast": (lambda: Body(in_bfloat16), "autocast"),
    "data": (lambda: Body(lambda n, x: (x.data.add_(1), x)[1]), r"\.data"),
    "numpy": (lambda: Body(lambda n, x: x * np.ones((8, 1, 1), np.float32)), "a tensor that is a buffer"),
    "torch.sign": (lambda: Body(lambda n, x: n.conv(torch.sign(x))), "Use bnnfree.nn.Sign"),
    "to": (lambda: Body(lambda n, x: x.to(n.gain.dtype)), "what is exported is float32"),
    "conv2d": (lambda: Body(lambda n, x: F.conv2d(x, n.one.weight[:, :8])), r"Use the layer: nn\.Conv2d"),
    "filled": (lambda: Body(lambda n, x: (x * 2).zero_() + x), "Write it without the change"),
    "a mask": (lambda: Body(lambda n, x: x * (x != 0)), "calls ne"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exported_is_one_line_with_the_place(name, tmp_path):
    make, words = REFUSED[name]
    with pytest.raises(ExportError, match=words) as caught:
        export(seeded(make), tmp_path / "m.bnnf", **DATA)
    assert str(caught.value).startswith("export: ") and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options, words",
    [
        ({"std": "abc"}, "std: got 'abc'"), ({"mean": "0.5"}, "mean: got '0.5'"), ({"mean": [0.1, "x", 0.2]}, "mean: "),
        ({"mean": [0.1, [0.2], 0.3]}, "mean: got"), ({"mean": 1j}, "mean: got 1j"), ({"channels": True}, "channels: "),
        ({"image_size": (True, 3)}, "image_size: got"), ({"image_size": (10**6, 10**6)}, "expected at most"),
        ({"stem": ["int8"]}, "stem: got"), ({"classes": b"abcd"}, "classes: got b'abcd'"),
        ({"classes": ["a", "b", "c", b"d"]}, "classes: got b.d., expected names that are texts"),
    ],
)  # fmt: skip
def test_odd_options_are_one_line(options, words, tmp_path):
    with pytest.raises(BnnfreeError, match=words) as caught:
        export(net(), tmp_path / "m.bnnf", **{**DATA, **options})
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_whole_numbers_of_numpy_are_numbers_and_no_name_is_no_file():
    sizes = (np.int64(12), np.int32(10))
    made = seeded(net)
    ours = pack(made, **{**DATA, "image_size": sizes}, channels=np.int64(3)).model
    assert to_bytes(ours) == to_bytes(pack(made, **DATA).model)
    with pytest.raises(BnnfreeError, match="expected the name of a file"):
        export(made, "", **DATA)


# -- networks by name

OWN = """
import json, torch
from torch import nn
from beside_it import WIDTH
def build():
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3))
net, five = build(), 5
def fails(): raise OSError("weights.pt")
def needs(n): return build()
"""


def test_networks_of_a_file_are_found_by_name_and_its_errors_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    (tmp_path / "json.py").write_text(OWN)  # a name that another module has
    (tmp_path / "beside_it.py").write_text("WIDTH = 7\n")
    (tmp_path / "torn.py").write_text("import no_such_thing\n")
    file = f"{tmp_path}/json.py"
    assert load_own(f"{file}:build")[0].out_channels == load_own(f"{file}:net")[0].out_channels == 7
    assert is_own("a.py") and is_own("a.py:b") and not is_own("a.yaml") and not is_own("runs/x")
    for source, words in {
        file: "expected FILE.py:NAME", f"{file}:a.b": "expected FILE.py:NAME", f"{file}:five": "gives a int",
        f"{file}:fails": r"raises OSError at .*json\.py:8 \(weights\.pt\)", f"{file}:needs": "takes no arguments",
        f"{file}:bild": "Did you mean 'build'", f"{tmp_path}/torn.py:a": r"raises ModuleNotFoundError at .*torn\.py:1",
        f"{tmp_path}/none.py:a": "no such file",
    }.items():  # fmt: skip
        with pytest.raises(BnnfreeError, match=words) as caught:
            load_own(source)
        assert "\n" not in str(caught.value)


# -- at random


class Statements(nn.Module):
    """Some statements drawn by chance on a pool of maps, which share memory in all ways and are changed in place."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.seed, self.stem, self.sign, self.rsign = seed, nn.Conv2d(3, 8, 3, padding=1), Sign(), RSign(8)
        self.convs = nn.ModuleList([BinaryConv2d(8, 8, 3, padding=1, bias=True) for _ in range(2)])
        self.norm, self.prelu, self.rprelu = nn.BatchNorm2d(8), nn.PReLU(8), RPReLU(8)
        self.relu, self.leaky, self.hard = nn.ReLU(True), nn.LeakyReLU(0.3, True), nn.Hardtanh(-0.7, 0.8, True)
        self.drop, self.empty, self.gain = nn.Dropout(0.5, True), nn.Sequential(), nn.Parameter(torch.rand(8, 1, 1))
        with torch.no_grad():
            for tensor in (self.norm.weight, self.norm.running_mean, self.rsign.bias):
                tensor.copy_(torch.randn(8) * 0.5)
        self.requires_grad_(False)

    def forward(self, x):
        chance = random.Random(self.seed)
        pool = [self.stem(x)]
        for _ in range(chance.randint(3, 9)):
            chance.choice(STATEMENTS)(
                self, pool, chance.choice(pool), chance.choice(pool), chance.choice((0.5, -0.5, 2.0))
            )
        out = pool[-1]
        for value in chance.sample(pool, min(len(pool), 3)):
            out = out + value
        return out.mean((2, 3))


def _iadd(n, pool, a, b, c):
    a += b


STATEMENTS = [
    lambda n, pool, a, b, c: pool.append(n.relu(a)), lambda n, pool, a, b, c: n.leaky(a),
    lambda n, pool, a, b, c: n.hard(a), lambda n, pool, a, b, c: a.add_(b), lambda n, pool, a, b, c: a.mul_(c),
    lambda n, pool, a, b, c: a.mul_(n.gain), lambda n, pool, a, b, c: a.sub_(b), _iadd,
    lambda n, pool, a, b, c: a.clamp_(-0.8, 0.9), lambda n, pool, a, b, c: F.leaky_relu_(a, 0.2),
    lambda n, pool, a, b, c: F.relu(a, inplace=True), lambda n, pool, a, b, c: torch.add(a, b, out=a),
    lambda n, pool, a, b, c: pool.append(a + b), lambda n, pool, a, b, c: pool.append(a * c),
    lambda n, pool, a, b, c: pool.append(n.convs[c > 0](n.sign(a - 0.3713))), lambda n, pool, a, b, c: pool.append(-a),
    lambda n, pool, a, b, c: pool.append(n.convs[c > 0](n.rsign(a))), lambda n, pool, a, b, c: pool.append(n.norm(a)),
    lambda n, pool, a, b, c: pool.append(n.empty(a)), lambda n, pool, a, b, c: pool.append(n.drop(a)),
    lambda n, pool, a, b, c: pool.append(a.view(a.shape)), lambda n, pool, a, b, c: pool.append(a.detach()),
    lambda n, pool, a, b, c: pool.append(a.clone()), lambda n, pool, a, b, c: pool.append(a.contiguous()),
    lambda n, pool, a, b, c: pool.append(F.max_pool2d(a, 3, 1, 1)), lambda n, pool, a, b, c: pool.append(n.prelu(a)),
    lambda n, pool, a, b, c: pool.append(n.rprelu(a)), lambda n, pool, a, b, c: pool.append(n.rsign(a)),
    lambda n, pool, a, b, c: a[:, :3].mul_(c),
]  # fmt: skip


def test_statements_at_random_give_the_same_numbers_or_the_line_that_changes_a_part():
    refused = 0
    pixels, images = pixels_and_images()
    assert not images.is_contiguous()  # of these contiguous() is a copy, of those that are traced the same memory
    for seed in range(40):
        made = Statements(seed).eval()
        try:
            packed = pack(made, **DATA, **FLOAT)
        except ExportError as error:
            assert re.search(r"_users\.py:\d+ reads (another view|what is the same)", str(error)), (seed, error)
            refused += 1
            continue
        with torch.no_grad():
            expected = made(images.clone()).numpy()
        got = Engine(packed.model).run(pixels)
        assert np.abs(got - expected).max() <= 1e-3 * np.abs(expected).max(), seed
    assert 1 <= refused <= 20


def test_lines_of_packages_beside_torch_are_the_users():
    """A package whose folder begins with torch's name, as torchvision's does."""
    beside = mutation.NOT_THE_USERS[0].rstrip("/\\") + "vision/net.py"
    node = torch.fx.symbolic_trace(nn.ReLU()).graph.output_node()
    node.stack_trace = f'File "{beside}", line 7, in forward'
    assert mutation.line_of(node) == f"{beside}:7"


def test_ties_are_explained_where_they_are_counted():
    report = Report(4, 1.0, 0.9, 0.0, torch_layers=[LayerReport("a", "bits", ties=2)])
    assert "rounding decides; they count as equal" in report.table()
    report.torch_layers[0].ties = 0
    assert "rounding decides" not in report.table()
