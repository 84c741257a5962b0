"""The C library in other people's builds: CMake and make, installed and as a folder of sources.

Nothing is optimised and little has vector kernels, to compile faster: what the library computes, test_native.py and
test_suite_c.py look at.
"""

import json
import os
import re
import shutil

import numpy as np
import pytest
from cc import NATIVE, compiler, done, engine_sources, output_of, tool_of
from damage import bases
from packed import images

from bnnfree.engine import Engine
from bnnfree.format import from_bytes

PACKAGE = "find_package(bnnfree REQUIRED)"
FAST = "-Wall -Wextra -Werror -DBNNF_NO_SIMD"
FOLDER = f"add_subdirectory({NATIVE.as_posix()} bnnfree)"
CONSUMER = """
cmake_minimum_required(VERSION 3.16)
project(consumer LANGUAGES C)
{how}
add_executable(consumer main.c)
target_link_libraries(consumer PRIVATE bnnfree::bnnfree)
"""


def classifies(program, folder, **more):
    """The program of the header, given a model and pixels, names the class that numpy finds."""
    model = from_bytes(bases()[2])
    pixels = images(model, 2)
    (folder / "m.bnnf").write_bytes(bases()[2])
    for image, logits in zip(pixels, Engine(model, "numpy").run(pixels), strict=True):
        (folder / "pixels").write_bytes(image.tobytes())
        said = output_of(program, folder / "m.bnnf", folder / "pixels", env={**os.environ, **more})
        assert said == f"{model.classes[np.argmax(logits)]}\n"


@pytest.fixture
def cmake():
    """cmake(source, build, *options, flags=FAST): configures and builds."""
    tool_of("cmake")
    compiler()
    if shutil.which("ninja") is None:
        tool_of("make")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []

    def run(source, build, *options, flags=FAST):
        plain = "-DCMAKE_BUILD_TYPE=Debug", f"-DCMAKE_C_FLAGS={flags}"
        output_of("cmake", *generator, "-S", source, "-B", build, *plain, *options)
        output_of("cmake", "--build", build, "-j", "2")

    return run


def consumer(folder, how):
    folder.mkdir()
    (folder / "CMakeLists.txt").write_text(CONSUMER.format(how=how))
    shutil.copy(NATIVE / "examples" / "minimal.c", folder / "main.c")
    return folder


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("shared", "flags"), [("ON", "-Wall -Wextra -Werror"), ("OFF", FAST)], ids=["shared", "static"]
)
def test_cmake_installs_a_package_that_is_found(shared, flags, cmake, tmp_path):
    """Even where the installed folder was moved to."""
    options = [f"-DBUILD_SHARED_LIBS={shared}", f"-DCMAKE_INSTALL_PREFIX={tmp_path}/first"]
    cmake(NATIVE, tmp_path / "build", *options, flags=flags)
    classifies(tmp_path / "build" / "minimal", tmp_path)
    output_of("cmake", "--install", tmp_path / "build")
    (tmp_path / "first").rename(tmp_path / "moved")
    installed = {path.name for path in (tmp_path / "moved").rglob("*") if path.is_file()}
    assert {"bnnfree.h", "bnnfreeConfig.cmake"} <= installed
    assert bool({"libbnnfree.so", "libbnnfree.dylib", "bnnfree.dll"} & installed) == (shared == "ON")
    cmake(consumer(tmp_path / "app", PACKAGE), tmp_path / "app" / "build", f"-DCMAKE_PREFIX_PATH={tmp_path}/moved")
    classifies(tmp_path / "app" / "build" / "consumer", tmp_path)


@pytest.mark.parametrize("options", [[], ["-DBUILD_SHARED_LIBS=ON"], ["-DBNNFREE_THREADS=OFF"]],
                         ids=["static", "shared", "no threads"])  # fmt: skip
def test_cmake_takes_the_folder_into_a_project(options, cmake, tmp_path):
    cmake(consumer(tmp_path / "app", FOLDER), tmp_path / "build", *options)
    classifies(tmp_path / "build" / "consumer", tmp_path)
    assert not (tmp_path / "build" / "bnnfree" / "minimal").exists()  # the example is for whoever builds it alone


def test_cmake_optimises_unless_it_is_told_otherwise(tmp_path):
    tool_of("cmake")
    compiler()
    for options, optimised in (([], True), (["-DCMAKE_BUILD_TYPE=Debug"], False)):
        build = tmp_path / str(optimised)
        output_of("cmake", "-S", NATIVE, "-B", build, "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", *options)
        commands = json.loads((build / "compile_commands.json").read_text())
        assert len(commands) == len(engine_sources()) + 1
        assert all((re.search(r"-O[23]", c["command"]) is not None) == optimised for c in commands)


@pytest.mark.thorough
def test_make_builds_and_installs(tmp_path):
    """The installed files are enough for one line of the compiler."""
    tool_of("make")
    shutil.copytree(NATIVE, tmp_path / "native", ignore=shutil.ignore_patterns("build"))
    command = compiler()
    arguments = [f"CC={' '.join(command)}", "CFLAGS=-O0 -Werror", f"PREFIX={tmp_path}/usr"]
    output_of("make", "-j2", "-C", tmp_path / "native", "all", "install", *arguments)
    classifies(tmp_path / "native" / "build" / "minimal", tmp_path)
    paths = [f"-I{tmp_path}/usr/include", NATIVE / "examples" / "minimal.c", f"-L{tmp_path}/usr/lib"]
    output_of(*command, *paths, "-lbnnfree", "-lm", "-pthread", "-o", tmp_path / "minimal")
    place = str(tmp_path / "usr" / "lib")
    classifies(tmp_path / "minimal", tmp_path, LD_LIBRARY_PATH=place, DYLD_LIBRARY_PATH=place)
    assert done("make", "-C", tmp_path / "native", "clean").returncode == 0
    assert not (tmp_path / "native" / "build").exists()
