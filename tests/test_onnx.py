"""The ONNX graph of a packed model is the model: ONNX Runtime computes what the engine does."""

import itertools
import json
import sys

import numpy as np
import pytest
import torch
from packed import GEOMETRIES, PARTS, Net, fields_of, images, random_net
from torch import nn

from bnnfree import ops
from bnnfree.engine import Engine
from bnnfree.errors import BnnfreeError
from bnnfree.export import pack
from bnnfree.export.onnx import OPS, to_onnx, write_onnx
from bnnfree.format import schema
from bnnfree.nn import BinaryConv2d, RSign

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def session(graph):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph.SerializeToString(), options, ["CPUExecutionProvider"])


def inner(model, pixels):
    """The graph of `model` checked and run: every activation by its name, as the engine traces it; and the logits."""
    graph = to_onnx(model)
    onnx.checker.check_model(graph, full_check=True)
    names = [value.name for value in graph.graph.value_info]
    graph.graph.output.extend(graph.graph.value_info)
    logits, *values = session(graph).run(["logits", *names], {"image": pixels})
    return {name: value.transpose(0, 2, 3, 1) for name, value in zip(names, values, strict=True)}, logits


def close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * max(1e-3, np.abs(wanted).max(initial=0)))


def agree(model, count=3, seed=0, ties=0.0):
    """ONNX Runtime gives the engine's activations; up to the share `ties` of the signs may be others."""
    pixels = images(model, count, seed)
    trace = Engine(model).trace(pixels)
    got, logits = inner(model, pixels)
    for tensor in model.tensors:
        if tensor.place != "activation":
            continue
        wanted = trace[tensor.name]
        if tensor.dtype == "bits":
            signs = ops.signs(ops.unpack_bits(wanted, tensor.shape[2]))
            assert set(np.unique(got[tensor.name])) <= {1, -1}
            assert (got[tensor.name] != signs).mean() <= ties, tensor.name
        else:
            close(got[tensor.name], wanted)
    close(logits, Engine(model).run(pixels))


def test_every_op_of_the_format_is_known():
    assert OPS.keys() == schema.OPS.keys()


@pytest.mark.parametrize("channels", [1, 3, 31, 33, 65])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolutions(geometry, channels):
    height, width, *window = geometry
    net = Net(height, width, channels, channels)
    bits, real = net.bits(channels), net.real(channels)
    net.add("pixel_conv2d", 0, outputs=4, **fields_of(*window))
    for pad_value in (0, 1, -1):
        options = {"outputs": 3, "pad_value": pad_value, **fields_of(*window)}
        net.add("binary_conv2d", bits, **options)
        net.add("conv2d", real, weights=("f32", "i8", "bits")[pad_value], **options)
    agree(net.model())


@pytest.mark.parametrize(("channels", "outputs", "groups"), [(2, 2, 2), (66, 4, 2), (9, 6, 3), (5, 5, 5)])
@pytest.mark.parametrize("geometry", GEOMETRIES[3::3])
def test_groups(geometry, channels, outputs, groups):
    height, width, *window = geometry
    net = Net(height, width, 3, channels)
    bits, real = net.bits(channels), net.real(channels)
    for pad_value in (0, -1):
        options = {"outputs": outputs, "groups": groups, "pad_value": pad_value, **fields_of(*window)}
        net.add("binary_conv2d", bits, **options)
        net.add("conv2d", real, **options)
    agree(net.model())


@pytest.mark.parametrize("ceil", [0, 1])
@pytest.mark.parametrize(
    "geometry",
    [
        (5, 7, (2, 2), (2, 2), (0, 0), (1, 1)),
        (7, 5, (3, 3), (2, 2), (1, 1), (1, 1)),
        (4, 6, (3, 2), (3, 3), (0, 0), (1, 1)),
        (5, 6, (1, 1), (3, 2), (0, 0), (1, 1)),
        (2, 3, (2, 2), (2, 2), (1, 1), (1, 1)),
        (7, 8, (2, 3), (2, 3), (1, 1), (2, 2)),
        (9, 6, (3, 2), (2, 1), (1, 1), (2, 4)),
        (4, 5, (4, 5), (1, 1), (0, 0), (1, 1)),
        (5, 5, (2, 2), (3, 3), (1, 0), (1, 2)),
    ],
)
def test_poolings(geometry, ceil):
    height, width, *window = geometry
    net = Net(height, width, 3)
    real = net.real(33)
    ends = [net.add(name, real, ceil=ceil, **fields_of(*window)) for name in ("max_pool2d", "avg_pool2d")]
    agree(net.model(net.add("softmax", net.add("concat", ends[0], other=ends[1]))))


def test_epilogues_in_every_subset():
    """Whole numbers: the sums are exact, so that every sign is."""
    for parts in itertools.chain.from_iterable(itertools.combinations(PARTS, n) for n in range(len(PARTS) + 1)):
        net = Net(3, 2, 3, len(parts), "whole")
        other, source = net.real((6, 3, 2)[len(parts) % 3]), net.bits(7)
        made = net.add("binary_conv2d", source, outputs=6, parts=parts, other=other, writes="both", threshold="f32",
                       flip=True, **fields_of((1, 1)))  # fmt: skip
        net.add("pointwise", made, parts=parts, other=other, writes="bits", flip=True)
        net.add("pointwise", made, writes="bits")
        net.add("pointwise", made)
        net.add("pointwise", 0, parts=("bias",), writes="bits")
        agree(net.model())


