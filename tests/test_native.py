"""The native engine: every instruction set of this CPU gives numpy's bits, it refuses what the reader refuses, and it
gives back what it takes. Skipped, with the reason, where the library cannot be compiled."""

import ctypes
import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import edits_ops  # noqa: F401  adds its rows to EDITS
import numpy as np
import pytest
from damage import bases
from edits import EDITS, damaged
from helpers import ROOT
from packed import F32, PARTS, Net, fields_of, images, random_net
from test_engine import NORMED, normed
from test_fuzz import bounds, damage

from bnnfree.bench.kernels import SHAPES, model_of
from bnnfree.engine import Engine, EngineError, load
from bnnfree.engine.binding import NativeModel, RefusedError, aligned, isa_names, load_library
from bnnfree.export import pack_network
from bnnfree.export.verify import sample_images
from bnnfree.format import FormatError, check_model, from_bytes, schema, to_bytes, write
from bnnfree.models import MODELS
from bnnfree.train import open_source

pytestmark = pytest.mark.skipif(not isa_names(), reason=load_library()[1])

ISAS = isa_names()


def words(array):
    """The bits of every value, all NaN being one. Why: which NaN two NaN add to is not defined."""
    if array.dtype == F32:
        return np.where(np.isnan(array), F32(np.nan), array).view(np.uint32)
    return array


def same(model, pixels, threads=(1, 2, 3)):
    """Every activation, of every instruction set and number of threads, is numpy's; so are runs of 1 and of all."""
    with np.errstate(all="ignore"):
        numpy = Engine(model, "numpy")
        expected, output = numpy.trace(pixels), numpy.run(pixels)
    for isa in ISAS:
        for count in threads:
            engine = Engine(model, isa, count)
            got = engine.trace(pixels)
            assert got.keys() == expected.keys()
            for name, value in expected.items():
                assert got[name].dtype == value.dtype and got[name].shape == value.shape, (isa, count, name)
                np.testing.assert_array_equal(words(got[name]), words(value), f"{isa}, {count} threads: {name}")
            for part in (pixels, pixels[:1]):
                np.testing.assert_array_equal(words(engine.run(part)), words(output[: len(part)]), f"{isa} {count}")


# -- the same bits


@pytest.mark.parametrize("numbers", ["tame", "whole", "wild"])
@pytest.mark.parametrize("seed", range(100, 120))
def test_random_models_give_the_same_bits(seed, numbers):
    model = random_net(seed, numbers)
    same(model, images(model, 5, seed))


@pytest.mark.skipif("avx512" not in ISAS, reason="this CPU has no AVX-512")
@pytest.mark.parametrize("seed", range(200, 212))
def test_avx512_without_its_popcount_and_dot_product_gives_the_same_bits(seed):
    model = random_net(seed, "tame")
    same(model, images(model, 2, seed), threads=(1, 2))
    kernels = {row["kernel"] for row in Engine(model, "avx512base").profile(images(model, 1, seed), 1)}
    assert not any("vpopcnt" in name or "vnni" in name for name in kernels), kernels


WIDE = [  # height, width, kernel, stride, padding, dilation: rows and columns that fill tiles and leave rests
    (15, 17, (3, 3), (1, 1), (1, 1), (1, 1)),
    (14, 14, (3, 3), (2, 2), (1, 1), (1, 1)),
    (7, 9, (1, 1), (1, 1), (0, 0), (1, 1)),
    (9, 30, (1, 1), (2, 1), (0, 0), (1, 1)),
    (12, 11, (5, 3), (1, 2), (2, 1), (1, 1)),
    (10, 13, (3, 3), (1, 1), (2, 2), (2, 2)),
    (3, 70, (3, 3), (1, 1), (2, 2), (1, 1)),
    (16, 3, (2, 2), (1, 1), (0, 0), (1, 1)),
]


@pytest.mark.sample(2)
@pytest.mark.parametrize(("channels", "outputs"), [(64, 64), (32, 33), (65, 100), (128, 31), (160, 96), (256, 70),
                                                   (300, 5), (512, 32)])  # fmt: skip
