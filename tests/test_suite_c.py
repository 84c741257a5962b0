"""The C code by its own test program, native/suite.c: at the edge of memory, and under sanitizers.

Skipped, with the reason, where a compiler or a sanitizer is missing; each sanitizer must first find a mistake made for
it. Threads and other CPUs: test_suite_cpus.py. With clang, optimised, and on more cases:

    python -m pytest -m slow tests/test_suite_c.py -n 1
"""

import sys

import pytest
from cases import FIRST_ERROR, check, link, program, write_goldens, write_hostile
from cc import ASAN, ASAN_FINDS, HERE, TSAN, TSAN_FINDS, compiler, engine_sources, needs, objects, output_of
from corpus import CORPUS, RUNS

from bnnfree.engine.binding import isa_names, load_library
from bnnfree.format import schema

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="needs the linker's --wrap"),
    pytest.mark.skipif(not isa_names(), reason=load_library()[1]),
]

ISAS = len(isa_names())


@pytest.mark.thorough
def test_memory_ends_where_it_was_said_to_end(tmp_path, goldens, hostile):
    """Behind files, images, results and arenas lies a page that nobody may touch; what sanitizers do not see, the
    loads of inline assembly, ends there too."""
    made = program(tmp_path, compiler(), "-O0")
    check([made], goldens, ISAS)
    check([made], hostile, ISAS)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Objects of the engine with the sanitizers. Why -O0: nothing wrong is optimised away, and it compiles faster."""
    folder = tmp_path_factory.mktemp("asan")
    needs(compiler(), ASAN, ASAN_FINDS, folder)
    return folder, objects(folder, compiler(), [HERE / "fence.c", *engine_sources()], "-pthread", "-O0", *ASAN)


@pytest.mark.thorough
def test_address_and_undefined_behaviour_sanitizers_find_nothing(watched, goldens, hostile):
    """Leaks included."""
    folder, made = watched
    made = [*made, *objects(folder, compiler(), [HERE / "suite.c"], "-O0", *ASAN)]
    made = link(folder / "suite", compiler(), ASAN, made)
    check([made], goldens, ISAS)
    check([made], hostile, ISAS)


def test_the_corpus_of_the_fuzzer_does_what_its_names_say(watched):
    """Through the fuzz target, which compares the instruction sets too; see test_fuzz_c.py."""
    folder, made = watched
    made = [*made, *objects(folder, compiler(), [HERE / "fuzz.c"], "-O0", "-DREPLAY", *ASAN)]
    paths = sorted(CORPUS.iterdir())
    said = output_of(link(folder / "replay", compiler(), ASAN, made), *paths).splitlines()
    names = {0: RUNS, **dict(enumerate(schema.ERRORS, FIRST_ERROR))}
    assert [f"{names[int(line.split()[0])]} {line.split()[1]}" for line in said] == [
        f"{path.name.split('-')[0]} {path}" for path in paths
    ]


@pytest.mark.slow
@pytest.mark.parametrize("cc", ["gcc", "clang"])
@pytest.mark.parametrize(("flags", "finds"), [(ASAN, ASAN_FINDS), (TSAN, TSAN_FINDS), ([], "")],
                         ids=["address", "thread", "none"])  # fmt: skip
def test_more_cases_optimised_with_each_compiler(cc, flags, finds, tmp_path):
    """-std=gnu11: as of one line of the compiler, which may then fuse products and sums."""
    needs([cc], flags, finds, tmp_path)
    made = program(tmp_path, [cc], *flags, "-O2", "-std=gnu11")
    for name, write, *counts in (("goldens", write_goldens, 120, 12), ("hostile", write_hostile, 3000)):
        (tmp_path / name).mkdir()
        cases = write(tmp_path / name, *counts)
        check([made], cases, ISAS)
