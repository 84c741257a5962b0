"""C programs for tests: compilers, sanitizers and other CPUs where they are installed, and what stands in for them."""

import functools
import shutil
import subprocess
from pathlib import Path

import pytest

from bnnfree import library

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "bnnfree" / "engine" / "native"
HERE = ROOT / "tests" / "native"
STRICT = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-pedantic"]
ASAN = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1"]
TSAN = ["-fsanitize=thread", "-g1"]
ASAN_FINDS, TSAN_FINDS = "bol", "r"  # letters of WRONG
WRAPPED = [f"-Wl,--wrap={name}" for name in ("malloc", "calloc", "pthread_create", "bnnf__alloc", "bnnf__free")]

# What a sanitizer must find before it is trusted to find nothing. By its argument this reads a byte Beyond memory, adds
# in an int that Overflows, Loses memory, or Races
WRONG = """
#include <limits.h>
#include <pthread.h>
#include <stdlib.h>
static int shared;
static void *write_shared(void *p) { for (int i = 0; i < 1000; i++) shared += p != NULL; return p; }
int main(int argc, char **argv) {
    volatile int one = argc - 1;
    char *volatile bytes = malloc(7);
    int sum = 0;
    if (!one) { free(bytes); return 0; }
    switch (argv[1][0]) {
    case 'b': sum = bytes[6 + one]; break;
    case 'o': sum = INT_MAX + one; break;
    case 'l': bytes = NULL; return 0;
    default: { /* r */
        pthread_t thread;
        pthread_create(&thread, NULL, write_shared, &shared);
        write_shared(&shared);
        pthread_join(thread, NULL);
    }}
    free(bytes);
    return sum & 0;
}
"""


def compiler() -> list[str]:
    """The command that builds the engine."""
    try:
        return library.compiler()
    except library.BuildFailure as failure:
        pytest.skip(str(failure))


def tool_of(name: str) -> str:
    if shutil.which(name) is None:
        pytest.skip(f"needs {name}")
    return name


def done(*command, **options) -> subprocess.CompletedProcess:
    """Result of the command; one that hangs is an error after five minutes, unless another `timeout` is given."""
    options = {"timeout": 300, **options}
    parts = [str(part) for part in command]
    return subprocess.run(parts, capture_output=True, text=True, errors="replace", **options)


def output_of(*command, **options) -> str:
    run = done(*command, **options)
    assert run.returncode == 0, f"{run.returncode}: {run.stdout[-3000:]}{run.stderr[-6000:]}"
    return run.stdout


def objects(folder: Path, command, sources, *flags) -> list[Path]:
    """Each source compiled on its own; their objects in `folder`."""
    folder.mkdir(exist_ok=True)
    made = [folder / f"{source.stem}.o" for source in sources]
    for source, out in zip(sources, made, strict=True):
        output_of(*command, "-std=c11", f"-I{NATIVE}", *flags, "-c", source, "-o", out)
    return made


def engine_sources() -> list[Path]:
    return sorted(NATIVE.glob("*.c"))


@functools.cache
def lacks(command: tuple[str, ...], flags: tuple[str, ...], kinds: str, run: tuple[str, ...], folder: Path) -> str:
    """Reason that a compiler cannot be used with these flags, "" if it can."""
    source, program = folder / "wrong.c", folder / "wrong"
    source.write_text(WRONG)
    said = " ".join([*command, *flags])
    built = done(*command, *flags, "-pthread", source, "-o", program)
    if built.returncode:
        return f"{said} fails: {(built.stderr.splitlines() or [''])[0][:200]}"
    fine = done(*run, program)
    if fine.returncode:
        return f"{said} makes programs that do not run here: {(fine.stderr.splitlines() or [''])[0][:200]}"
    missed = [kind for kind in kinds if done(*run, program, kind).returncode == 0]
    return f"{said} does not find {missed} here" if missed else ""


def needs(command, flags, kinds: str, folder: Path, run=()) -> None:
    """Skips unless the compiler makes programs that run here, by `run`, and fail with the mistakes `kinds` of WRONG."""
    tool_of(command[0])
    if why := lacks(tuple(command), tuple(flags), kinds, tuple(run), folder):
        pytest.skip(why)
