"""The price of a normaliser: float operations by the format's words, bytes that autograd saves, the table of both."""

import json
import math
import re

import numpy as np
import pytest
import torch
from helpers import ROOT
from packed import Net, fields_of, options_of
from test_tools import tool  # noqa: F401
from torch import nn

from bnnfree.analysis.memory import saved_bytes, saved_per_image
from bnnfree.bench.costs import float_ops, op_counts
from bnnfree.errors import BnnfreeError
from bnnfree.export import pack_network
from bnnfree.format import PackedModel
from bnnfree.format.schema import CONVOLUTIONS, OPS, POOLINGS
from bnnfree.models import MODELS
from bnnfree.train import open_source


def model_of(net: Net) -> PackedModel:
    """The ops so far, whether or not anything reads what they write."""
    return PackedModel(net.tensors, net.ops, 0, 0)


def more(net: Net, add) -> int:
    """Number of float operations of the ops that `add(net)` appends."""
    before = float_ops(model_of(net))
    add(net)
    return float_ops(model_of(net)) - before


def test_float_operations_are_those_that_the_format_writes_down():
    net = Net(5, 7, 3)
    x = net.real(6)
    assert float_ops(model_of(net)) == 5 * 7 * 6 * 2, "pixel_conv2d: scale and bias; its sums are whole numbers"
    values = 5 * 7 * 6
    assert more(net, lambda n: n.add("pointwise", x, parts=("scale", "slope", "low"))) == values * 4
    assert more(net, lambda n: n.add("max_pool2d", x, **fields_of((3, 3), padding=(1, 1)))) == values * 9
    assert more(net, lambda n: n.add("avg_pool2d", x, **fields_of((2, 2), (2, 2)))) == 2 * 3 * 6 * 5
    conv = fields_of((3, 3), padding=(1, 1))
    assert more(net, lambda n: n.add("conv2d", x, outputs=4, parts=("bias",), **conv)) == 5 * 7 * 4 * (2 * 9 * 6 + 1)
    groups = more(net, lambda n: n.add("group_norm", x, groups=2))
    assert groups == values * 5 + 2 * 5
    assert more(net, lambda n: n.add("rms_norm", x, groups=6, parts=("scale", "bias"))) == values * 5 + 6 * 4


@pytest.mark.parametrize(("threshold", "parts", "each"), [("i32", (), 0), (None, (), 0), ("f32", ("scale",), 2)])
def test_a_bit_from_a_whole_number_is_no_float_operation(threshold, parts, each):
    net = Net(5, 7, 3)
    bits = net.add("pointwise", net.real(6), writes="bits", threshold="f32")
    fields = fields_of((3, 3), padding=(1, 1))

    def add(n):
        n.add("binary_conv2d", bits, outputs=9, writes="bits", threshold=threshold, parts=parts, **fields)

    assert more(net, add) == each * 5 * 7 * 9


def test_every_op_of_the_format_is_counted():
    """A new op must say what it costs: this fails until bnnfree/bench/costs.py knows it."""
    for name, op in OPS.items():
        net = Net(4, 4, 3)
        x = net.real(8)
        source = {"u8": 0, "bits": None, "f32": x}[op.inputs[0]]
        source = net.add("pointwise", x, writes="bits", threshold="f32") if source is None else source
        fields = fields_of((2, 2)) if name in CONVOLUTIONS + POOLINGS else {}
        fields |= {"outputs": 8} if name in CONVOLUTIONS else options_of(net, name, source, np.random.default_rng(0))
        net.add(name, source, **fields)
        assert float_ops(model_of(net)) >= 0 and op_counts(model_of(net))[name] >= 1
    net.ops[-1].name = "invented"
    with pytest.raises(BnnfreeError, match="'invented', whose operations nobody has counted yet"):
        float_ops(model_of(net))


