"""Compiles our C sources into shared libraries with the C compiler of the system.

    python -m bnnfree.library       # compile all now; their paths are printed last

pip does this when it installs; in a checkout that was installed without a compiler, or whose sources have changed, it
is done when a library is first needed. A library's name holds a hash of what it is made of, so one that does not
belong to the sources is never loaded. It lies in the folder _native beside the sources' folder, or, where that cannot
be written, in the user's cache. A library is loaded only from a file and a folder that are the user's or root's and
that nobody else may write, and only if it is whole: a digest of its bytes lies beside it. CC names another compiler
than the first of cc, gcc and clang.

Standard library only, and no import of ours: setup.py loads this file before anything is there.
"""

from __future__ import annotations

import hashlib
import os
import platform
import secrets
import shlex
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
COMPILERS = ("cc", "gcc", "clang")
COMMON = "-std=c11 -fPIC -shared -ffp-contract=off -pthread".split()
if sys.platform not in ("darwin", "win32"):  # their linkers do so by themselves
    COMMON.append("-Wl,--no-undefined")  # a kernel that is not there is a build that fails, not a load
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
OLD = 24 * 3600  # seconds after which the library of other sources is removed: no process is about to load it


class BuildFailure(Exception):
    """Reason that there is no library, as a sentence."""


@dataclass
class Library:
    """A shared library of ours, made of the C files of one folder.

    stem      what its file name starts with
    sources   the folder
    flags     of the compiler, beside COMMON
    without   what it means that it is missing, for those who install
    """

    stem: str
    sources: Path
    flags: list[str]
    without: str

    def __post_init__(self):
        self.place = self.sources.with_name("_native")

    def path(self) -> Path:
        """The library of these sources: the one that is there, else it is made. Error: BuildFailure."""
        for place in self._places():
            path = place / self.name()
            if is_ours(place) and is_ours(path) and _is_whole(path):
                return path
        return self._make(None, verbose=False)

    def build(self, out: str | Path | None = None, verbose: bool = False) -> Path | None:
        """Compile the library, whether or not there is one; its path, or None where that fails.

        out: the file to write; without it the package's or the cache's. verbose: print the command, or why it failed.
        """
        try:
            return self._make(None if out is None else Path(out), verbose)
        except BuildFailure as failure:
            if verbose:
                print(failure)
            return None

    def name(self) -> str:
        """File name of the library: what it is made of and for, as a hash."""
        bits = "64" if sys.maxsize > 1 << 32 else "32"  # of this process, whatever the machine has
        digest = hashlib.sha256(" ".join([sys.platform, platform.machine(), bits, *COMMON, *self.flags]).encode())
        for path in sorted([*self.sources.glob("*.c"), *self.sources.glob("*.h")]):
            digest.update(f"\n{path.name}\n".encode() + path.read_bytes())
        return f"{self.stem}-{digest.hexdigest()[:16]}{SUFFIX}"

    def _make(self, out: Path | None, verbose: bool) -> Path:
        files = sorted(self.sources.glob("*.c"))
        if not files:
            raise BuildFailure(f"got no C sources in {self.sources}.")
        path = _compile(files, out or self._place() / self.name(), self.flags, verbose)
        if out is None:
            self._remove_others(path)
        return path

    def _place(self) -> Path:
        """The first folder that can be written. Error: BuildFailure."""
        for place in self._places():
            try:
                place.mkdir(mode=0o700 if place == cache() else 0o755, parents=True, exist_ok=True)
                os.unlink(_temporary(place / "probe"))
            except OSError:
                continue
            if is_ours(place):
                return place
        places = " or ".join(map(str, self._places()))
        raise BuildFailure(f"got no folder of this user's to write to that others may not, expected {places}.")

    def _places(self) -> Iterator[Path]:
        yield self.place
        if (place := cache()) is not None:
            yield place

    def _remove_others(self, path: Path) -> None:
        """Old temporaries beside `path`, and in the package libraries of earlier sources: checkouts share the cache."""
        others = list(path.parent.glob(f".{self.stem}-*.tmp"))
        if path.parent == self.place:
            others += path.parent.glob(f"{self.stem}-*{SUFFIX}")
        for other in others:
            try:
                if other != path and time.time() - other.stat().st_mtime > OLD:
                    other.unlink()
                    digest_of(other).unlink(missing_ok=True)
            except OSError:  # another process has removed it, or holds it
                pass


