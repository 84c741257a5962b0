"""Compiles the native engine, native/*.c, into a shared library with the C compiler of the system.

    python -m bnnfree.engine.build       # compile now; the path of the library is printed last

pip does this when it installs; in a checkout that was installed without a compiler, or whose sources have changed,
`bnnfree.engine` does it when a model is first loaded. A library's name holds a hash of what it is made of, so one
that does not belong to the sources is never loaded. It lies in the folder _native of this package, or, where that
cannot be written, in the user's cache. CC names another compiler than the first of cc, gcc and clang.

Standard library only, and no import of ours: setup.py loads this file before numpy is there.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "native"
PLACE = Path(__file__).resolve().parent / "_native"
COMPILERS = ("cc", "gcc", "clang")
# Why no -march: files carry the instruction sets of their functions themselves, and the CPU is asked when a model loads
FLAGS = "-std=c11 -O2 -fPIC -shared -ffp-contract=off -fvisibility=hidden -DBNNF_SHARED -pthread".split()
if sys.platform not in ("darwin", "win32"):  # their linkers do so by themselves
    FLAGS.append("-Wl,--no-undefined")  # a kernel that is not there is a build that fails, not a load
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
OLD = 24 * 3600  # seconds after which the library of other sources is removed: no process is about to load it


class BuildFailure(Exception):
    """Why there is no library, as a sentence."""


def library() -> Path:
    """The library of these sources: the one that is there, else it is made. Error: BuildFailure."""
    for place in (PLACE, cache()):
        if place is not None and (path := place / name()).is_file():
            return path
    return _make(None, verbose=False)


def build(out: str | Path | None = None, verbose: bool = False) -> Path | None:
    """Compile the library, whether or not there is one; its path, or None where that fails.

    out: the file to write; without it the package's or the cache's. verbose: print the command, or why it failed.
    """
    try:
        return _make(None if out is None else Path(out), verbose)
    except BuildFailure as failure:
        if verbose:
            print(failure)
        return None


def name() -> str:
    """File name of the library: what it is made of and for, as a hash."""
    bits = "64" if sys.maxsize > 1 << 32 else "32"  # of this process, whatever the machine has
    digest = hashlib.sha256(" ".join([sys.platform, platform.machine(), bits, *FLAGS]).encode())
    for path in sorted([*SOURCES.glob("*.c"), *SOURCES.glob("*.h")]):
        digest.update(f"\n{path.name}\n".encode() + path.read_bytes())
    return f"bnnfree-{digest.hexdigest()[:16]}{SUFFIX}"


def cache() -> Path | None:
    """The user's folder for what can be made again; None where there is no home."""
    usual = {"win32": ("LOCALAPPDATA", "AppData/Local"), "darwin": ("", "Library/Caches")}
    variable, folder = usual.get(sys.platform, ("XDG_CACHE_HOME", ".cache"))
    try:
        return Path(os.environ.get(variable) or Path.home() / folder) / "bnnfree"
    except RuntimeError:
        return None


def compiler() -> list[str]:
    """The command of the C compiler: $CC, with its options, or the first of COMPILERS. Error: BuildFailure."""
    command = shlex.split(os.environ.get("CC", ""))
    if command:
        if shutil.which(command[0]) is None:
            raise BuildFailure(f"CC: got {command[0]}, which is no command, expected a C compiler.")
        return command
    for candidate in COMPILERS:
        if shutil.which(candidate) is not None:
            return [candidate]
    raise BuildFailure(f"got no C compiler, expected one of {', '.join(COMPILERS)}, or CC to name one.")


def compile_library(sources: Iterable[Path], out: Path) -> Path | None:
    """Any C sources to the library `out`, as those of the engine; None where that fails."""
    try:
        return _compile(sources, out, verbose=False)
    except BuildFailure:
        return None


def _make(out: Path | None, verbose: bool) -> Path:
    path = _compile(sorted(SOURCES.glob("*.c")), out or _place() / name(), verbose)
    if out is None:
        _remove_others(path)
    return path


def _compile(sources: Iterable[Path], path: Path, verbose: bool) -> Path:
    files = [str(source) for source in sources]
    if not files:
        raise BuildFailure(f"got no C sources in {SOURCES}.")
    command = compiler()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    command = [*command, *FLAGS, *files, "-o", str(temporary), "-lm"]
    if verbose:
        print(shlex.join(command))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
        if done.returncode:
            lines = done.stderr.splitlines()
            said = [line for line in lines if "error" in line or "undefined" in line.lower()] or lines[-1:]
            raise BuildFailure(f"{command[0]} failed: {' '.join(said[:1])[:300] or done.returncode}")
        os.replace(temporary, path)
    except OSError as error:
        raise BuildFailure(f"{path}: cannot be made ({error.strerror}).") from None
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _place() -> Path:
    """The first folder that can be written. Error: BuildFailure."""
    for place in _places():
        try:
            place.mkdir(parents=True, exist_ok=True)
            probe = place / f".{os.getpid()}.tmp"
            probe.touch()
            probe.unlink()
            return place
        except OSError:
            continue
    raise BuildFailure(f"got no folder to write to, expected {' or '.join(map(str, _places()))}.")


def _places() -> Iterator[Path]:
    yield PLACE
    if (place := cache()) is not None:
        yield place


def _remove_others(path: Path) -> None:
    """Libraries of earlier sources beside `path`, in the package only: checkouts share the cache."""
    for other in path.parent.glob(f"bnnfree-*{SUFFIX}") if path.parent == PLACE else ():
        try:
            if other != path and time.time() - other.stat().st_mtime > OLD:
                other.unlink()
        except OSError:  # another process has removed it, or holds it
            pass


def main() -> None:
    start = time.perf_counter()
    path = build(verbose=True)
    if path is None:
        print("error: the native engine was not built; the numpy backend runs without it", file=sys.stderr)
        raise SystemExit(2)
    print(f"built in {time.perf_counter() - start:.1f} s, {path.stat().st_size:,} bytes")
    print(path)


if __name__ == "__main__":
    main()
