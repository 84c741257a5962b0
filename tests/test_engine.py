"""The engine: its backends agree to the bit, on anything a file may hold, and it behaves as its docstrings say."""

import itertools
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import ROOT
from packed import F32, GEOMETRIES, PARTS, Net, fields_of, images, random_net

from bnnfree import ops
from bnnfree.engine import Engine, EngineError, backends, kernels, load, run, runners
from bnnfree.errors import BnnfreeError, UnknownNameError
from bnnfree.format import FormatError, write
from bnnfree.format.schema import NORMS

CHANNELS = [1, 3, 31, 32, 33, 63, 64, 65, 130]
OTHERS = [name for name in backends() if name not in ("reference", "native")]


def words(array):
    """The bits of every value, all NaN being one. Why: which NaN two NaN add to is not defined."""
    if array.dtype == F32:
        return np.where(np.isnan(array), F32(np.nan), array).view(np.uint32)
    return array


def same(model, pixels):
    """Every activation of every backend is the reference's, to the bit; returns the reference's."""
    with np.errstate(all="ignore"):  # huge constants overflow on purpose
        expected = Engine(model, "reference").trace(pixels)
        for backend in OTHERS:
            got = Engine(model, backend).trace(pixels)
            assert got.keys() == expected.keys()
            for name, value in expected.items():
                assert got[name].dtype == value.dtype and got[name].shape == value.shape, (backend, name)
                np.testing.assert_array_equal(words(got[name]), words(value), f"{backend} {name}")
    return expected


# -- the backends agree


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_binary_convolutions_agree(geometry, channels):
    height, width, *window = geometry
    net = Net(height, width, 3, seed=channels)
    source = net.bits(channels)
    for pad_value in (0, 1, -1):
        net.add("binary_conv2d", source, outputs=5, pad_value=pad_value, **fields_of(*window))
    same(net.model(), images(net, 3))


@pytest.mark.parametrize("pad_value", [0, 1, -1])
@pytest.mark.parametrize(("channels", "outputs", "groups"), [(2, 2, 2), (6, 9, 3), (66, 4, 2), (128, 2, 2), (195, 3, 3),
                                                             (6, 6, 6)])  # fmt: skip
@pytest.mark.parametrize("geometry", GEOMETRIES[3::3])
def test_grouped_convolutions_agree(geometry, channels, outputs, groups, pad_value):
    height, width, *window = geometry
    net = Net(height, width, 3, seed=channels)
    bits, real = net.bits(channels), net.real(channels)
    options = {"outputs": outputs, "groups": groups, "pad_value": pad_value, **fields_of(*window)}
    net.add("binary_conv2d", bits, **options)
    for weights in ("f32", "i8", "bits"):
        net.add("conv2d", real, weights=weights, **options)
    same(net.model(), images(net, 2))


@pytest.mark.parametrize("numbers", ["tame", "wild"])
@pytest.mark.parametrize("channels", [1, 3, 31])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolutions_of_pixels_and_of_floats_agree(geometry, channels, numbers):
    height, width, *window = geometry
    net = Net(height, width, channels, channels, numbers)
    net.add("pixel_conv2d", 0, outputs=5, **fields_of(*window))
    real = net.real(channels)
    for pad_value, weights in itertools.product((0, 1, -1), ("f32", "i8", "bits")):
        net.add("conv2d", real, outputs=3, weights=weights, pad_value=pad_value, **fields_of(*window))
    same(net.model(), images(net, 2))