# Why no -march: files carry the instruction sets of their functions themselves, and the CPU is asked at run time
ENGINE = Library(
    "bnnfree",
    PACKAGE / "engine" / "native",
    ["-O2", "-fvisibility=hidden", "-DBNNF_SHARED"],
    "native engine not built, numpy runs the models: slower, same results",
)
# Why these options: loops with comparisons are not vectorised where a comparison may trap or a root set errno
FUSED = Library(
    "fused",
    PACKAGE / "nn" / "fused" / "native",
    ["-O3", "-fno-math-errno", "-fno-trapping-math"],
    "passes of fused training not built, torch's own operations train: slower, same results",
)
LIBRARIES = (ENGINE, FUSED)


def cache() -> Path | None:
    """The user's folder for what can be made again; None where there is no home.

    A relative path, another folder for each working directory, does not count.
    """
    usual = {"win32": ("LOCALAPPDATA", "AppData/Local"), "darwin": ("", "Library/Caches")}
    variable, folder = usual.get(sys.platform, ("XDG_CACHE_HOME", ".cache"))
    place = Path(os.environ.get(variable, ""))
    try:
        place = place if place.is_absolute() else Path.home() / folder
    except RuntimeError:
        pass
    return place / "bnnfree" if place.is_absolute() else None


def is_ours(path: Path) -> bool:
    """True for a file or folder of this user's or root's that nobody else may write; on Windows for any."""
    try:
        found = path.stat()
    except OSError:
        return False
    if not hasattr(os, "getuid"):
        return True
    private = found.st_gid == found.st_uid  # the group of one user that many systems make
    writable = stat.S_IWOTH | (0 if private else stat.S_IWGRP)
    return found.st_uid in (os.getuid(), 0) and not found.st_mode & writable


def digest_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _is_whole(path: Path) -> bool:
    """True if the library's bytes are those that were written. Why: the system maps a torn one and ends the process."""
    try:
        return digest_of(path).read_text() == hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError):
        return False


def _temporary(path: Path) -> Path:
    """A new file beside `path`, whose name nobody could guess."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(6)}.tmp")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0), 0o644))
    return temporary


def compiler() -> list[str]:
    """The command of the C compiler: $CC, with its options, or the first of COMPILERS. Error: BuildFailure."""
    try:
        command = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise BuildFailure(f"CC: got {os.environ['CC']}, expected a command ({error}).") from None
    if command:
        if shutil.which(command[0]) is None:
            raise BuildFailure(f"CC: got {command[0]}, which is no command, expected a C compiler.")
        return command
    for candidate in COMPILERS:
        if shutil.which(candidate) is not None:
            return [candidate]
    raise BuildFailure(f"got no C compiler, expected one of {', '.join(COMPILERS)}, or CC to name one.")


def compile_library(sources: Iterable[Path], out: Path) -> Path | None:
    """Any C sources to the library `out`, with the engine's flags; None where that fails."""
    try:
        return _compile(sources, out, ENGINE.flags, verbose=False)
    except BuildFailure:
        return None


def _compile(sources: Iterable[Path], path: Path, flags: list[str], verbose: bool) -> Path:
    temporary: Path | None = None
    try:
        command = compiler()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        command = [*command, *COMMON, *flags, *map(str, sources), "-o", str(temporary), "-lm"]
        if verbose:
            print(shlex.join(command))
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
        if done.returncode:
            lines = done.stderr.splitlines()
            said = [line for line in lines if "error" in line or "undefined" in line.lower()] or lines[-1:]
            raise BuildFailure(f"{command[0]} failed: {' '.join(said[:1])[:300] or done.returncode}")
        if not temporary.stat().st_size:  # it would be kept, with its digest, and never be made again
            raise BuildFailure(f"{command[0]} wrote nothing, expected a C compiler.")
        _keep(temporary, path)
    except OSError as error:
        raise BuildFailure(f"{path}: cannot be made ({error.strerror}).") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return path


def _keep(temporary: Path, path: Path) -> None:
    """Rename the library and put its digest beside it, all of it on the disk first, written by nobody else."""
    temporary.chmod(stat.S_IMODE(temporary.stat().st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH))  # linkers go by the umask
    with open(temporary, "rb+") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
        os.fsync(file.fileno())
    note = _temporary(digest_of(path))
    note.write_text(digest)
    os.replace(note, digest_of(path))
    os.replace(temporary, path)


def main() -> None:
    paths = []
    for library in LIBRARIES:
        start = time.perf_counter()
        path = library.build(verbose=True)
        if path is None:
            print(f"error: {library.without}", file=sys.stderr)
            raise SystemExit(2)
        print(f"built in {time.perf_counter() - start:.1f} s, {path.stat().st_size:,} bytes")
        paths.append(path)
    print(*paths, sep="\n")


if __name__ == "__main__":
    main()
