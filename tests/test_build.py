"""The native library: its build, its contents, a build that fails; and the header for users in C."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from cc import HERE, NATIVE, ROOT, STRICT, compiler, done, output_of, tool_of
from damage import bases
from packed import images
from PIL import Image

import bnnfree
from bnnfree import library as build
from bnnfree.commands import completion
from bnnfree.commands.console import COMMANDS
from bnnfree.engine import Engine
from bnnfree.engine.binding import isa_names, load_library
from bnnfree.format import from_bytes

ENGINE, FUSED = build.LIBRARIES
LIBRARY = re.compile(
    rf"bnnfree/(engine/_native/bnnfree|nn/fused/_native/fused)-[0-9a-f]{{16}}\{build.SUFFIX}"
)  # either
SOURCES = [*(path for folder in (NATIVE, NATIVE / "examples", HERE) for path in sorted(folder.glob("*.c"))),
           ROOT / "bnnfree" / "bench" / "peak.c", FUSED.sources / "fused.c"]  # fmt: skip


@pytest.fixture(scope="module")
def library():
    if not isa_names():
        pytest.skip(load_library()[1])
    return ENGINE.path()


# -- what the library is


def test_the_library_is_small(library, tmp_path):
    stripped = tmp_path / library.name
    output_of(tool_of("strip"), "-o", stripped, library)
    assert stripped.stat().st_size <= 1 << 19


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF")
def test_the_library_needs_libc_libm_and_threads_and_nothing_else(library):
    dynamic = output_of(tool_of("readelf"), "-d", library)
    needed = set(re.findall(r"NEEDED.*\[(.*?)\]", dynamic))
    assert needed <= {"libc.so.6", "libm.so.6", "libpthread.so.0"} and "libc.so.6" in needed


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF")
def test_the_library_exports_what_the_header_declares_and_nothing_else(library):
    exported = {line.split()[-1] for line in output_of(tool_of("nm"), "-D", "--defined-only", library).splitlines()}
    text = (NATIVE / "bnnfree.h").read_text()
    declared = set(re.findall(r"^BNNF_API [\w *]*?(bnnf_\w+)\(", text, re.M))
    assert len(declared) >= 13 and exported == declared


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF")
def test_the_library_reads_no_environment_and_a_monotonic_clock(library):
    used = output_of(tool_of("nm"), "-D", "--undefined-only", library)
    names = {line.split()[-1].partition("@")[0] for line in used.splitlines()}
    assert "clock_gettime" in names and not names & {"timespec_get", "getenv", "secure_getenv"}


# -- in C


BARE = ["-DBNNF_NO_THREADS", "-DBNNF_NO_SIMD"]
FILES = ["x.so", "x.so.sha256"]
SLOW = pytest.mark.slow  # little that the others do not see: python -m pytest -m slow tests/test_build.py


@pytest.mark.sample(4)
@pytest.mark.parametrize(("command", "options"), [
    ("gcc", []), ("gcc", BARE), ("clang", []), ("aarch64-linux-gnu-gcc", BARE),
    pytest.param("clang", BARE, marks=SLOW), pytest.param("aarch64-linux-gnu-gcc", [], marks=SLOW),
])  # fmt: skip
def test_the_sources_compile_without_a_warning(command, options, tmp_path):
    """Optimised, since some warnings need that. Texts above 4095 bytes: assembly, for these compilers alone."""
    tool_of(command)
    for source in SOURCES:
        if source.name == "fused.c" and options == BARE and command == "gcc":
            continue  # it knows none of these options
        flags = [*STRICT, "-Wno-overlength-strings", "-O2", "-ffp-contract=off", *options]
        flags += [f"-I{NATIVE}", f"-I{FUSED.sources}"]
        output_of(command, *flags, "-c", source, "-o", tmp_path / "x.o")


@pytest.mark.parametrize(("name", "options", "said"), [
    ("file.c", ["-U__BYTE_ORDER__", "-D__BYTE_ORDER__=__ORDER_BIG_ENDIAN__"], "little-endian"),
    ("kernel_scalar.c", ["-U__FLT_EVAL_METHOD__", "-D__FLT_EVAL_METHOD__=2"], "-mfpmath=sse"),
    ("kernel_scalar.c", ["-ffast-math"], "-ffast-math"),
    ("kernel_scalar.c", ["-ffinite-math-only"], "-ffinite-math-only"),
])  # fmt: skip
def test_where_other_numbers_would_come_out_it_does_not_compile(name, options, said):
    refused = done(*compiler(), "-std=c11", *options, "-fsyntax-only", NATIVE / name)
    assert refused.returncode != 0 and said in refused.stderr


@pytest.mark.parametrize("language", ["c", "c++"])
def test_the_header_stands_alone_in_c_and_in_cpp(language, tmp_path):
    code = '#include "bnnfree.h"\n#include "bnnfree.h"\nint main(void) { return bnnf_default_params().threads != 1; }\n'
    (tmp_path / "x.c").write_text(code)
    command = compiler() if language == "c" else [tool_of("c++")]
    flags = STRICT if language == "c" else ["-std=c++11", "-Wall", "-Wextra", "-Werror", "-pedantic"]
    output_of(*command, *flags, f"-I{NATIVE}", "-x", language, "-c", tmp_path / "x.c", "-o", tmp_path / "x.o")


@pytest.mark.thorough
@pytest.mark.parametrize("options", [[], ["-DBNNF_NO_THREADS"]], ids=["threads", "no threads"])
def test_the_program_in_the_header_classifies(options, tmp_path):
    """Compiled by one line, it names the class that numpy finds."""
    text = (NATIVE / "bnnfree.h").read_text()
    program = text[text.index("       #include <stdio.h>") : text.index("   Threads: a model")]
    example = NATIVE / "examples" / "minimal.c"
    assert [line[7:] for line in program.strip("\n ").splitlines()][1:] == example.read_text().splitlines()[1:]
    sources = [example, *sorted(NATIVE.glob("*.c"))]
    libraries = ["-lm", *([] if options else ["-pthread"])]
    flags = ["-std=c11", "-O0", "-ffp-contract=off", *options, f"-I{NATIVE}"]
    output_of(*compiler(), *flags, *sources, "-o", tmp_path / "minimal", *libraries)
    (tmp_path / "m.bnnf").write_bytes(bases()[2])
    model = from_bytes(bases()[2])
    for i, image in enumerate(images(model, 3)):
        (tmp_path / "pixels").write_bytes(image.tobytes())
        said = output_of(tmp_path / "minimal", tmp_path / "m.bnnf", tmp_path / "pixels")
        best = Engine(model, "numpy").run(images(model, 3)[i : i + 1])[0].argmax()
        assert said == f"{model.classes[best]}\n"
    refused = subprocess.run([tmp_path / "minimal", tmp_path / "pixels", tmp_path / "pixels"], capture_output=True)
    assert refused.returncode == 1 and refused.stderr.count(b"\n") == 1


# -- making it


@pytest.fixture
def little(tmp_path, monkeypatch):
    """Sources that compile in no time, in place of the engine's; their folder."""
    compiler()
    folder = tmp_path / "native"
    folder.mkdir()
    (folder / "x.c").write_text("int bnnf_x(void) { return 1; }\n")
    monkeypatch.setattr(ENGINE, "sources", folder)
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="ELF and Mach-O")
def test_a_function_that_is_declared_but_missing_fails_the_build(little, tmp_path, capsys):
    """As of a line of kernels.h without its kernel; else it would be whoever loads the library that fails."""
    (little / "x.c").write_text("int bnnf_y(void);\nint bnnf_x(void) { return bnnf_y(); }\n")
    assert ENGINE.build(tmp_path / "x.so", verbose=True) is None
    assert "bnnf_y" in capsys.readouterr().out.splitlines()[-1] and not (tmp_path / "x.so").exists()
    (little / "y.c").write_text("int bnnf_y(void) { return 1; }\n")
    assert ENGINE.build(tmp_path / "x.so") == tmp_path / "x.so"


