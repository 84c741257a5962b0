"""Writing files so that nothing is lost. Standard library and bnnfree.errors; every room may import this file."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bnnfree.errors import BnnfreeError


class OutputError(BnnfreeError):
    """A file that cannot be written: a full disk, a folder that is read-only or no folder."""


def said(error: OSError | ValueError) -> str:
    """Words of the system for `error`; a full disk in ours."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return "disk full" if full else str(getattr(error, "strerror", None) or error)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path`, renamed onto it when the block ends well and removed when it does not.

    Readers see the old file or the whole new one, never a half. The parent folder is made if missing. The temporary's
    name, `.NAME.PID.RANDOM.tmp`, cannot be guessed, and the file is made anew: no link of somebody else's is followed.
    Errors: OutputError with the reason; what was at `path` is as it was.
    """
    path = Path(path)
    if not path.name:
        raise OutputError(f"{str(path)!r}: got a folder or nothing, expected the name of a file to write.")
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        name = path.with_name(f".{path.name[:80]}.{os.getpid()}.{secrets.token_hex(6)}.tmp")
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0), 0o666))
        temporary = name
        yield temporary
        os.replace(temporary, path)
    except (OSError, ValueError) as error:  # ValueError: a zero in the name
        if isinstance(error, ValueError) and "null" not in str(error):
            raise
        raise OutputError(f"{path}: cannot be written: {said(error)}. What was there before is unchanged.") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