@pytest.mark.parametrize("flip", [False, True])
def test_thresholds_of_whole_sums(flip):
    net = Net(5, 3, 3)
    window = fields_of((3, 2), padding=(1, 1))
    source = net.bits(33)
    for pad_value in (0, 1):
        net.add("binary_conv2d", source, outputs=99, writes="bits", threshold="i32", flip=flip, pad_value=pad_value,
                **window)  # fmt: skip
    agree(net.model())


@pytest.mark.parametrize("name", schema.NORMS)
@pytest.mark.parametrize(("size", "channels", "groups"), [((1, 1), 6, 6), ((5, 3), 33, 3), ((4, 7), 66, 1)])
def test_norms(name, size, channels, groups):
    """One eps per group."""
    net = Net(*size, 3, channels)
    real = net.real(channels)
    made = net.add(name, real, groups=groups)
    net.add(name, real, groups=groups, parts=PARTS, other=made)
    agree(net.model())


def test_thresholds_that_float32_has_not_are_rounded_up():
    from bnnfree.export.onnx import _float_threshold

    exact = np.array([2**24, 2**24 + 1, -(2**24) - 1, 2**31 - 1, -(2**31), 0, -7], np.int32)
    assert _float_threshold(exact).tolist() == [2**24, 2**24 + 2, -(2**24), 2**31, -(2**31), 0, -7]


@pytest.mark.parametrize("seed", range(30))
def test_random_models_of_whole_numbers(seed):
    agree(random_net(seed, "whole"), seed=seed, ties=0.01)


def test_a_net_of_layers_end_to_end(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 33, 3, 2, 1), nn.BatchNorm2d(33), RSign(33), BinaryConv2d(33, 65, 3, padding=1),
                        nn.PReLU(65), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(65 * 4 * 3, 5))  # fmt: skip
    options = {"image_size": (16, 13), "mean": [0.5, 0.4, 0.3], "std": 0.25, "resize": "centre"}
    model = pack(net, classes=["a", "b", "c", "dé", "e"], **options).model
    agree(model)
    graph = to_onnx(model)
    properties = {p.key: p.value for p in graph.metadata_props}
    assert json.loads(properties.pop("classes")) == model.classes
    assert properties == model.metadata and properties["mean"] == "0.5 0.4 0.3"
    assert graph.producer_name == model.producer
    assert [(o.domain, o.version) for o in graph.opset_import] == [("", 17)]
    path = tmp_path / "deep" / "net.onnx"
    assert write_onnx(model, path) == path.stat().st_size
    assert [p.name for p in path.parent.iterdir()] == ["net.onnx"]
    run = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (image,), (logits,) = run.get_inputs(), run.get_outputs()
    assert (image.name, image.type, image.shape) == ("image", "tensor(uint8)", ["N", 16, 13, 3])
    assert (logits.name, logits.type, logits.shape) == ("logits", "tensor(float)", ["N", 5])
    for count in (1, 4):
        pixels = images(model, count)
        close(run.run(None, {"image": pixels})[0], Engine(model).run(pixels))


def test_nodes_are_called_after_the_activations_they_compute():
    net = Net(4, 3, 3)
    made = net.add("binary_conv2d", net.bits(5), outputs=6, parts=("scale", "bias"), writes="both", threshold="f32",
                   **fields_of((1, 1)))  # fmt: skip
    net.tensors[made].name = net.tensors[made + 1].name = "layer1.0.conv"  # twice the same
    net.tensors[net.ops[-1].input].name = "logits"
    graph = to_onnx(net.model()).graph
    names = [node.name for node in graph.node]
    assert {"layer1.0.conv", "layer1.0.conv#2", "logits", "logits#2", "layer1.0.conv/Conv"} <= set(names)
    assert len(set(names)) == len(names)
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    assert made_by["layer1.0.conv"] == "Add" and made_by["layer1.0.conv#2"] == "Where"
    weights = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    assert set(np.unique(weights["layer1.0.conv/weights"])) == {1.0, -1.0}


def test_the_border_of_the_first_layer_is_a_map_of_biases():
    net = Net(7, 5, 3)
    made = net.add("pixel_conv2d", 0, outputs=2, **fields_of((3, 3), (2, 1), (1, 1)))
    model = net.model(made)
    (bias,) = (i for i in to_onnx(model).graph.initializer if i.name.endswith("/bias"))
    assert list(bias.dims) == [1, 2, 4, 5]
    agree(model)
    assert inner(model, images(model, 2))[1].shape == (2, 4, 5, 2)


def test_without_onnx_the_error_says_how_to_get_it(monkeypatch, tmp_path):
    net = Net(2, 2, 1)
    model = net.model(net.real(1))
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BnnfreeError, match="onnx, which is not installed"):
        write_onnx(model, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_what_no_file_can_hold_is_refused(monkeypatch):
    net = Net(2, 2, 1)
    model = net.model(net.real(9))
    monkeypatch.setattr("bnnfree.export.onnx.MAX_FILE", 16)
    with pytest.raises(BnnfreeError, match="more than 16 bytes"):
        to_onnx(model)