def test_the_library_is_called_after_what_it_is_made_of_and_for(tmp_path, monkeypatch, library):
    assert library.name == ENGINE.name()
    shutil.copytree(NATIVE, tmp_path / "native")
    monkeypatch.setattr(ENGINE, "sources", tmp_path / "native")
    assert library.name == ENGINE.name()
    for name in ("run.c", "internal.h"):
        before = ENGINE.name()
        with open(tmp_path / "native" / name, "a") as file:
            file.write("\n")
        assert ENGINE.name() != before
    (tmp_path / "native" / "run.c").rename(tmp_path / "native" / "go.c")
    names = {before, ENGINE.name()}
    for where, what, value in ((ENGINE, "flags", [*ENGINE.flags, "-g"]), (build.platform, "machine", lambda: "vax"),
                               (sys, "maxsize", 2**31 - 1 if sys.maxsize > 2**32 else 2**63 - 1)):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(where, what, value)
            names.add(ENGINE.name())
    assert len(names) == 5


def test_build_writes_where_it_is_told_and_nothing_else(tmp_path, little):
    out = ENGINE.build(tmp_path / "deep" / "x.so")
    assert out == tmp_path / "deep" / "x.so" and sorted(p.name for p in out.parent.iterdir()) == FILES
    (little / "x.c").write_text("no C")
    before = out.read_bytes()
    assert (
        ENGINE.build(out) is None
        and out.read_bytes() == before
        and sorted(p.name for p in out.parent.iterdir()) == FILES
    )