@pytest.mark.parametrize("geometry", WIDE)
def test_binary_convolutions_of_many_channels(geometry, channels, outputs):
    height, width, *window = geometry
    net = Net(height, width, 3, seed=channels)
    source = net.bits(channels)
    options = {"outputs": outputs, **fields_of(*window)}
    shortcut = net.add("binary_conv2d", source, pad_value=0, **options)
    net.add("binary_conv2d", source, pad_value=-1, parts=PARTS, other=shortcut, writes="both", threshold="f32",
            flip=True, **options)  # fmt: skip
    net.add("binary_conv2d", source, pad_value=1, writes="bits", threshold="i32", flip=True, **options)
    net.add("binary_conv2d", source, pad_value=0, parts=("scale", "slope"), writes="bits", **options)
    same(net.model(), images(net, 2))


@pytest.mark.parametrize("channels", [3, 32, 34, 64])
def test_scales_and_thresholds_at_the_ends_of_their_range(channels):
    """Kernels may halve sums and double scales; odd sums have no half and the largest scales no double."""
    net = Net(5, 17, 3, seed=channels)
    source = net.bits(channels)
    for value in (2.0**125, 2.0**126, -(2.0**126), 3.4e38, 1e-45, -0.0):
        net.add("binary_conv2d", source, outputs=48, parts=("scale", "bias"), writes="both", **fields_of((3, 3)))
        scale = net.tensors[net.ops[-1].scale]
        scale.data = np.where(np.arange(48) % 3 == 0, F32(value), scale.data)
    net.add("binary_conv2d", source, outputs=64, writes="bits", threshold="i32", **fields_of((3, 3), padding=(1, 1)))
    ends = np.array([-(2**31), 2**31 - 1, -1, 0, 1, 2, -2, 9 * channels, 9 * channels - 1], np.int32)
    net.tensors[net.ops[-1].threshold].data = np.resize(ends, 64)
    with np.errstate(all="ignore"):
        same(net.model(), images(net, 3), threads=(1, 2))


@pytest.mark.sample(2)
@pytest.mark.parametrize(("channels", "outputs", "groups"), [(128, 64, 2), (96, 66, 3), (64, 64, 64), (256, 256, 4),
                                                             (70, 35, 5)])  # fmt: skip
@pytest.mark.parametrize("geometry", WIDE[:5:2])
def test_groups_of_many_channels(geometry, channels, outputs, groups):
    height, width, *window = geometry
    net = Net(height, width, 3, seed=channels)
    bits, real = net.bits(channels), net.real(channels)
    options = {"outputs": outputs, "groups": groups, **fields_of(*window)}
    for pad_value in (0, -1):
        net.add("binary_conv2d", bits, pad_value=pad_value, **options)
        for weights in ("f32", "i8", "bits"):
            net.add("conv2d", real, weights=weights, pad_value=pad_value, **options)
    same(net.model(), images(net, 1), threads=(1, 3))


@pytest.mark.parametrize(("channels", "outputs"), [(1, 64), (3, 32), (4, 33), (3, 100), (8, 16), (13, 17)])
@pytest.mark.parametrize("geometry", [*WIDE, (33, 30, (7, 7), (2, 2), (3, 3), (1, 1))])
def test_convolutions_of_pixels(geometry, channels, outputs):
    height, width, *window = geometry
    net = Net(height, width, channels, seed=outputs)
    first = net.add("pixel_conv2d", 0, outputs=outputs, **fields_of(*window))
    net.add("pixel_conv2d", 0, outputs=outputs, parts=PARTS, other=first, writes="both", threshold="f32", flip=True,
            **fields_of(*window))  # fmt: skip
    same(net.model(), images(net, 2))


