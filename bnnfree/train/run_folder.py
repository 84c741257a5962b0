"""The folder of a run: taken by one training at a time, cleared of torn files, written to with errors of one line.

Standard library, bnnfree.errors, bnnfree.files and its own room.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bnnfree.errors import BnnfreeError
from bnnfree.files import replacing, said
from bnnfree.train import dist as processes
from bnnfree.train.checkpoint import open_checkpoint

ARTEFACTS = ("recipe.yaml", "metrics.jsonl", "curves.png", "last.pt", "best.pt", "result.json")
JOB = "job.txt"  # the torchrun that a run belongs to: what it restarts goes on, what another starts is refused
LOCK = ".lock"  # holds the id of the process that trains here

_held: set[Path] = set()  # folders taken by this process: its own lock does not stop it


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Within it an error of the system about a file of `folder`, or a full disk, is a BnnfreeError of one line."""
    try:
        yield
    except OSError as error:
        path = Path(folder if error.filename is None else os.fsdecode(error.filename))
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and (error.filename is None or folder.resolve() not in (path.resolve(), *path.resolve().parents)):
            raise
        raise BnnfreeError(
            f"run folder {folder}: {path.name} cannot be written or read: {said(error)}. "
            "Choose another with --out, or make room; what was written before is whole."
        ) from None


@contextmanager
def taken(folder: Path) -> Iterator[None]:
    """Hold `folder`, which is made if missing, against a second training. Errors: BnnfreeError, with the holder's id.

    The lock ends with its process, however that ends. Windows has no such locks: there nothing is held.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        key = folder.resolve()
        if key in _held:
            raise _busy(folder, str(os.getpid()))
        file = None if sys.platform == "win32" else _lock(folder)
    _held.add(key)
    try:
        yield
    finally:
        _held.discard(key)
        if file is not None:
            (folder / LOCK).unlink(missing_ok=True)
            os.close(file)


def _lock(folder: Path) -> int:
    """The descriptor of the locked file."""
    import fcntl

    path = folder / LOCK
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # Why not flock: forked data readers would share it
        except (BlockingIOError, PermissionError):
            holder = os.read(file, 20).decode(errors="replace").strip()
            os.close(file)
            raise _busy(folder, holder or "unknown") from None
        try:
            if os.path.samestat(os.fstat(file), path.stat()):
                os.ftruncate(file, 0)
                os.write(file, str(os.getpid()).encode())
                return file
        except FileNotFoundError:
            pass  # the holder ended after the file was opened, and took it away
        os.close(file)


def _busy(folder: Path, holder: str) -> BnnfreeError:
    return BnnfreeError(
        f"run folder {folder}: another training writes to it (process {holder}). Wait for it, or choose another --out."
    )


def open_folder(folder: Path, resume: bool) -> dict[str, Any] | None:
    """The contents of last.pt, None for a run at its start. Errors: BnnfreeError: the folder holds another's run.

    Torn temporary files of processes that are gone are deleted.
    """
    with writing(folder):
        job, mark = processes.job(), folder / JOB
        restarted = job is not None and mark.is_file() and mark.read_text(encoding="utf-8", errors="replace") == job
        begun = any((folder / name).exists() for name in ARTEFACTS)
        if begun and not (resume or restarted):
            raise BnnfreeError(
                f"run folder {folder}: holds a run already. Go on with --resume, or choose another with --out."
            )
        if resume and not (begun or restarted):
            raise BnnfreeError(
                f"run folder {folder}: holds no run to go on with. Leave --resume out to begin one, or name the "
                f"run's folder: tools/train.py FOLDER --resume.{_runs_beside(folder)}"
            )
        _clear(folder)
        if job is not None and not restarted:
            with replacing(mark) as temporary:
                temporary.write_text(job, encoding="utf-8")
        last = folder / "last.pt"
        return open_checkpoint(last, resume=True) if last.exists() else None


def _runs_beside(folder: Path) -> str:
    """The runs in the same folder, as the end of a message."""
    runs = sorted(str(each.parent) for each in folder.parent.glob("*/last.pt") if each.parent != folder)
    return f" Runs there: {', '.join(runs[:5])}{', ...' if len(runs) > 5 else ''}." if runs else ""


def _clear(folder: Path) -> None:
    """Delete temporary files of `replacing` whose process is gone: .NAME.PID.tmp and .NAME.PID.RANDOM.tmp."""
    names = "|".join(map(re.escape, (*ARTEFACTS, "probe.png", JOB)))
    for path in folder.iterdir():
        torn = re.fullmatch(rf"\.(?:{names})\.(\d{{1,9}})(?:\.[^.]+)?\.tmp", path.name)
        if torn and (int(torn[1]) == os.getpid() or not _alive(int(torn[1]))):
            path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    """True if a process of this number runs. Windows, where to ask would end it: never."""
    if sys.platform == "win32":
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is another user's
    return True