@pytest.mark.parametrize("channels", [1, 33])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_poolings_agree(geometry, channels):
    height, width, kernel, stride, padding, dilation = geometry
    net = Net(height, width, 3, channels, "wild")
    real = net.real(channels)
    padding = tuple(min(p, k // 2) for p, k in zip(padding, kernel, strict=True))
    reach = [n + 2 * p - d * (k - 1) for n, p, d, k in zip((height, width), padding, dilation, kernel, strict=True)]
    for name, ceil in itertools.product(("max_pool2d", "avg_pool2d"), (0, 1) if min(reach) > 0 else ()):
        net.add(name, real, ceil=ceil, **fields_of(kernel, stride, padding, dilation))
    net.add("softmax", net.add("concat", real, other=real))
    same(net.model(), images(net, 2))


NORMED = [  # height, width, channels, groups
    (1, 1, 1, 1), (1, 1, 66, 66), (1, 1, 130, 2), (1, 9, 3, 1), (7, 1, 31, 31), (4, 5, 33, 3), (6, 5, 64, 4),
    (5, 7, 66, 2), (3, 4, 128, 8), (4, 3, 130, 1), (5, 5, 195, 5),
]  # fmt: skip


def normed(height, width, channels, groups, numbers) -> Net:
    """Both norms with all that an epilogue has, alone, and of infinities and what is no number."""
    net = Net(height, width, 3, channels, numbers)
    real, other = net.real(channels), net.real(channels)
    first = net.add("pointwise", real, parts=("scale", "bias"))
    net.tensors[net.ops[-1].scale].data[::3] = 3e38
    broken = net.add("pointwise", first, parts=("scale",))
    net.tensors[net.ops[-1].scale].data[::6] = 0
    for name in NORMS:
        net.add(name, real, groups=groups)
        net.add(name, broken, groups=groups, writes="both", threshold="f32")
        net.add(name, real, groups=groups, writes="bits", flip=True)
        net.add(name, real, groups=groups, parts=PARTS, other=other, writes="both", threshold="f32", flip=True)
    return net


@pytest.mark.parametrize("numbers", ["tame", "wild"])
@pytest.mark.parametrize("shape", NORMED)
def test_norms_agree(shape, numbers):
    net = normed(*shape, numbers)
    same(net.model(), images(net, 3))


@pytest.mark.parametrize("numbers", ["tame", "whole", "wild"])
@pytest.mark.parametrize("seed", range(25))
def test_random_models_agree(seed, numbers):
    model = random_net(seed, numbers)
    same(model, images(model, 3, seed))


def test_sums_beyond_16_bits_and_beyond_float32_agree():
    """Counts of differing bits above 65535, and pixel sums that pass 2^24 on their way."""
    net = Net(1, 1, 1)
    wide = net.add("pixel_conv2d", 0, outputs=140_001, writes="bits", **fields_of((1, 1)))
    net.add("binary_conv2d", wide, outputs=2, **fields_of((1, 1)))
    same(net.model(), images(net, 1))
    net = Net(3, 2, 20_001)
    net.add("pixel_conv2d", 0, outputs=9, **fields_of((1, 1)))
    weights = net.tensors[net.ops[0].weights].data
    weights[:] = np.abs(weights) * np.where(np.arange(20_001) < 10_000, 1, -1)  # up beyond 2^24 and down again
    same(net.model(), images(net, 2))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_first_layer_is_what_its_operation_says_up_to_the_border(geometry):
    height, width, kernel, *rest = geometry
    net = Net(height, width, 3)
    made = net.add("pixel_conv2d", 0, outputs=5, **fields_of(kernel, *rest))
    model = net.model(made)
    weights, scale, bias = (model.tensors[getattr(model.ops[0], n)].data for n in ("weights", "scale", "bias"))
    got = same(model, images(net, 2))[model.tensors[made].name]
    expected = ops.pixel_conv2d(images(net, 2), weights, scale, bias, ops.Window(kernel, *rest))
    np.testing.assert_array_equal(words(got), words(expected))


@pytest.mark.parametrize("size", [1, 40, 700])
def test_results_do_not_depend_on_how_the_kernels_cut_their_work(size, monkeypatch):
    for module in (kernels, run):
        for name, value in vars(module).items():
            if name.isupper() and isinstance(value, int):
                monkeypatch.setattr(module, name, size)
    for seed in range(8):
        model = random_net(seed)
        same(model, images(model, 3))


# -- what follows a sum


def expected_of(model, op, v, other):
    """The epilogue from its definition (schema.EPILOGUE): (real, bits)."""
    c = {name: model.tensors[index].data for name, index in op.constants().items()}
    v = v.astype(F32)
    v = v * c["scale"] if "scale" in c else v
    v = v + c["bias"] if "bias" in c else v
    v = v + np.tile(other, v.shape[-1] // other.shape[-1]) if op.other is not None else v
    v = np.where(v >= 0, v, v * c["slope"]) if "slope" in c else v
    v = np.where(v > c["low"], v, c["low"]) if "low" in c else v
    v = np.where(v < c["high"], v, c["high"]) if "high" in c else v
    bit = ~(v >= c.get("threshold", F32(0)))
    return v, bit ^ ops.unpack_bits(c["flip"], v.shape[-1]) if "flip" in c else bit


def subsets(parts):
    return itertools.chain.from_iterable(itertools.combinations(parts, n) for n in range(len(parts) + 1))


@pytest.mark.sample(2)
@pytest.mark.parametrize(("name", "channels", "numbers"), [
    *((name, *kind) for name in ("pointwise", "binary_conv2d", "conv2d") for kind in ((66, "tame"), (6, "wild"))),
    ("group_norm", 6, "wild"),
])  # fmt: skip
def test_every_subset_of_the_epilogue_is_what_the_format_says(name, channels, numbers):
    random = np.random.default_rng(channels)
    for number, parts in enumerate(subsets(PARTS)):
        net = Net(2, 3, 3, number, numbers)
        other = net.real(channels // (1, 2, 3)[number % 3])
        source = net.bits(channels) if name == "binary_conv2d" else net.real(channels)
        window = {"outputs": channels, **fields_of((1, 1))} if name.endswith("conv2d") else {}
        for writes in ("real", "bits", "both"):
            options = {"threshold": random.choice([None, "f32"]), "flip": bool(random.integers(2))}
            net.add(name, source, parts=parts, other=other, writes=writes, **options, **window)
        model = net.model()
        trace = same(model, images(model, 2))
        value = {i: trace[t.name] for i, t in enumerate(model.tensors) if t.place != "constant"}
        for op in (op for op in model.ops if op.name == name and op.input == source):
            v = value[op.input]
            if name != "pointwise":
                weights = {"weights": model.tensors[op.weights].data, "channels": channels}
                with np.errstate(all="ignore"):
                    v = kernels.REFERENCE[name](op, v, weights)
            with np.errstate(all="ignore"):
                real, bits = expected_of(model, op, v, value.get(op.other))
            if op.real is not None:
                np.testing.assert_array_equal(words(value[op.real]), words(real))
            if op.bits is not None:
                np.testing.assert_array_equal(ops.unpack_bits(value[op.bits], channels), bits)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("channels", [1, 31, 64, 65])
def test_whole_thresholds_compare_the_sum_itself(channels, flip):
    net = Net(4, 3, 3, channels)
    source = net.bits(channels)
    made = net.add("binary_conv2d", source, outputs=200, writes="bits", threshold="i32", flip=flip,
                   **fields_of((3, 2), padding=(1, 1)))  # fmt: skip
    model = net.model()
    op = next(op for op in model.ops if op.bits == made)
    trace = same(model, images(model, 3))
    window = ops.Window((3, 2), padding=(1, 1))
    sums = ops.binary_conv2d(trace[model.tensors[source].name], model.tensors[op.weights].data, channels, window)
    bits = sums < model.tensors[op.threshold].data
    if flip:
        bits = bits ^ ops.unpack_bits(model.tensors[op.flip].data, 200)
    got = ops.unpack_bits(trace[model.tensors[made].name], 200)
    np.testing.assert_array_equal(got, bits)
    assert got.any() and not got.all()


# -- how a batch is run


@pytest.fixture(scope="module")
def net():
    """A net with every op."""
    net = Net(7, 6, 3, 5)
    stem = net.add("pixel_conv2d", 0, outputs=66, **fields_of((3, 3), padding=(1, 1)))
    bits = net.add("pointwise", stem, writes="bits", threshold="f32")
    inner = net.add("binary_conv2d", bits, outputs=66, parts=PARTS, other=stem, **fields_of((3, 3), padding=(1, 1)))
    pooled = net.add("max_pool2d", inner, **fields_of((2, 2), (2, 2)))
    pooled = net.add("concat", pooled, other=net.add("avg_pool2d", inner, **fields_of((2, 2), (2, 2))))
    pooled = net.add("rms_norm", net.add("group_norm", pooled, groups=4), groups=12, parts=("scale",))
    net.add("softmax", net.add("conv2d", pooled, outputs=5, weights="i8", parts=("bias",), **fields_of((3, 3))))
    return net.model(classes=["a", "b", "c", "dé", "e"], metadata={"resize": "square"}, producer="tests")


@pytest.mark.parametrize("backend", backends())
def test_results_do_not_depend_on_the_batch_or_the_threads(net, backend, monkeypatch):
    pixels = images(net, 7)
    whole = Engine(net, backend).run(pixels)
    assert whole.shape == (7, net.tensors[net.output].shape[-1]) and whole.dtype == F32
    for threads in (1, 2, 3, 20):
        np.testing.assert_array_equal(words(Engine(net, backend, threads).run(pixels)), words(whole))
    one_by_one = np.concatenate([Engine(net, backend).run(pixels[i : i + 1]) for i in range(7)])
    np.testing.assert_array_equal(words(one_by_one), words(whole))
    for images_together in (0, 1, 2, 3):
        monkeypatch.setattr(runners, "WORKING_SET", images_together * net.arena_bytes)
        for threads in (1, 2):
            np.testing.assert_array_equal(words(Engine(net, backend, threads).run(pixels)), words(whole))


@pytest.mark.parametrize("backend", backends())
def test_an_empty_batch_gives_an_empty_result(net, backend):
    got = Engine(net, backend).run(images(net, 0))
    assert got.shape == (0, net.tensors[net.output].shape[-1]) and got.dtype == F32


@pytest.mark.parametrize("backend", backends())
def test_maps_come_out_as_maps(backend):
    net = Net(5, 4, 3)
    model = net.model(net.real(2))
    for count in (0, 2):
        assert Engine(model, backend).run(images(model, count)).shape == (count, 5, 4, 2)


@pytest.mark.parametrize("backend", ["auto", "numpy"])
def test_the_images_are_left_as_they_were_and_need_not_be_contiguous(net, backend):
    pixels, engine = images(net, 4), Engine(net, backend)
    before = pixels.copy()
    expected = engine.run(pixels)
    np.testing.assert_array_equal(pixels, before)
    pixels.setflags(write=False)
    np.testing.assert_array_equal(engine.run(pixels), expected)
    np.testing.assert_array_equal(engine.run(np.asfortranarray(pixels)), expected)
    np.testing.assert_array_equal(engine.run(np.repeat(pixels, 2, 0)[::2]), expected)
    np.testing.assert_array_equal(engine.run(pixels[::-1]), expected[::-1])


@pytest.mark.parametrize("backend", ["auto", "numpy"])
def test_threads_may_share_an_engine(net, backend):
    engine = Engine(net, backend, threads=2)
    batches = [images(net, count, count) for count in (1, 4, 2, 5, 3)] * 3
    expected = [Engine(net).run(batch) for batch in batches]
    with ThreadPoolExecutor(2) as pool:
        for got, wanted in zip(pool.map(engine.run, batches), expected, strict=True):
            np.testing.assert_array_equal(words(got), words(wanted))


# -- what it says


@pytest.mark.parametrize("method", ["run", "trace", "profile"])
@pytest.mark.parametrize(
    "bad",
    [lambda x: x.astype(F32), lambda x: x.astype(np.int8), lambda x: x[0], lambda x: x[:, 1:], lambda x: x[..., :1],
     lambda x: x.transpose(0, 3, 1, 2), lambda x: [[1, 2], [3, 4]]],
)  # fmt: skip
def test_images_that_do_not_fit_say_what_does(net, bad, method):
    with pytest.raises(EngineError, match=r"images: got .*expected uint8 \[N, 7, 6, 3\]"):
        getattr(Engine(net), method)(bad(images(net, 2)))


def test_threads_backends_and_repeats_that_cannot_be_say_what_can(net):
    for threads in (0, -1, 1.5, "2", None):
        with pytest.raises(EngineError, match="threads: got .*1 or more"):
            Engine(net, threads=threads)
    with pytest.raises(UnknownNameError, match=r"backend: got 'nunpy', expected one of .*Did you mean 'numpy'"):
        Engine(net, "nunpy")
    with pytest.raises(EngineError, match="repeat: got 0"):
        Engine(net).profile(images(net, 1), repeat=0)


def test_files_that_are_no_models_are_named(tmp_path):
    with pytest.raises(BnnfreeError, match=r"none\.bnnf.*cannot be read"):
        load(tmp_path / "none.bnnf")
    (tmp_path / "text.bnnf").write_text("hello")
    with pytest.raises(FormatError, match=r"text\.bnnf"):
        load(tmp_path / "text.bnnf")


def test_info_counts_what_the_model_holds(net):
    info = Engine(net, threads=2).info()
    sizes = {}
    for tensor in net.tensors:
        if tensor.place == "constant":
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.data.nbytes
    assert info["bytes_by_dtype"] == sizes and info["bytes"] == sum(sizes.values())
    assert info["image_size"] == (7, 6) and info["channels"] == 3 and info["classes"][3] == "dé"
    assert sum(info["ops"].values()) == len(net.ops) and info["ops"]["pixel_conv2d"] == 1
    assert info["metadata"] == {"resize": "square"} and info["producer"] == "tests"
    assert info["backend"] == backends()[0] and info["threads"] == 2 and info["arena_bytes"] == net.arena_bytes


@pytest.mark.parametrize("backend", backends())
def test_profile_has_a_row_per_op_with_its_products(net, backend):
    rows = Engine(net, backend).profile(images(net, 2), repeat=3)
    assert [row["op"] for row in rows] == [op.name for op in net.ops]
    assert all(row["ms"] > 0 for row in rows)
    by_op = {row["op"]: row for row in rows}
    assert by_op["binary_conv2d"]["macs"] == 7 * 6 * 66 * 9 * 66
    assert by_op["pixel_conv2d"]["macs"] == 7 * 6 * 66 * 9 * 3
    assert by_op["softmax"]["macs"] == 0 and by_op["conv2d"]["shape"] == (1, 1, 5)
    names = {tensor.name for tensor in net.tensors}
    assert {row["name"] for row in rows} <= names and all(row["kernel"] for row in rows)


# -- how much it does


def counted(engine, before=lambda x: None):
    """The kernels of `engine`, each call counted; `before` is given its input."""
    calls, table = [], engine._runner.table

    def counting(name):
        def kernel(op, x, constants):
            calls.append((name, len(x)))
            before(x)
            return table[name](op, x, constants)

        return kernel

    engine._runner.table = {name: counting(name) for name in table}
    return calls


def test_a_batch_runs_each_op_once_per_part_not_per_image(net):
    for threads, together in ((1, 8), (2, 4), (3, 3)):
        engine = Engine(net, "numpy", threads)
        calls = counted(engine)
        engine.run(images(net, 8))
        parts = -(-8 // together)
        assert len(calls) == parts * len(net.ops) and sum(count for _, count in calls) == 8 * len(net.ops)


def test_activations_are_dropped_after_their_last_reader():
    """A chain of many ops holds a handful of maps, whatever its length."""
    net = Net(8, 8, 3)
    at = net.real(16)
    for _ in range(30):
        at = net.add("pointwise", at, parts=("scale",))
    engine = Engine(net.model(at), "numpy")
    seen, most = [], [0]

    def note(x):
        seen.append(weakref.ref(x))
        most[0] = max(most[0], sum(ref() is not None for ref in seen))

    counted(engine, note)
    engine.run(images(net, 2))
    assert len(seen) == 31 and most[0] <= 3


def test_loading_copies_no_constant(net, tmp_path):
    write(net, tmp_path / "m.bnnf")
    constants = [t.data for t in load(tmp_path / "m.bnnf").model.tensors if t.place == "constant"]
    assert constants and not any(data.flags.owndata or data.flags.writeable for data in constants)


def test_a_model_runs_where_torch_cannot_be_imported(net, tmp_path):
    write(net, tmp_path / "m.bnnf")
    np.save(tmp_path / "x.npy", images(net, 2))
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'PIL', 'yaml', 'tqdm', 'onnx')))\n"
        "import numpy as np; from bnnfree.engine import load\n"
        "np.save('y.npy', load('m.bnnf', threads=2).run(np.load('x.npy')))"
    )
    environment = {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True)
    np.testing.assert_array_equal(words(np.load(tmp_path / "y.npy")), words(Engine(net).run(images(net, 2))))