@pytest.mark.sample(2)
@pytest.mark.parametrize(("channels", "outputs"), [(1, 40), (16, 32), (33, 33), (64, 100), (70, 7)])
@pytest.mark.parametrize("numbers", ["tame", "wild"])
@pytest.mark.parametrize("geometry", WIDE[::2])
def test_convolutions_of_floats_poolings_and_pointwise(geometry, channels, outputs, numbers):
    height, width, kernel, stride, padding, dilation = geometry
    net = Net(height, width, 3, channels, numbers)
    real = net.real(channels)
    for weights, pad_value in (("f32", 0), ("i8", 1), ("bits", -1), ("bits", 0)):
        net.add("conv2d", real, outputs=outputs, weights=weights, pad_value=pad_value,
                **fields_of(kernel, stride, padding, dilation))  # fmt: skip
    padding = tuple(min(p, k // 2) for p, k in zip(padding, kernel, strict=True))
    for name in ("max_pool2d", "avg_pool2d"):
        net.add(name, real, **fields_of(kernel, stride, padding, dilation))
    net.add("pointwise", real, parts=PARTS, other=real, writes="both", threshold="f32", flip=True)
    net.add("pointwise", net.bits(channels), parts=("scale", "bias"), writes="both")
    net.add("softmax", net.add("concat", real, other=real))
    same(net.model(), images(net, 2), threads=(1, 3))


@pytest.mark.parametrize(("channels", "outputs", "groups"), [(64, 64, 64), (17, 34, 17), (32, 32, 4), (24, 48, 8),
                                                             (6, 40, 2), (66, 22, 11), (3, 3, 3)])  # fmt: skip
@pytest.mark.parametrize("numbers", ["tame", "wild"])
@pytest.mark.parametrize("geometry", WIDE[::2])
def test_convolutions_of_floats_in_groups(geometry, numbers, channels, outputs, groups):
    """Depthwise ones with several outputs a channel among them; groups across vectors, padding of any kind."""
    height, width, *window = geometry
    net = Net(height, width, 3, channels, numbers)
    real = net.real(channels)
    options = {"outputs": outputs, "groups": groups, **fields_of(*window)}
    first = net.add("conv2d", real, **options)
    net.add("conv2d", real, weights="i8", pad_value=1, parts=PARTS, other=first, writes="both", threshold="f32",
            flip=True, **options)  # fmt: skip
    net.add("conv2d", real, weights="bits", pad_value=-1, writes="bits", **options)
    same(net.model(), images(net, 2), threads=(1, 3))


@pytest.mark.parametrize("numbers", ["tame", "wild"])
@pytest.mark.parametrize("shape", NORMED)
def test_norms(shape, numbers):
    net = normed(*shape, numbers)
    same(net.model(), images(net, 2), threads=(1, 2, 5))


def test_a_norm_may_be_written_over_what_is_added_to_it():
    net = Net(5, 6, 3)
    source, other = net.real(192), net.real(192)
    made = net.add("group_norm", source, groups=3, parts=("other",), other=other)
    model = net.model(made)
    op = next(op for op in model.ops if op.name == "group_norm")
    assert model.tensors[op.real].offset == model.tensors[op.other].offset
    pixels = images(model, 3)
    for isa in ISAS:
        for threads in (1, 2, 3):
            np.testing.assert_array_equal(
                words(Engine(model, isa, threads).run(pixels)), words(Engine(model, "numpy").run(pixels))
            )


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.side < 56], ids=lambda s: f"{s.op} {s.text}")
def test_the_ops_that_the_benchmark_times(shape):
    model, number = model_of(shape)
    assert model.ops[number].name == shape.op
    same(from_bytes(to_bytes(model)), images(model, 1), threads=(1, 2))


@pytest.mark.parametrize("blob", range(3))
def test_handmade_and_exported_files(blob, tmp_path):
    """As bytes, and as the mapped file."""
    model = from_bytes(bases()[blob])
    pixels = images(model, 5)
    same(model, pixels)
    (tmp_path / "m.bnnf").write_bytes(bases()[blob])
    for isa in ISAS:
        got = load(tmp_path / "m.bnnf", isa, threads=2).run(pixels)
        np.testing.assert_array_equal(words(got), words(Engine(model, "numpy").run(pixels)))


@pytest.mark.parametrize(("recipe", "overrides"), [
    ("cifar10_reactnet20", ()), ("cifar10_birealnet18", ("model.width=0.25",)),
    ("cifar100_xnor_resnet18", ("model.width=0.25",)), ("cifar100_reactnet_a", ("model.width=0.25",)),
    ("imagenet_reactnet_a", ("model.width=0.125",)), ("reactnet_nobn", ("model.norm=bn",)),
])  # fmt: skip
def test_the_networks_of_the_recipes(recipe, overrides):
    network = open_source(ROOT / "recipes" / f"{recipe}.yaml", MODELS, overrides)
    model = from_bytes(to_bytes(pack_network(network).model))
    same(model, sample_images(model.image_shape, 1 if model.image_shape[0] > 64 else 3), threads=(1, 2))


