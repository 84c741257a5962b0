"""Engines in use: bytes that change while a model is made, closing under way, copies, floating-point modes."""

from __future__ import annotations

import copy
import ctypes
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
from cc import ASAN, ASAN_FINDS, HERE, compiler, engine_sources, needs, objects, output_of
from damage import bases
from packed import images, random_net

from bnnfree.engine import Engine, EngineError, backends, load
from bnnfree.engine.binding import isa_names, load_library
from bnnfree.format import FormatError, from_bytes, read, schema, to_bytes

BACKENDS = ["numpy", "reference", *(["native"] if isa_names() else [])]
native = pytest.mark.skipif(not isa_names(), reason=load_library()[1])


@pytest.fixture
def path(tmp_path):
    (tmp_path / "m.bnnf").write_bytes(bases()[2])
    return tmp_path / "m.bnnf"


def pixels_of(engine, count=3):
    return images(engine.model, count)


def equal(a, b):
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


# -- bytes that another process writes to while a model of them is made


@pytest.fixture(scope="module")
def change(tmp_path_factory):
    """native/change.c under the address sanitizer."""
    if sys.platform != "linux":
        pytest.skip("needs the linker's --wrap")
    folder = tmp_path_factory.mktemp("change")
    needs(compiler(), ASAN, ASAN_FINDS, folder)
    made = objects(folder, compiler(), [*engine_sources(), HERE / "change.c"], "-O0", "-pthread", *ASAN)
    output_of(*compiler(), *ASAN, "-pthread", "-Wl,--wrap=malloc", *made, "-o", folder / "program", "-lm")
    return folder / "program"


def section(data, number):
    """Offset and size of names (3), classes (4) or metadata (5)."""
    header = np.frombuffer(data, schema.HEADER_TYPE, 1)[0]
    sizes = [schema.HEADER_TYPE.itemsize, header["tensor_count"] * schema.TENSOR_TYPE.itemsize]
    sizes += [header["op_count"] * schema.OP_TYPE.itemsize]
    sizes += [header["name_bytes"], header["class_bytes"], header["metadata_bytes"]]
    at = 0
    for size in map(int, sizes[:number]):
        at += -at % schema.ALIGN + size
    return at + -at % schema.ALIGN, int(sizes[number])


@pytest.mark.thorough
@pytest.mark.parametrize(("number", "fill"), [(3, "\n"), (4, "\n"), (4, "x"), (5, "["), (5, '"'), (5, "1")])
def test_texts_that_change_while_a_model_is_made_do_no_harm(change, tmp_path, number, fill):
    """Whichever allocation the change falls on: the sanitizer is silent, and the model is refused or has the class
    names that were checked. Once metadata is copied, its change does not matter any more."""
    model = from_bytes(bases()[2])
    model.classes = [f"class {i}" for i in range(len(model.classes))]
    model.metadata = {"note": "x" * 1001}
    data = to_bytes(model)
    (tmp_path / "m.bnnf").write_bytes(data)
    at, size = section(data, number)
    rows = [tuple(map(int, line.split())) for line in output_of(
        change, tmp_path / "m.bnnf", at, size, ord(fill)).splitlines()]  # fmt: skip
    assert len(rows) > 5
    for _, status, other in rows:
        assert status >= 10 or not other
    if number == 5:
        copied = [asked for asked, _, _ in rows].index(size + 1)  # during which the change still counts
        after = [status for _, status, _ in rows[copied + 1 :]]
        assert rows[copied][1] >= 10 and after and not any(after)


# -- what a caller gives


