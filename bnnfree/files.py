"""Writing files so that nothing is lost. Standard library and bnnfree.errors; every room may import this file."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bnnfree.errors import BnnfreeError

DISK = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO") if hasattr(errno, name)}
"""Error numbers of the system where a file has no room or may not be written, whatever was being written."""


class OutputError(BnnfreeError):
    """A file that cannot be written: a full disk, a folder that is read-only or no folder."""


def said(error: OSError | ValueError) -> str:
    """Words of the system for `error`; a full disk in ours."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return "disk full" if full else str(getattr(error, "strerror", None) or error)


def check_place(path: str | Path, folder: bool = False) -> None:
    """Errors: OutputError where no file `path` (or no folder) can be: another thing is there, or a file above it."""
    path = Path(path)
    if not folder and (not path.name or os.path.isdir(path)):
        raise OutputError(
            f"{path}: cannot be written: it is a folder, expected the name of a file to write, such as {path / 'NAME'}."
        )
    device = os.path.exists(path) and not os.path.isfile(path) or os.path.dirname(os.path.abspath(path)) == "/dev"
    if not folder and device:  # Why: root would put a file in its place, or in that of a link to it
        raise OutputError(f"{path}: cannot be written: it is a device or a pipe, expected the name of a file to write.")
    for above in [path] * folder + list(path.parents):
        if os.path.exists(above) and not os.path.isdir(above):
            raise OutputError(f"{path}: cannot be written: {above} is a file, expected a folder.")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path`, renamed onto it when the block ends well and removed when it does not.

    Readers see the old file or the whole new one, never a half. The parent folder is made if missing. The temporary's
    name, `.NAME.PID.RANDOM.tmp`, cannot be guessed, and the file is made anew: no link of somebody else's is followed.
    Errors: OutputError for a folder that cannot be written, a full disk, a folder in the place of the file;
    other errors of the block pass. What was at `path` is as it was.
    """
    path = Path(path)
    check_place(path)
    temporary = path.with_name(f".{path.name[:80]}.{os.getpid()}.{secrets.token_hex(6)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0), 0o666))
    except (OSError, ValueError) as error:  # ValueError: a zero in the name
        raise _output_error(path, error) from None
    try:
        try:
            yield temporary
        except Exception as error:
            cause = _of_the_disk(error, temporary)
            if cause is None:
                raise
            raise _output_error(path, cause) from error
        try:
            os.replace(temporary, path)
        except OSError as error:
            raise _output_error(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def _of_the_disk(error: BaseException | None, temporary: Path) -> OSError | None:
    """The system's error about writing `temporary`, in an error or in what it was raised for; None: another matter."""
    while error is not None:
        if isinstance(error, OSError):
            if error.errno in DISK or error.filename in (temporary, str(temporary), os.fsencode(temporary)):
                return error
        error = error.__cause__ or error.__context__
    return None


def _output_error(path: Path, error: OSError | ValueError) -> OutputError:
    return OutputError(f"{path}: cannot be written: {said(error)}. What was there before is unchanged.")
