"""The benchmark: its peers compute the same network, its counts are right, its tool says what it measured."""

import importlib.util
import itertools
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from damage import bases
from helpers import ROOT
from packed import GEOMETRIES, Net, fields_of, images, random_net
from test_tools import tool  # noqa: F401

from bnnfree.bench import kernels, peers
from bnnfree.bench.kernels import SHAPES, Shape, cases, model_of
from bnnfree.bench.layers import inside_macs, layers
from bnnfree.bench.openvino_graph import just_below, said_of
from bnnfree.bench.peak import BASE, Peak
from bnnfree.bench.peers import PEERS, difference
from bnnfree.bench.rounds import figures, measure
from bnnfree.engine import Engine, load
from bnnfree.engine.binding import isa_names
from bnnfree.errors import BnnfreeError
from bnnfree.export import pack_network
from bnnfree.export.verify import sample_images
from bnnfree.format import from_bytes, to_bytes
from bnnfree.models import MODELS
from bnnfree.train import open_source

EXACT = [name for name, peer in PEERS.items() if peer.exact]
NEEDS = {"vpopcnt": "avx512_vpopcntdq", "vnni": "avx512_vnni"}  # in a kernel's name -> what of the CPU
NATIVE = ROOT / "bnnfree" / "engine" / "native"
native = pytest.mark.skipif(not isa_names(), reason="needs a C compiler")


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
        assert "which it has not" in str(error)
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
    # Why: without what all images have in common, logits of random weights are as small as the errors of 8 bits
    overrides = [] if PEERS[name].exact else ["model.centre_head=false"]
    network = open_source(ROOT / "recipes" / "cifar10_reactnet20.yaml", MODELS, overrides)
    model = from_bytes(to_bytes(pack_network(network).model))
    pixels = sample_images(model.image_shape, 3)
    differs = difference(run_of(name, model), pixels, Engine(model, "numpy").run(pixels))
    assert differs < (1e-4 if PEERS[name].exact else 1)


def test_what_openvino_takes_as_floats_is_said():
    net, window = Net(4, 4, 3), fields_of((3, 3), padding=(1, 1))
    made = net.add("binary_conv2d", net.bits(64), outputs=16, writes="bits", **window)
    assert said_of(net.model(net.add("binary_conv2d", made, outputs=20, **window))) == ""
    made = net.add("binary_conv2d", made, outputs=20, writes="bits", **window)
    net.add("binary_conv2d", net.bits(64), outputs=2, groups=2, **window)
    net.add("binary_conv2d", made, outputs=2, **window)
    assert said_of(net.model()).startswith("2 of 5 binary convolutions run as floats")


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
    writes = {"sign": (False, True), "block": (True, True)}.get(shape.epilogue, (shape.op != "xor", shape.op == "xor"))
    assert (op.real is not None, op.bits is not None) == writes and (op.slope is None) == (shape.epilogue != "block")
    assert shape.epilogue != "float" or (op.scale is not None and op.bias is not None and op.other is None)


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


@native
def test_a_binary_convolution_is_measured_against_the_peak(monkeypatch):
    """Above 100 percent where a kernel counts with fewer instructions: avx512 with 10 for 12. How much it is the slow
    test below asks: other tests run beside this one."""
    monkeypatch.setattr(kernels, "SHAPES", [Shape("binary_conv2d", 14, 256, 256, 3, 1, 1, epilogue="float")])
    for case in cases(isa_names()):
        peak = Peak(case.isa)
        row = layers(case.engine, images(case.engine.model, 1), 100, peak)[case.number]
        assert row["kernel"] == case.kernel and row["peak_gmacs"] == peak.best > 0
        assert row["gmacs"] == pytest.approx(row["macs"] / row["ms"] / 1e6)
        assert row["inside_macs"] == 40 * 40 * 256 * 256 < row["macs"] == 42 * 42 * 256 * 256
        assert row["percent_of_peak_nominal"] == pytest.approx(100 * row["gmacs"] / peak.best)
        assert row["percent_of_peak"] == pytest.approx(row["percent_of_peak_nominal"] * (40 / 42) ** 2)


def runs_here():
    """The kernels of kernels.h that this CPU has what they need for."""
    flags = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    for isa, name in re.findall(r'K\(\w+, "(\w+)", (\w+)\)', (NATIVE / "kernels.h").read_text()):
        if isa in isa_names() and all(flag in flags for word, flag in NEEDS.items() if word in name):
            yield f"bnnf_{name}"


@native
def test_each_kernel_of_the_table_is_timed_on_some_shape():
    timed = {(case.isa, case.kernel) for case in cases(isa_names())}
    assert len(list(runs_here())) >= 8 and set(runs_here()) - {kernel for _, kernel in timed} == set()
    assert not any(word in kernel for isa, kernel in timed if isa == BASE for word in NEEDS)
    assert (BASE in dict(timed)) == any(word in kernel for kernel in runs_here() for word in NEEDS)


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
    assert {"ms", "gmacs", "percent_of_peak", "percent_of_peak_nominal", "kernel"} <= set(report["layers"][0])
    assert (report["popcount_peak_gmacs"] is None) == (not isa_names())
    if "openvino_binary" in report["peers"]:  # of 5 channels
        assert "openvino_binary: 1 of 1 binary convolutions run as floats; its binary kernel takes" in printed


