"""First import of every tool: finds the checkout, and is the one place where a tool's text leaves the program.

Errors become one message and exit code 2, and whatever is printed has no characters that could move a terminal
(`bnnfree.errors.printable`), in an encoding that the terminal has.

Why: `python tools/x.py` puts tools/ first on sys.path, where a tool's name could hide a module of the
standard library; that entry is replaced by the repository root, so that `models` is found as well.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bnnfree.errors import EXTRAS, BnnfreeError, missing, printable  # noqa: E402


class Plain:
    """A stream that prints only what `printable` lets through."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(printable(text))
        return len(text)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def run(main: Callable[[], object]) -> None:
    """Call a tool's main function.

    A BnnfreeError, an error of the system about a file, memory that does not suffice and a package that is not
    installed end it with one message on stderr and exit code 2. Anything else is a fault of ours, with its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = _warn
    try:
        with contextlib.redirect_stdout(Plain(sys.stdout)):  # type: ignore[type-var]
            main()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted; trainings keep a checkpoint: train.py --resume and sweep.py go on", file=sys.stderr)
        raise SystemExit(130) from None
    except (BnnfreeError, OSError, MemoryError, ModuleNotFoundError) as error:
        message = _message(error)
        if message is None:
            raise
        print(f"error: {printable(message)}", file=sys.stderr)
        raise SystemExit(2) from None


def _message(error: Exception) -> str | None:
    """The message of an error that is the user's business; None of any other."""
    if isinstance(error, BnnfreeError):
        return str(error)
    if isinstance(error, MemoryError):
        return "not enough memory. A smaller data.batch_size, data.image_size or model.width takes less."
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        return f"this tool needs {missing(package)}" if package in EXTRAS else None
    if isinstance(error, OSError) and error.errno is not None:
        path = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return f"{path}{error.strerror}."
    return None


def _warn(message, category, filename, lineno, file=None, line=None) -> None:
    """A warning of ours is one line; one of another package says where it comes from."""
    text = warnings.formatwarning(message, category, filename, lineno, "").rstrip()
    ours = filename.startswith(sys.path[0])
    print(printable(f"{category.__name__}: {message}" if ours else text), file=file or sys.stderr)
