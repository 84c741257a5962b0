"""An engine from load to close: its file, its memory, its copies, and the floating-point mode that it runs in."""

from __future__ import annotations

import copy
import ctypes
import gc
import multiprocessing
import os
import pickle
import platform
import stat
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from damage import bases
from packed import images

from bnnfree import library as build
from bnnfree.engine import Engine, EngineError, backends, load
from bnnfree.files import OutputError, replacing
from bnnfree.format import from_bytes, read

KINDS = [name for name in ("native", "numpy") if name in backends()]
native = pytest.mark.skipif("native" not in KINDS, reason="no C compiler")
needs_posix = pytest.mark.skipif(not hasattr(os, "getuid"), reason="users and modes of files are those of POSIX")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "m.bnnf"
    path.write_bytes(bases()[0])
    return path


def answers(engine):
    return engine.run(images(engine.model, 3))


# -- the file


@pytest.mark.parametrize("change", ["truncated", "overwritten", "removed"])
@pytest.mark.parametrize("backend", KINDS)
def test_a_file_that_changes_after_it_was_loaded_changes_nothing(file, backend, change):
    engine, model = load(file, backend), read(file)
    before = answers(engine)
    if change == "removed":
        file.unlink()
    else:
        with open(file, "r+b") as out:
            out.truncate(0) if change == "truncated" else out.write(b"\xff" * len(bases()[0]))
    assert answers(engine).tobytes() == before.tobytes()
    assert answers(Engine(model, backend)).tobytes() == before.tobytes()


@pytest.mark.parametrize("backend", KINDS)
def test_a_mapped_file_gives_the_same_answers(file, backend):
    assert answers(load(file, backend, mapped=True)).tobytes() == answers(load(file, backend)).tobytes()


def test_an_empty_file_is_refused_either_way(tmp_path):
    (tmp_path / "m.bnnf").write_bytes(b"")
    for mapped in (False, True):
        with pytest.raises(Exception, match="m.bnnf: got b''|first bytes"):
            load(tmp_path / "m.bnnf", mapped=mapped)


# -- the end


@pytest.mark.parametrize("backend", KINDS)
def test_a_dropped_engine_is_freed_at_once(file, backend):
    gc.disable()
    try:
        descriptors, tasks = (len(os.listdir(f"/proc/self/{kind}")) for kind in ("fd", "task"))
        for _ in range(3):
            engine = load(file, backend, threads=2)
            answers(engine)
            gone = weakref.ref(engine._runner)
            del engine
            assert gone() is None
        if backend == "native":
            assert len(os.listdir("/proc/self/task")) <= tasks
        assert len(os.listdir("/proc/self/fd")) == descriptors
    except FileNotFoundError:
        pytest.skip("no /proc to count in")
    finally:
        gc.enable()


@pytest.mark.parametrize("backend", KINDS)
def test_a_closed_engine_says_so_and_may_be_closed_again(file, backend):
    with load(file, backend) as engine:
        pixels = images(engine.model, 1)
        engine.run(pixels)
    engine.close()
    for use in (
        lambda: engine.run(pixels), lambda: engine.trace(pixels), engine.info, engine.kernels,
        lambda: engine.profile(pixels), lambda: engine.model, lambda: pickle.dumps(engine),
    ):  # fmt: skip
        with pytest.raises(EngineError, match="is closed"):
            use()


# -- copies


@pytest.mark.parametrize("backend", ["auto", *KINDS])
def test_an_engine_is_pickled_and_copied_with_its_bytes_and_options(file, backend):
    engine = load(file, backend, threads=2)
    before = answers(engine)
    made = Engine(from_bytes(bases()[0]), backend, np.int64(2))
    file.unlink()
    for other in (pickle.loads(pickle.dumps(engine)), copy.deepcopy(engine), copy.copy(engine), copy.copy(made)):
        assert other is not engine and (other.backend, other.threads) == (engine.backend, 2)
        assert answers(other).tobytes() == before.tobytes()


