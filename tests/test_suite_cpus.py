"""The C code by its own test program, native/suite.c: with threads under ThreadSanitizer, and on other CPUs.

Skipped, with the reason, where a compiler, the sanitizer or an emulator is missing. See test_suite_c.py.
"""

import sys

import pytest
from cases import check, program, write_goldens
from cc import TSAN, TSAN_FINDS, compiler, needs, tool_of

from bnnfree.engine.binding import isa_names, load_library

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs the linker's --wrap")

CPUS = [  # the cross compiler and its options, the emulator
    (["aarch64-linux-gnu-gcc"], "qemu-aarch64"),
    (["arm-linux-gnueabihf-gcc"], "qemu-arm"),  # 32 bits
    (["i686-linux-gnu-gcc", "-msse2", "-mfpmath=sse"], "qemu-i386"),
]


@pytest.fixture(scope="module")
def few_goldens(tmp_path_factory):
    return write_goldens(tmp_path_factory.mktemp("cases"), randoms=6, wides=1)


@pytest.mark.thorough
@pytest.mark.skipif(not isa_names(), reason=load_library()[1])
def test_thread_sanitizer_finds_nothing(tmp_path, few_goldens):
    needs(compiler(), TSAN, TSAN_FINDS, tmp_path)
    check([program(tmp_path, compiler(), *TSAN, "-O1")], few_goldens, len(isa_names()))


@pytest.mark.parametrize(("command", "emulator"), CPUS, ids=[emulator[5:] for _, emulator in CPUS])
def test_another_cpu_gives_the_same_bits(command, emulator, tmp_path, goldens, few_goldens, hostile):
    """The scalar kernels, which is all that these CPUs have; of those with 32 bits the files are the point. Compiled as
    by one line, which may fuse products and sums if the sources let it."""
    tool_of(emulator)
    needs(command, ["-static"], "", tmp_path, run=(emulator,))
    flags = "-static", "-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-DBNNF_NO_SIMD"
    made = program(tmp_path, command, *flags)
    check([emulator, made], goldens if emulator == "qemu-aarch64" else few_goldens, 1)
    check([emulator, made], hostile, 1)