def test_changed_sources_are_compiled_again_and_old_libraries_go(tmp_path, monkeypatch, little):
    monkeypatch.setattr(ENGINE, "place", tmp_path / "_native")
    monkeypatch.setattr(build, "cache", lambda: None)
    first = ENGINE.path()
    assert ENGINE.path() == first and first.parent == tmp_path / "_native"
    torn, going_on = (first.with_name(f".{first.name}.{number}.00.tmp") for number in (1, 2))
    torn.touch()
    going_on.touch()
    for old in (first, torn):
        os.utime(old, (0, 0))
    (little / "x.c").write_text("int bnnf_x(void) { return 2; }\n")
    second = ENGINE.path()
    assert second != first and sorted(second.parent.iterdir()) == sorted([going_on, second, build.digest_of(second)])


def test_where_the_package_cannot_be_written_the_cache_takes_it(tmp_path, monkeypatch, little):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(ENGINE, "place", tmp_path / "file" / "_native")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "cache"))
    path = ENGINE.path()
    assert (tmp_path / "cache") in path.parents and ENGINE.path() == path


@pytest.mark.parametrize(("variable", "said"), [
    ("none-such", "none-such"), ("false", "false failed"), ("true", "wrote nothing"), ('cc "-O2', "No closing"),
])  # fmt: skip
def test_a_compiler_that_is_none_is_named(monkeypatch, tmp_path, capsys, variable, said):
    tool_of("false")
    monkeypatch.setenv("CC", variable)
    assert ENGINE.build(tmp_path / "x.so") is None and capsys.readouterr().out == ""
    assert ENGINE.build(tmp_path / "x.so", verbose=True) is None and said in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


# -- without it


@pytest.fixture
def bare(tmp_path):
    """A copy of the package without a library, an empty cache and no compiler: (folder, environment)."""
    shutil.copytree(ROOT / "bnnfree", tmp_path / "bnnfree", ignore=shutil.ignore_patterns("_native", "__pycache__"))
    (tmp_path / "m.bnnf").write_bytes(bases()[0])
    model = from_bytes(bases()[0])
    np.save(tmp_path / "x.npy", images(model, 3))
    np.save(tmp_path / "y.npy", Engine(model, "numpy").run(images(model, 3)))
    homes = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"), str(tmp_path / "home"))
    return tmp_path, {"PYTHONPATH": str(tmp_path), "CC": str(tmp_path / "nonexistent"), **homes}


def python(bare, code):
    folder, environment = bare
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