@pytest.mark.parametrize("backend", KINDS)
def test_an_engine_goes_to_a_process_that_was_spawned(file, backend):
    engine = load(file, backend)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        theirs = pool.apply(engine.run, (images(engine.model, 2),))
    assert theirs.tobytes() == engine.run(images(engine.model, 2)).tobytes()


@pytest.mark.parametrize("threads", [0, -1, 1.0, "2", None, True, np.float32(1)])
def test_threads_that_are_no_number_are_refused(file, threads):
    with pytest.raises(EngineError, match="threads: got"):
        load(file, threads=threads)


# -- the floating-point mode


MODES = {"round down": 0x400, "round up": 0x800, "round to zero": 0xC00}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or platform.machine() != "x86_64", reason="glibc's fesetround")
@pytest.mark.parametrize("mode", MODES)
def test_numpy_refuses_another_rounding_and_native_does_not_care(file, mode):
    libm = ctypes.CDLL("libm.so.6")
    engines = {name: load(file, name) for name in (*KINDS, "reference")}
    before = {name: answers(engine) for name, engine in engines.items()}
    inputs = images(engines["numpy"].model, 3)
    assert libm.fesetround(MODES[mode]) == 0
    try:
        for name, engine in engines.items():
            if name == "native":
                assert engine.run(inputs).tobytes() == before[name].tobytes()
                continue
            for use in (engine.run, engine.trace):
                with pytest.raises(EngineError, match="not rounded to the nearest"):
                    use(inputs)
    finally:
        libm.fesetround(0)
    assert answers(engines["numpy"]).tobytes() == before["numpy"].tobytes()


def test_numpy_refuses_to_flush_denormals(file):
    torch = pytest.importorskip("torch")
    engine = load(file, "numpy")
    inputs = images(engine.model, 1)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU does not flush denormal numbers")
    try:
        with pytest.raises(EngineError, match="flushed to zero.*set_flush_denormal"):
            engine.run(inputs)
    finally:
        torch.set_flush_denormal(False)
    engine.run(inputs)


def test_numpys_own_error_state_is_not_the_engines(file):
    before = answers(load(file, "numpy"))
    with np.errstate(all="raise"):
        assert answers(load(file, "numpy")).tobytes() == before.tobytes()


# -- the compiled library


@pytest.fixture
def places(tmp_path, monkeypatch):
    """The engine's library with a package folder and a cache of its own, for two C files that compile in no time."""
    sources = tmp_path / "native"
    sources.mkdir()
    (sources / "a.c").write_text("int bnnf_a(void) { return 1; }\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return build.Library("probe", sources, ["-O0"], "nothing")


@native
@needs_posix
def test_a_library_that_others_may_write_is_not_loaded(places, tmp_path):
    first = places.path()
    assert first.parent == tmp_path / "_native" and places.path() == first
    content, stamp = first.read_bytes(), first.stat().st_mtime_ns
    os.chmod(first, 0o666)
    assert places.path() == first and first.stat().st_mtime_ns != stamp  # made anew, for the folder is ours
    assert not first.stat().st_mode & stat.S_IWOTH and first.read_bytes() == content
    os.chmod(first.parent, 0o777)
    second = places.path()
    assert second.parent == tmp_path / "cache" / "bnnfree" and not second.parent.stat().st_mode & 0o077
    os.chmod(second.parent, 0o777)
    with pytest.raises(build.BuildFailure, match="of this user's"):
        places.path()


@native
@needs_posix
@pytest.mark.parametrize("mask", [0o000, 0o002, 0o077])
def test_a_library_is_compiled_once_under_any_umask(places, tmp_path, mask):
    """A file or folder that others may write would be refused, and compiled anew at every start."""
    before = os.umask(mask)
    try:
        path = places.path()
        stamp = path.stat().st_mtime_ns
        assert places.path() == path and path.stat().st_mtime_ns == stamp
    finally:
        os.umask(before)
    assert path.parent == tmp_path / "_native"
    for made in (path, path.parent, build.digest_of(path)):
        assert not made.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="reads XDG_CACHE_HOME")
