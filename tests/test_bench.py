"""The benchmark: its peers compute the same network, its counts are right, its tool says what it measured."""

import importlib.util
import itertools
import json
import time

import numpy as np
import pytest
from damage import bases
from helpers import ROOT
from packed import GEOMETRIES, Net, fields_of, images, random_net
from test_tools import tool  # noqa: F401

from bnnfree.bench import kernels, peers
from bnnfree.bench.kernels import SHAPES, model_of
from bnnfree.bench.layers import inside_macs, layers
from bnnfree.bench.openvino_graph import just_below
from bnnfree.bench.peak import Peak
from bnnfree.bench.peers import PEERS, difference
from bnnfree.bench.rounds import figures, measure
from bnnfree.engine import Engine
from bnnfree.engine.binding import isa_names
from bnnfree.errors import BnnfreeError
from bnnfree.export import pack_network
from bnnfree.export.verify import sample_images
from bnnfree.format import from_bytes, to_bytes
from bnnfree.train import open_source
from models import MODELS

EXACT = [name for name, peer in PEERS.items() if peer.exact]


def run_of(name, model):
    for module in PEERS[name].needs:
        pytest.importorskip(module)
    return PEERS[name].make(model, 1)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("seed", range(20))
def test_a_peer_computes_the_same_network(name, seed):
    """Random ops whose float sums are exact in any order."""
    model = random_net(seed, "whole")
    pixels = images(model, 3, seed)
    expected = Engine(model, "numpy").run(pixels)
    try:
        run = run_of(name, model)
    except BnnfreeError as error:
        assert "avg_pool2d with dilation" in str(error)
        return
    assert difference(run, pixels, expected) < 1e-6


@pytest.mark.parametrize(("name", "numbers"), [("openvino_binary", "tame"), ("onnxruntime_fp32", "whole")])
@pytest.mark.parametrize("pad_value", [0, 1, -1])
@pytest.mark.parametrize("channels", [8, 24, 64, 100, 128])
def test_a_peer_pads_and_thresholds_signs_exactly(name, numbers, channels, pad_value):
    """Numbers of which a runtime makes no tie: one takes a bias from the threshold after it, one scales weights."""
    net = Net(6, 7, 3, channels, numbers)
    source = net.bits(channels)
    window = fields_of((3, 3), padding=(1, 1))
    for threshold in (None, "f32", "i32"):
        more = {} if threshold == "i32" else {"parts": ("scale", "bias")}
        made = net.add("binary_conv2d", source, outputs=40, pad_value=pad_value, writes="bits", threshold=threshold,
                       flip=True, **more, **window)  # fmt: skip
        net.add("binary_conv2d", made, outputs=9, **window)
    model = net.model()
    pixels = images(model, 3)
    assert difference(run_of(name, model), pixels, Engine(model, "numpy").run(pixels)) < 1e-6


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_runs_an_exported_network(name):
    network = open_source(ROOT / "recipes" / "cifar10_reactnet20.yaml", MODELS)
    model = from_bytes(to_bytes(pack_network(network).model))
    pixels = sample_images(model.image_shape, 3)
    differs = difference(run_of(name, model), pixels, Engine(model, "numpy").run(pixels))
    assert differs < (1e-4 if PEERS[name].exact else 1)


def test_a_difference_is_found():
    with pytest.raises(BnnfreeError, match="finite"):
        difference(lambda image: np.full(2, np.nan), np.zeros((1, 2, 2, 1)), np.zeros((1, 2)))
    assert difference(lambda image: np.array([1.0, 3.0]), np.zeros((1, 2, 2, 1)), np.array([[1.0, 4.0]])) == 0.25


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3e38, -3e38, np.inf, -np.inf, 2.0**24])
def test_a_value_is_above_the_limit_where_it_reaches_the_threshold(value):
    threshold = np.float32(value)
    limit = just_below(np.array([threshold]))[0]
    assert np.isfinite(limit) and (threshold > limit or threshold == -np.inf)
    below = np.nextafter(threshold, np.float32(-np.inf))
    assert abs(below) < 2e-38 or not below > limit or not np.isfinite(threshold)


# -- counting and timing


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_products_inside_the_image_are_counted(geometry):
    height, width, *window = geometry
    net = Net(height, width, 3)
    made = net.add("binary_conv2d", net.bits(6), outputs=4, groups=2, **fields_of(*window))
    op = net.ops[-1]
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = window
    rows, columns, _ = net.shape(made)
    taps = itertools.product(range(rows), range(columns), range(kh), range(kw))
    inside = sum(0 <= r * sh - ph + i * dh < height and 0 <= c * sw - pw + j * dw < width for r, c, i, j in taps)
    assert inside_macs(net.model(), op) == inside * 4 * 3


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.op} {s.text}")
def test_the_shapes_are_what_they_say(shape):
    model, number = model_of(shape)
    op = from_bytes(to_bytes(model)).ops[number]
    height, width, outputs = model.tensors[op.writes()[0]].shape
    assert op.name == shape.op and outputs == shape.outputs and height == width
    assert model.tensors[op.input].shape == (shape.side, shape.side, shape.channels)