def test_without_a_compiler_numpy_runs_after_one_line_of_warning(bare):
    code = (
        "import numpy as np; from bnnfree.engine import backends, load\n"
        "assert backends() == ['numpy', 'reference'], backends()\n"
        "for _ in range(3):\n"
        "    engine = load('m.bnnf', threads=2)\n"
        "    assert engine.info()['backend'] == 'numpy'\n"
        "    assert np.array_equal(engine.run(np.load('x.npy')), np.load('y.npy'), equal_nan=True)\n"
    )
    done = python(bare, code)
    assert done.returncode == 0, done.stderr
    warned = [line for line in done.stderr.splitlines() if "Warning" in line]
    assert len(warned) == 1 and "native engine" in warned[0] and "nonexistent" in warned[0], done.stderr
    assert python(bare, "from bnnfree.engine import load; load('m.bnnf', 'numpy')").stderr == ""


@pytest.mark.parametrize("backend", ["native", "scalar"])
def test_without_a_compiler_a_native_backend_is_an_error_that_says_why(bare, backend):
    done = python(bare, f"from bnnfree.engine import load; load('m.bnnf', {backend!r})")
    said = done.stderr.splitlines()[-1]
    assert "EngineError" in said and backend in said and "nonexistent" in said


# -- installing


@pytest.fixture
def sources(tmp_path):
    """The files that an install needs, as in a clean checkout; its C code is next to nothing."""
    pytest.importorskip("setuptools")
    clean = shutil.ignore_patterns("_native", "__pycache__")
    shutil.copytree(ROOT / "bnnfree", tmp_path / "checkout" / "bnnfree", ignore=clean)
    for name in ("setup.py", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "checkout")
    for library in build.LIBRARIES:
        for source in (tmp_path / "checkout" / library.sources.relative_to(ROOT)).glob("*.c"):
            source.write_text(f"int bnnf_{source.stem}(void) {{ return 1; }}\n")  # compiles in no time
    return tmp_path / "checkout"


def test_the_command_prints_the_paths_last(sources):
    compiler()
    printed = output_of(sys.executable, "-m", "bnnfree.library", cwd=sources)
    made = libraries_of(sources)
    assert len(made) == 2 and all(LIBRARY.fullmatch(path) for path in made)
    assert sorted(printed.splitlines()[-2:]) == [str(sources / path) for path in made]


def libraries_of(sources):
    """The libraries where they are built, beside their sources; each has its digest beside it."""
    found = sorted(path.relative_to(sources).as_posix() for path in sources.glob("bnnfree/**/_native/*"))
    made = [path for path in found if not path.endswith(".sha256")]
    assert found == sorted([*made, *(f"{path}.sha256" for path in made)])
    return made


def wheel_of(sources, **environment):
    out = sources.parent / "wheels"
    options = ["--no-build-isolation", "--no-deps", "--no-index", "-q", "-w", out]
    command = [sys.executable, "-m", "pip", "wheel", *options, sources]
    output_of(*command, env={**os.environ, **environment})
    (wheel,) = out.iterdir()
    return wheel, zipfile.ZipFile(wheel).namelist()


def test_a_wheel_holds_the_library_and_is_for_the_platform_and_any_python(sources):
    compiler()
    wheel, names = wheel_of(sources)
    assert re.fullmatch(r"bnnfree-.*-py3-none-(?!any)\w+\.whl", wheel.name)
    assert len([name for name in names if LIBRARY.fullmatch(name)]) == 2
    assert {"bnnfree/nn/fused/native/fused.c", "bnnfree/nn/fused/native/passes.h"} <= set(names)
    assert {f"bnnfree/engine/native/{p.name}" for p in NATIVE.glob("*.[ch]")} <= set(names)
    assert "bnnfree/bench/peak.c" in names and not [n for n in names if ".data/" in n]


def test_a_wheel_without_a_compiler_is_pure(sources):
    wheel, names = wheel_of(sources, CC="/nonexistent")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in names if "_native/" in name] and "bnnfree/engine/native/bnnfree.h" in names