def test_saved_bytes_are_what_the_backward_pass_needs_each_storage_once():
    images, labels = torch.randn(3, 2, 5, 5), torch.tensor([0, 1, 1])
    linear = nn.Sequential(nn.Flatten(), nn.Linear(50, 4))
    # the input (flattened: the same storage) and log-probabilities; weights and labels' int64 aside
    base = saved_bytes(linear, images, labels)
    assert base >= images.nbytes + 3 * 4 * 4 and base < images.nbytes + 3 * 4 * 4 + 100
    exp = nn.Sequential(nn.Flatten(), nn.Linear(50, 4), nn.Sigmoid())
    assert saved_bytes(exp, images, labels) == base + 3 * 4 * 4, "a sigmoid saves its output"
    square = nn.Sequential(nn.Flatten(), nn.Linear(50, 4), nn.Identity())
    assert saved_bytes(square, images, labels) == base
    assert all(p.grad is None for p in linear.parameters())


def test_what_grows_with_the_batch_is_told_from_what_does_not():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 18))

        def forward(self, x):
            return nn.functional.linear(x.flatten(1), self.weight.exp())

    each, fixed = saved_per_image(Scaled(), (2, 3, 3), 4)
    assert fixed >= 4 * 18 * 4, "the weights' exponentials, once"
    assert 18 * 4 <= each <= 18 * 4 + 4 * 4 + 16


@pytest.mark.parametrize("norm", ["none", "bn", "gn"])
def test_a_normaliser_that_folds_leaves_no_operation(norm):
    overrides = [f"model.norm={norm}", "model.width=0.25", "data.name=fake", "data.image_size=16"]
    models = [
        pack_network(open_source(ROOT / "recipes" / "cifar10_reactnet20.yaml", MODELS, [*overrides, *more])).model
        for more in ([], ["model.norm=none"])
    ]
    found, base = map(float_ops, models)
    assert (found == base) == (norm != "gn") and found >= base


def test_the_table_has_every_normaliser_asked_for_and_the_reason_where_there_is_no_figure(tool, tmp_path, monkeypatch):  # noqa: F811
    import bnnfree.export

    whole = bnnfree.export.pack_network

    def refuse(network, **options):
        if network.recipe.model.norm == "bn":
            raise BnnfreeError("bn: cannot be exported, say.")
        return whole(network, **options)

    monkeypatch.setattr(bnnfree.export, "pack_network", refuse)
    recipe, shrunk = ROOT / "recipes" / "cifar10_reactnet20.yaml", ["model.width=0.25", "data.image_size=8"]
    options = ["--norms", "none", "bn", "--batch", "4", "--seconds", "0.2", "--out", tmp_path / "price"]
    code, text, errors = tool("price", recipe, *shrunk, *options)
    assert code == 0, errors
    none, bn = (re.split(r" *\| *", line)[1:-1] for line in text.splitlines()[2:4])
    assert none[0] == "none" and "-" not in none and none[4] == "none" and none[-1] == ""
    assert bn[0] == "bn" and bn[1:6] == ["-"] * 5 and bn[-1] == "not exported: bn: cannot be exported, say."
    report = json.loads((tmp_path / "price" / "price.json").read_text())
    rows = {row["norm"]: row for row in report["norms"]}
    assert rows["none"]["constant_bytes"] < rows["none"]["file_bytes"] and rows["none"]["engine"]["median_ms"] > 0
    step = rows["bn"]["train"]
    assert math.isclose(step["images_per_second"], 4e3 / step["median_ms"])
    assert rows["bn"]["saved_bytes_per_image"] > rows["none"]["saved_bytes_per_image"] > 0
    assert text.splitlines()[-1] == str(tmp_path / "price") and (tmp_path / "price" / "price.md").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--norms", "bm"], "--norms: got 'bm'"), (["--seconds", "0"], "--seconds: got 0"), (["--batch", "0"], "--batch"),
     (["model.nrom=bn"], "Did you mean 'model.norm'?")],
)  # fmt: skip
def test_a_wrong_word_is_one_error_or_stands_in_every_row(tool, tmp_path, arguments, said):  # noqa: F811
    code, _, errors = tool("price", ROOT / "recipes" / "cifar10_reactnet20.yaml", *arguments, "--out", tmp_path / "out")
    assert code == 2 and said in errors and not (tmp_path / "out").exists()


@pytest.fixture(autouse=True)
def one_thread():
    """Keep the tests from competing with each other for cores."""
    torch.set_num_threads(1)