def test_the_tool_says_how_much_memory_a_session_takes(tool, packed, tmp_path):  # noqa: F811
    options = ("--seconds", 0.1, "--threads", 2, "--json", tmp_path / "b.json")
    for backend in ("auto", "numpy"):
        code, printed, errors = tool("bench", packed, *options, "--backend", backend)
        assert code == 0, errors
        memory = json.loads((tmp_path / "b.json").read_text())["memory"]
        info = load(packed, backend, 2).info()
        assert memory["file_bytes"] == packed.stat().st_size and memory["activation_bytes"] == info["arena_bytes"]
        for name in ("session_bytes", "scratch_bytes", "packed_bytes"):
            assert memory[name] == info[name] and (memory[name] is None) == (info["backend"] == "numpy")
        line = next(line for line in printed.splitlines() if line.startswith("memory"))
        assert re.findall(r"[\d,]+\d", line) == [f"{value:,}" for value in memory.values() if value is not None]


def written(op):
    return from_bytes(bases()[2]).tensors[op.writes()[0]]


def test_the_tool_takes_a_recipe_and_times_single_ops(tool, tmp_path, monkeypatch):  # noqa: F811
    recipe = ROOT / "recipes" / "cifar10_reactnet20.yaml"
    code, printed, errors = tool("bench", recipe, "model.width=0.5", "--seconds", 0.1)
    assert code == 0 and "engine" in printed and "32x32x3" in printed, errors
    monkeypatch.setattr(kernels, "SHAPES", [s for s in SHAPES if s.text in ("3x3 512->512@7 float", "7x7 512->512@7")])
    code, printed, errors = tool("bench", "--kernels", "--json", tmp_path / "k.json")
    assert code == 0, errors
    report = json.loads((tmp_path / "k.json").read_text())
    rows = report["kernels"]
    timed = [(case.shape.text, case.label, case.kernel) for case in cases(isa_names() or ["numpy"])]
    assert [(row["shape"], row["isa"], row["kernel"]) for row in rows] == timed and len(timed) >= 2
    assert all(row["ms"] > 0 for row in rows) and set(report["peaks"]) == {row["isa"] for row in rows}
    assert all(peak is None or peak > 0 for peak in report["peaks"].values())
    assert "% of peak" in printed and "% nominal" in printed


def test_a_missing_package_is_one_line_that_says_what_to_install(tool, packed, monkeypatch):  # noqa: F811
    find = importlib.util.find_spec
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda n, *a: None if n == "openvino" else find(n, *a))
    code, printed, _ = tool("bench", packed, "--against", "openvino", "--seconds", 0.1)
    assert code == 0 and printed.count("openvino") == 2 and "pip install openvino" in printed


@pytest.mark.parametrize(
    ("arguments", "word"),
    [((), "SOURCE"), (("FILE", "--against", "openvno"), "openvino"), (("FILE", "--seconds", "0"), "--seconds"),
     (("FILE", "model.width=1"), "fixed"), (("FILE", "--threads", "0"), "threads"), (("none.bnnf",), "none.bnnf"),
     (("FILE", "--backend", "nunpy"), "numpy"), (("--data",), "--data"), (("FILE", "--data", "--layers"), "--layers"),
     (("FILE", "--data", "--kernels"), "2 kinds"), (("FILE", "--train"), "m.bnnf"), (("FILE", "--data"), "m.bnnf")],
)  # fmt: skip
def test_what_cannot_be_measured_is_one_line_and_exit_code_2(tool, packed, arguments, word):  # noqa: F811
    code, _, errors = tool("bench", *[str(packed) if a == "FILE" else a for a in arguments])
    assert code == 2 and word in errors and len(errors.strip().splitlines()) == 1


# -- how fast

PEAK = {  # shape of a binary convolution -> least percent_of_peak_nominal, with VPOPCNTDQ
    "3x3 256->256@14 float": 90,
    "3x3 512->512@7 float": 90,
    "3x3 256->256@14 block": 85,
    "3x3 512->512@7 block": 85,
    "3x3 64->64@56 block": 70,
}
AVX2 = 450 / 1238  # least share of the AVX-512 peak


def speeds(report) -> dict[str, float]:
    """Measured speeds over the least that they should be."""
    rows = {(row["op"], row["shape"], row["isa"]): row for row in report["kernels"]}
    found = {}
    for (op, shape, isa), row in rows.items():
        name, scalar = f"{op} {shape} {row['kernel']}", rows[op, shape, "scalar"]
        if row["kernel"] != scalar["kernel"]:
            found[f"{name} over scalar"] = scalar["ms"] / row["ms"]
        if op == "binary_conv2d" and shape in PEAK and "vpopcnt" in row["kernel"]:
            found[f"{name} of the peak"] = row["percent_of_peak_nominal"] / PEAK[shape]
            if (op, shape, "avx2") in rows:
                share = rows[op, shape, "avx2"]["gmacs"] / report["peaks"][isa]
                found[f"{op} {shape} avx2 of the AVX-512 peak"] = share / AVX2
    return found


@native
@pytest.mark.slow
def test_kernels_are_as_fast_as_they_should_be(tmp_path):
    """Ratios within a run, of up to three runs the best, on a machine that does nothing else:
    python -m pytest -m slow -n 0 tests/test_bench.py"""
    command = [sys.executable, "tools/bench.py", "--kernels", "--json", str(tmp_path / "k.json")]
    best: dict[str, float] = {}
    for _ in range(3):
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        for name, value in speeds(json.loads((tmp_path / "k.json").read_text())).items():
            best[name] = max(value, best.get(name, 0))
        if min(best.values()) >= 1:
            return
    assert {name: round(value, 3) for name, value in best.items() if value < 1} == {}