@pytest.mark.thorough
def test_an_installed_package_trains_exports_verifies_and_predicts_by_names(tmp_path):
    """From a wheel, in an empty folder, with nothing of the checkout on the path."""
    clean = shutil.ignore_patterns("_native", "__pycache__", "*.egg-info")
    for name in ("bnnfree", "recipes", "models"):
        shutil.copytree(ROOT / name, tmp_path / "checkout" / name, ignore=clean)
    for name in ("setup.py", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "checkout")
    wheel, names = wheel_of(tmp_path / "checkout")
    assert {"bnnfree/shelf/recipes/reactnet_nobn.yaml", "bnnfree/shelf/recipes/sweeps/free.yaml"} <= set(names)
    assert "bnnfree/shelf/models/pretrained/cifar10_reactnet18_half.bnnf" in names
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    how = ["--no-deps", "--no-index", "-q", "--target", site]
    output_of(sys.executable, "-m", "pip", "install", *how, wheel)
    script = (site / "bin" / "bnnfree").read_text()
    assert "bnnfree.commands.console" in script

    def python(*arguments):
        where = {"cwd": empty, "env": {**os.environ, "PYTHONPATH": str(site)}}
        return output_of(sys.executable, *arguments, **where).splitlines()

    def command(*arguments):
        return python("-m", "bnnfree", *arguments)

    code = "from bnnfree.errors import missing; print(missing('torch'))"
    assert python("-c", code) == ['torch, which is not installed. Install it with: pip install "bnnfree[train]"']

    Image.new("RGB", (30, 40), "red").save(empty / "x.png")
    assert command("--version") == [f"bnnfree {bnnfree.__version__}"]
    assert any("bnnfree train reactnet_nobn" in line for line in command("train", "--help"))
    trained = command("train", "reactnet_nobn", "stages.0.epochs=1", "stages.1.epochs=1")
    assert trained[-1] == str(Path("runs") / "reactnet_nobn")
    assert command("export", "runs/reactnet_nobn", "-o", "m.bnnf")[-1] == "m.bnnf"
    assert command("verify", "runs/reactnet_nobn", "m.bnnf", "--samples", 4, "--agreement", 0)[-1] == "equal"
    for model in ("m.bnnf", "cifar10_reactnet18_half"):
        assert command("predict", model, "x.png", "--top", 1)[0] == "x.png"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command_and_its_options(shell):
    text = completion.script(shell)
    assert all(name in text for name in COMMANDS) and "dry-run" in text and "with-recipe" in text
    if shell == "bash":
        for typed, offered in (("tra", "train"), ("export --with-r", "--with-recipe"), ("nothing -", "")):
            line = f"COMP_WORDS=(bnnfree {typed}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _bnnfree"
            assert output_of("bash", "-c", f'{text}\n{line}; echo "${{COMPREPLY[*]}}"') == f"{offered}\n"


def test_every_command_has_a_line_a_front_and_a_main():
    fronts = {path.stem for path in (ROOT / "tools").glob("*.py")} - {"gen_format"}
    assert fronts == set(COMMANDS)
    for name in COMMANDS:
        assert callable(importlib.import_module(f"bnnfree.commands.{name}").main)
        assert f"from bnnfree.commands.{name} import main" in (ROOT / "tools" / f"{name}.py").read_text()


@pytest.mark.parametrize(("arguments", "code", "words"), [
    ([], 2, "usage: bnnfree COMMAND"), (["trian"], 2, "'train'"), (["--help"], 0, "say what is on images"),
    (["train", "none.yaml"], 2, "none.yaml"),
])  # fmt: skip
def test_the_command_says_what_there_is(arguments, code, words):
    done = subprocess.run([sys.executable, "-m", "bnnfree", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and words in done.stdout + done.stderr, done


@pytest.mark.parametrize("options", [{}, {"CC": "/nonexistent"}], ids=["compiler", "no compiler"])
def test_an_editable_install_builds_in_the_checkout_or_does_without(sources, options):
    target = sources.parent / "site"
    how = ["--no-build-isolation", "--no-deps", "--no-index", "-q", "--target", target]
    command = [sys.executable, "-m", "pip", "install", *how, "-e", sources]
    output_of(*command, env={**os.environ, **options})
    made = libraries_of(sources)
    if options:
        assert made == []
    else:
        compiler()
        assert len(made) == 2 and all(LIBRARY.fullmatch(path) for path in made)