# -- the same files refused


def refusal(read, blob) -> str:
    """Name of the error, or "none"."""
    try:
        read(blob)
    except FormatError as error:
        return type(error).__name__
    except RefusedError as error:
        assert error.status >= 10 and str(error).isprintable() and str(error).isascii(), error
        return list(schema.ERRORS)[error.status - 10]
    return "none"


def by_python(blob):
    check_model(from_bytes(blob))


def agree(blob) -> bool:
    """Both readers refuse the file or take it; whether they took it."""
    ours, theirs = refusal(by_python, blob), refusal(NativeModel, blob)
    assert (ours == "none") == (theirs == "none"), f"python: {ours}, C: {theirs}"
    return ours == "none"


@pytest.mark.parametrize("error", EDITS)
def test_what_the_reader_refuses_the_library_refuses_by_the_same_name(error):
    found, expected = {}, {}
    for function, cases, seal in EDITS[error]:
        for case in cases:
            key = f"{function.__name__} {str(case)[:80]}"
            found[key], expected[key] = refusal(NativeModel, damaged(function, case, seal)), error
    assert found == expected


def agree_on_seeds(seeds) -> int:
    """Damaged files by seed; what both take gives the same bits. Returns how many that were."""
    taken = 0
    with bounds():
        for seed in seeds:
            blob = damage(seed)
            try:
                if agree(blob):
                    taken += 1
                    model = from_bytes(blob)
                    pixels = images(model, 1, seed)
                    with np.errstate(all="ignore"):
                        expected = words(Engine(model, "numpy").run(pixels))
                    np.testing.assert_array_equal(words(Engine(model, data=blob).run(pixels)), expected)
            except Exception as error:
                pytest.fail(f"seed {seed}: {type(error).__name__}: {error}")
    return taken


def test_two_thousand_damaged_files_are_taken_or_refused_by_both():
    assert agree_on_seeds(range(2000)) > 50


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_a_hundred_thousand_damaged_files_are_taken_or_refused_by_both(part):
    assert agree_on_seeds(range(10_000 * part, 10_000 * (part + 1))) > 500


# -- how it is called


@pytest.fixture(scope="module")
def model():
    return from_bytes(bases()[0])


def create(blob, *, size=None, isa=None, threads=1, message=True):
    """bnnf_model_create itself; (status, message). The model is freed."""
    lib, _ = load_library()
    handle, text = ctypes.c_void_p(), ctypes.create_string_buffer(256)
    params = lib.bnnf_default_params()
    params.isa, params.threads = isa, threads
    array = np.frombuffer(blob, np.uint8)
    whole = (array.ctypes.data, len(array) if size is None else size, ctypes.byref(params))
    status = lib.bnnf_model_create(ctypes.byref(handle), *whole, text if message else None, 256 if message else 0)
    assert bool(handle.value) == (status == 0)
    lib.bnnf_model_free(handle)
    return status, text.value.decode()


def test_arguments_that_cannot_be_are_refused_with_a_message():
    lib, _ = load_library()
    blob = bases()[0]
    assert create(blob) == (0, "")
    assert create(blob, isa=b"sse9")[0] == 1 and "sse9" in create(blob, isa=b"sse9")[1]
    assert create(blob, threads=0)[0] == 1 and create(blob, threads=-5)[0] == 1
    assert create(blob, size=100)[0] >= 10 and create(blob, size=0, message=False)[0] >= 10
    assert lib.bnnf_model_create(None, None, 0, None, None, 0) == 1
    lib.bnnf_model_free(None)
    lib.bnnf_session_free(None)


def test_bytes_need_not_be_aligned():
    blob = bases()[1]
    room = np.zeros(len(blob) + 9, np.uint8)
    for offset in (1, 2, 4, 8):
        room[offset : offset + len(blob)] = np.frombuffer(blob, np.uint8)
        assert create(room[offset : offset + len(blob)]) == (0, "")
    assert aligned(room[3:]).ctypes.data % 64 == 0 and (aligned(room[3:]) == room[3:]).all()