def test_contenders_take_turns():
    order = []

    def call(name, seconds):
        order.append(name)
        time.sleep(seconds)

    times = measure({"a": lambda: call("a", 0.02), "b": lambda: call("b", 0.04)}, 0.1, 1)
    assert len(times["a"]) >= 3 and 20 <= np.median(times["a"]) < np.median(times["b"])
    changes = sum(x != y for x, y in itertools.pairwise(order[4:]))
    assert changes >= 3  # three rounds at least, and the one who begins changes
    row = figures(np.arange(1.0, 12.0))
    assert (row["p10_ms"], row["median_ms"], row["p90_ms"], row["runs"]) == (2, 6, 10, 11)


@pytest.mark.skipif(not isa_names(), reason="needs a C compiler")
def test_a_binary_convolution_is_measured_against_the_peak():
    """Above 100 percent where a kernel counts with fewer instructions: avx512 with 10 for 12."""
    model, number = model_of(kernels.Shape("binary_conv2d", 14, 256, 256, 3, 1, 1, epilogue="sign"))
    for isa in isa_names():
        peak = Peak(isa)
        peak.measure()
        row = layers(Engine(model, isa), images(model, 1), 100, peak)[number]
        assert row["gmacs"] == pytest.approx(row["macs"] / row["ms"] / 1e6)
        assert row["inside_macs"] == 40 * 40 * 256 * 256 < row["macs"] == 42 * 42 * 256 * 256
        assert row["percent_of_peak"] > 0  # how much is for the benchmark to say: other tests run beside this one


def test_there_is_no_peak_of_what_has_no_popcount():
    peak = Peak("numpy")
    peak.measure()
    assert peak.best is None


# -- the tool


@pytest.fixture
def packed(tmp_path):
    (tmp_path / "m.bnnf").write_bytes(bases()[2])
    return tmp_path / "m.bnnf"


def test_the_tool_measures_a_packed_file_and_its_peers(tool, packed, tmp_path):  # noqa: F811
    options = ("--against", "onnxruntime", "openvino", "--layers", "--seconds", 0.1, "--json", tmp_path / "b.json")
    code, printed, errors = tool("bench", packed, *options)
    assert code == 0 and printed.splitlines()[-1] == str(tmp_path / "b.json"), errors
    report = json.loads((tmp_path / "b.json").read_text())
    assert {"cpu", "cores", "threads", "isa"} <= set(report["machine"])
    engine = report["engine"]
    assert engine["runs"] >= 3 and engine["p10_ms"] <= engine["median_ms"] <= engine["p90_ms"]
    for name, peer in report["peers"].items():
        assert report["ratio"][name] == pytest.approx(peer["median_ms"] / engine["median_ms"])
    for name in PEERS:
        assert f"{name}: not measured" in printed or name in report["peers"]
    assert [row["name"] for row in report["layers"]] == [t.name for t in map(written, from_bytes(bases()[2]).ops)]
    assert {"ms", "gmacs", "percent_of_peak", "kernel"} <= set(report["layers"][0])
    assert (report["popcount_peak_gmacs"] is None) == (not isa_names())


def written(op):
    return from_bytes(bases()[2]).tensors[op.writes()[0]]


def test_the_tool_takes_a_recipe_and_times_single_ops(tool, tmp_path, monkeypatch):  # noqa: F811
    recipe = ROOT / "recipes" / "cifar10_reactnet20.yaml"
    code, printed, errors = tool("bench", recipe, "model.width=0.5", "--seconds", 0.1)
    assert code == 0 and "engine" in printed and "32x32x3" in printed, errors
    monkeypatch.setattr(kernels, "SHAPES", [s for s in SHAPES if s.side == 7 and s.channels == 512])
    code, printed, errors = tool("bench", "--kernels", "--json", tmp_path / "k.json")
    assert code == 0, errors
    rows = json.loads((tmp_path / "k.json").read_text())["kernels"]
    assert len(rows) == 3 * max(1, len(isa_names())) and all(row["ms"] > 0 for row in rows)


def test_a_missing_package_is_one_line_that_says_what_to_install(tool, packed, monkeypatch):  # noqa: F811
    find = importlib.util.find_spec
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda n, *a: None if n == "openvino" else find(n, *a))
    code, printed, _ = tool("bench", packed, "--against", "openvino", "--seconds", 0.1)
    assert code == 0 and printed.count("openvino") == 2 and "pip install openvino" in printed


@pytest.mark.parametrize(
    ("arguments", "word"),
    [((), "SOURCE"), (("FILE", "--against", "openvno"), "openvino"), (("FILE", "--seconds", "0"), "--seconds"),
     (("FILE", "model.width=1"), "fixed"), (("FILE", "--threads", "0"), "threads"), (("none.bnnf",), "none.bnnf"),
     (("FILE", "--backend", "nunpy"), "numpy")],
)  # fmt: skip
def test_what_cannot_be_measured_is_one_line_and_exit_code_2(tool, packed, arguments, word):  # noqa: F811
    code, _, errors = tool("bench", *[str(packed) if a == "FILE" else a for a in arguments])
    assert code == 2 and word in errors and len(errors.strip().splitlines()) == 1