def test_a_cache_that_is_no_absolute_path_does_not_count(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    for given in ("", "cache", "./cache", "../cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert build.cache() == Path("/home/somebody/.cache/bnnfree")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/x")
    assert build.cache() == Path("/var/cache/x/bnnfree")
    for given in ("cache", ""):
        monkeypatch.setenv("HOME", "somewhere")
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert build.cache() is None


@native
@pytest.mark.parametrize("damage", ["cut", "changed", "no digest", "empty"])
def test_a_torn_library_is_made_again(places, damage):
    path = places.path()
    content = path.read_bytes()
    if damage == "no digest":
        build.digest_of(path).unlink()
    else:
        torn = {"cut": content[: len(content) // 2], "changed": content[:-1] + b"?", "empty": b""}[damage]
        path.write_bytes(torn)
    assert places.path() == path
    assert build._is_whole(path) and ctypes.CDLL(str(path)).bnnf_a() == 1


@native
@needs_posix
@pytest.mark.parametrize("home", ["missing", "read-only"])
def test_a_home_that_cannot_be_written_is_one_line_of_warning_at_most(tmp_path, home):
    folder = tmp_path / "höme mit Leerzeichen"
    folder.mkdir()
    if home == "read-only":
        folder.chmod(0o500)
    (tmp_path / "m.bnnf").write_bytes(bases()[0])
    environment = {**os.environ, "HOME": str(folder / ("none" if home == "missing" else ""))}
    environment.pop("XDG_CACHE_HOME", None)
    code = "from bnnfree.engine import load; print(load('m.bnnf').info()['backend'])"
    root = Path(build.__file__).resolve().parent.parent
    environment["PYTHONPATH"] = str(root)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stderr.splitlines()) <= 2, done.stderr


# -- temporaries


@needs_posix
def test_a_temporary_is_new_and_follows_no_link(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr("secrets.token_hex", lambda count: "00")
    (tmp_path / f".x.json.{os.getpid()}.00.tmp").symlink_to(victim)
    said = r"x\.json: cannot be written: File exists"
    with pytest.raises(OutputError, match=said), replacing(tmp_path / "x.json"):
        raise AssertionError("never")
    assert victim.read_text() == "precious"


@needs_posix
def test_a_written_file_has_the_mode_that_the_umask_gives(tmp_path):
    for mask in (0o022, 0o077):
        before = os.umask(mask)
        try:
            with replacing(tmp_path / f"f{mask}") as temporary:
                temporary.write_text("x")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / f"f{mask}").stat().st_mode) == 0o666 & ~mask


def test_what_cannot_be_written_is_one_error_and_loses_nothing(tmp_path):
    (tmp_path / "file").write_text("old")
    for path in (tmp_path / "file" / "x", tmp_path, tmp_path / ("n" * 300), tmp_path / "a\0b"):
        with pytest.raises(OutputError, match="cannot be written") as caught, replacing(path) as temporary:
            temporary.write_text("new")
        assert "\n" not in str(caught.value)
    with pytest.raises(OutputError, match="disk full"), replacing(tmp_path / "file"):
        raise OSError(28, "No space left on device")
    assert (tmp_path / "file").read_text() == "old" and sorted(tmp_path.iterdir()) == [tmp_path / "file"]


def test_errors_that_are_not_of_the_disk_pass_and_hidden_ones_are_found(tmp_path):
    for error in (ConnectionResetError(104, "reset"), FileNotFoundError(2, "none", "other"), ValueError("null")):
        with pytest.raises(type(error)), replacing(tmp_path / "x"):
            raise error
    with pytest.raises(OutputError, match="disk full"), replacing(tmp_path / "x"):
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise RuntimeError("unexpected position") from error
    assert not list(tmp_path.iterdir())