def test_a_mapped_file_is_not_copied(model, tmp_path):
    write(model, tmp_path / "m.bnnf")
    engine = load(tmp_path / "m.bnnf", ISAS[0], mapped=True)
    mapped = engine._runner.data
    assert engine._runner.native._owner.data.ctypes.data == mapped.ctypes.data
    constant = next(t.data for t in engine.model.tensors if t.place == "constant")
    assert mapped.ctypes.data <= constant.ctypes.data < mapped.ctypes.data + len(mapped)


def test_the_bytes_of_another_model_are_refused(model):
    """The library would read and write by its own shapes, not by those that callers were told."""
    other = next(each for each in map(random_net, range(99)) if each.image_shape != model.image_shape)
    with pytest.raises(EngineError, match="they are another model's"):
        Engine(other, ISAS[0], data=to_bytes(model))


def test_the_file_may_be_replaced_while_a_model_of_it_runs(model, tmp_path):
    write(model, tmp_path / "m.bnnf")
    engine, pixels = load(tmp_path / "m.bnnf", ISAS[0]), images(model, 2)
    expected = engine.run(pixels)
    (tmp_path / "other").write_bytes(b"something else")
    (tmp_path / "other").replace(tmp_path / "m.bnnf")
    np.testing.assert_array_equal(words(engine.run(pixels)), words(expected))


@pytest.mark.parametrize("isa", ISAS)
def test_threads_share_an_engine_and_its_sessions(model, isa):
    engine = Engine(model, isa, 2)
    batches = [images(model, count, count) for count in (1, 4, 2, 5, 3)] * 4
    expected = [Engine(model, "numpy").run(batch) for batch in batches]
    with ThreadPoolExecutor(3) as pool:
        for got, wanted in zip(pool.map(engine.run, batches), expected, strict=True):
            np.testing.assert_array_equal(words(got), words(wanted))
    assert 1 <= len(engine._runner.native._idle) <= 3


def test_native_stands_for_the_best_and_the_kernels_say_their_instruction_set(model):
    engine = Engine(model, "native")
    assert engine.backend == ISAS[0] == Engine(model).backend
    for isa in ISAS:
        rows = Engine(model, isa).profile(images(model, 3), repeat=2)
        best = ISAS.index(isa)
        for op, row in zip(model.ops, rows, strict=True):
            assert row["kernel"].startswith(f"bnnf_{op.name}__") and row["ms"] > 0
            assert any(row["kernel"].split("__")[1].startswith(name.removesuffix("base")) for name in ISAS[best:])
    with pytest.raises(EngineError, match=r"threads"):
        Engine(model, "native", 0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_session_has_as_many_threads_as_were_asked_for(model, threads):
    def alive() -> int:
        return len(os.listdir("/proc/self/task"))

    gc.collect()
    before, engine = alive(), Engine(model, ISAS[0], threads)
    engine.run(images(model, 1))
    assert alive() == before + threads - 1  # the caller is one of them
    del engine
    gc.collect()
    assert alive() == before


def resident() -> int:
    """Bytes of this process in memory."""
    return int(open("/proc/self/statm").read().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_given_back(model):
    pixels = images(model, 3)

    def use():
        for threads in (1, 2):
            engine = Engine(model, ISAS[0], threads, data=bases()[0])
            engine.run(pixels), engine.trace(pixels), engine.profile(pixels, 1)
        with pytest.raises(RefusedError):
            NativeModel(bases()[0][:-1])

    for _ in range(30):
        use()
    gc.collect()
    before = resident()
    for _ in range(100):
        use()
    gc.collect()
    assert resident() - before < 1_500_000  # a leak of all that a model holds would be 7 MB


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_forked_child_runs_an_engine_that_its_parent_has_used(model, tmp_path):
    """The threads of the parent's session are not there: the child must neither wait for them nor free them."""
    write(model, tmp_path / "m.bnnf")
    code = (
        "import gc, os, sys, numpy as np\n"
        "from bnnfree.engine import load\n"
        "engine = load('m.bnnf', 'native', threads=3)\n"
        "pixels = np.zeros((4, *engine.model.image_shape), np.uint8)\n"
        "wanted = engine.run(pixels)\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    same = np.array_equal(engine.run(pixels), wanted)\n"
        "    del engine\n"
        "    gc.collect()\n"
        "    os._exit(0 if same else 3)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "assert np.array_equal(engine.run(pixels), wanted)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=True, timeout=60)