@pytest.mark.parametrize("backend", backends())
def test_no_images_give_empty_arrays_of_the_right_shape(path, backend):
    engine = load(path, backend, threads=2)
    pixels = pixels_of(engine, 2)
    assert engine.run(pixels[:0]).shape == (0, *engine.run(pixels).shape[1:])
    full = engine.trace(pixels)
    empty = engine.trace(pixels[:0])
    assert {name: (0, *value.shape[1:]) for name, value in full.items()} == {n: v.shape for n, v in empty.items()}
    assert all(value.dtype == empty[name].dtype for name, value in full.items())
    assert len(engine.profile(pixels[:0], 1)) == len(engine.model.ops)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_array_of_pixels_is_an_error_that_names_it(path, backend):
    torch = pytest.importorskip("torch")
    engine = load(path, backend)
    shape = (1, *engine.model.image_shape)
    for given in (
        [[1], [1, 2]],
        torch.zeros(shape, requires_grad=True),
        None,
        "pixels",
        np.zeros(shape),
        [np.int64(3)],
    ):
        for use in (engine.run, engine.trace, engine.profile):
            with pytest.raises(EngineError, match=r"images: got .* expected uint8 \[N, "):
                use(given)
    equal(engine.run(torch.zeros(shape, dtype=torch.uint8)), engine.run(np.zeros(shape, np.uint8)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_images_than_memory_holds_are_an_error_at_once(path, backend):
    engine = load(path, backend, threads=2)
    with pytest.raises(MemoryError):
        engine.run(np.broadcast_to(pixels_of(engine, 1), (1 << 50, *engine.model.image_shape)))
    engine.run(pixels_of(engine, 1))


@pytest.mark.parametrize("repeat", [0, -1, 1.5, "2", None, True])
def test_repeats_that_are_no_number_are_refused(path, repeat):
    engine = load(path, "numpy")
    with pytest.raises(EngineError, match="repeat: got"):
        engine.profile(pixels_of(engine, 1), repeat)
    assert len(engine.profile(pixels_of(engine, 1), np.int64(1))) == len(engine.model.ops)


def test_a_path_in_place_of_a_model_is_an_error_that_names_load(path):
    for given in (str(path), path, None, path.read_bytes()):
        with pytest.raises(EngineError, match=r"model: got a .*load\(path\)"):
            Engine(given)


# -- the end of an engine


def test_an_engine_is_closed_when_its_block_fails(path):
    with pytest.raises(ZeroDivisionError), load(path, "numpy") as engine:
        1 / 0  # noqa: B018
    with pytest.raises(EngineError, match="closed"):
        engine.info()


@pytest.mark.parametrize("use", ["run", "copy"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_closing_while_other_threads_use_it_lets_what_is_under_way_end(path, backend, use):
    expected, wrong = load(path, "numpy").run(pixels_of(load(path, "numpy"))), []
    for _ in range(10):
        engine = load(path, backend, threads=2)
        pixels, started = pixels_of(engine), threading.Barrier(4)

        def work(engine=engine, pixels=pixels, started=started):
            started.wait()
            try:
                while True:
                    result = (copy.copy(engine) if use == "copy" else engine).run(pixels)
                    if not np.array_equal(result, expected, equal_nan=True):
                        wrong.append("other bits")
            except EngineError as error:
                if "closed" not in str(error):
                    wrong.append(str(error))
            except BaseException as error:
                wrong.append(repr(error))

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        started.wait()
        engine.close()
        for thread in threads:
            thread.join()
    assert wrong == []


# -- copies


def again(engine):
    return pickle.loads(pickle.dumps(engine))


class Named(Engine):
    """An engine of somebody's own."""


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("way", [again, copy.copy, copy.deepcopy])
def test_a_copy_is_an_engine_of_the_same_kind_bits_and_options(path, backend, way):
    engine = Named(read(path), backend, 2)
    pixels = pixels_of(engine)
    expected = engine.run(pixels)
    other = way(engine)
    engine.close()  # neither knows of the other
    assert type(other) is Named and (other.backend, other.threads) == (engine.backend, 2)
    equal(other.run(pixels), expected)
    equal(way(other).run(pixels), expected)


def addresses(engine):
    """Where the constants lie: of the model, and of the native runner."""
    model = [tensor.data for tensor in engine.model.tensors if tensor.place == "constant"]
    runner = [engine._runner.data] if engine.backend not in ("numpy", "reference") else []
    return [array.__array_interface__["data"][0] for array in [*model, *runner]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_share_the_bytes_of_the_file_and_those_of_a_pickle_are_there_once(path, backend):
    engine = load(path, backend)
    for other in (copy.copy(engine), copy.deepcopy(engine), copy.deepcopy({"a": [engine]})["a"][0]):
        assert addresses(other) == addresses(engine) and other.model is not engine.model
        other.model.classes[:] = ["other"] * len(other.model.classes)
    assert "other" not in engine.model.classes
    other = again(engine)
    start, size = np.frombuffer(other._data, np.uint8).ctypes.data, path.stat().st_size
    assert all(start <= at < start + size for at in addresses(other))
    with pytest.raises(ValueError, match="read-only"):
        next(tensor.data for tensor in other.model.tensors if tensor.place == "constant")[...] = 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", ["model", "bytes", "mapped"])
def test_engines_without_a_file_in_memory_pickle_too(path, backend, given):
    model = read(path)
    engine = {
        "model": lambda: Engine(model, backend),
        "bytes": lambda: Engine(model, backend, data=path.read_bytes()),
        "mapped": lambda: load(path, backend, mapped=True),
    }[given]()
    for way in (again, copy.deepcopy):
        equal(way(engine).run(pixels_of(engine)), engine.run(pixels_of(engine)))


def test_auto_is_chosen_anew_where_a_pickle_is_opened(path, monkeypatch):
    data = pickle.dumps(load(path, "auto"))
    monkeypatch.setattr("bnnfree.engine.isa_names", lambda: ())
    monkeypatch.setattr("bnnfree.engine._told", ["told"])
    assert pickle.loads(data).backend == "numpy"


def test_a_damaged_pickle_is_a_format_error(path):
    made, (kind, data, *options) = load(path, "numpy").__reduce__()
    for damaged in (data[:-1], b"", data[:-1] + bytes([data[-1] ^ 1])):
        with pytest.raises(FormatError):
            made(kind, damaged, *options)


# -- the caller's floating-point environment

MODES = {"flush": 1 << 15, "denormals are zero": 1 << 6, "both": 1 << 15 | 1 << 6, "down": 1 << 13, "up": 2 << 13,
         "to zero": 3 << 13}  # fmt: skip


@pytest.fixture(scope="module")
def mxcsr(tmp_path_factory):
    """A function that sets bits of MXCSR beside the default ones, and one that reads it."""
    folder = tmp_path_factory.mktemp("mxcsr")
    (folder / "set.c").write_text(
        "#ifdef __x86_64__\n#include <xmmintrin.h>\nvoid set(unsigned bits) { _mm_setcsr(0x1f80 | bits); }\n"
        "unsigned get(void) { return _mm_getcsr() & ~0x3fu; }\n#else\n#error no MXCSR\n#endif\n"
    )
    command = [*compiler(), "-shared", "-fPIC", str(folder / "set.c"), "-o", str(folder / "set.so")]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs x86-64")
    return ctypes.CDLL(str(folder / "set.so"))


def outcome(call):
    try:
        return call()
    except EngineError as error:
        return error


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", [5, 8, 12])
def test_numpy_refuses_an_environment_of_other_bits_and_native_gives_the_same(mxcsr, tmp_path, mode, seed):
    model = random_net(seed, "wild")
    pixels, engines = images(model, 2), {name: Engine(model, name, threads=2) for name in backends()}
    expected, data = engines["numpy"].run(pixels), to_bytes(model)
    (tmp_path / "m.bnnf").write_bytes(data)
    mxcsr.set(MODES[mode])
    try:
        for name in [name for name in engines if name not in ("numpy", "reference")]:  # made in that environment too
            engines |= {
                f"{name} made there": Engine(model, name, data=data),
                f"{name} loaded": load(tmp_path / "m.bnnf", name),
            }
            engines[f"{name} copied"] = again(engines[name])
        written = to_bytes(model)
        results = {name: outcome(lambda engine=engine: engine.run(pixels)) for name, engine in engines.items()}
        traces = [outcome(lambda n=name: engines[n].trace(pixels)) for name in ("numpy", "reference")]
        left = mxcsr.get()
    finally:
        mxcsr.set(0)
    assert left == 0x1F80 | MODES[mode] and written == data
    refused = [results.pop("numpy"), results.pop("reference"), *traces]
    assert all(isinstance(error, EngineError) and "in this thread" in str(error) for error in refused), refused
    for result in results.values():
        equal(result, expected)
    equal(engines["numpy"].run(pixels), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_numpy_told_to_raise_changes_nothing(backend):
    model = random_net(7, "wild")
    engine, pixels = Engine(model, backend, threads=2), images(model, 3)
    expected = engine.run(pixels)
    with np.errstate(all="raise"):
        equal(engine.run(pixels), expected)
        equal(again(engine).run(pixels), expected)
        engine.profile(pixels, 1)
        engine.trace(pixels)
