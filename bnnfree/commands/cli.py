"""The start of every command, and the one place where its text leaves the program.

Errors become one message and exit code 2, and whatever is printed has no characters that could move a terminal
(`bnnfree.errors.printable`), in an encoding that the terminal has. Text with a name in it is printed by `say`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from bnnfree.errors import BnnfreeError, missing, one_line, printable
from bnnfree.files import OutputError, check_place, said
from bnnfree.progress import say as say_beside
from bnnfree.shelf import find

PACKAGE = str(Path(__file__).resolve().parent.parent)
OUR_OWN = {"bnnfree", "models"}  # packages whose want is a fault of ours
OUT_OF_MEMORY = (
    "can't allocate memory",
    "out of memory",
    "bad_alloc",
    "size calculation overflowed",
)  # in torch's RuntimeErrors


class Parser(argparse.ArgumentParser):
    """The arguments of a tool: its docstring is the help, and no argument may be an empty text."""

    def __init__(self, description: str | None):
        prog = sys.argv[0] if sys.argv[0].startswith("bnnfree ") else None
        if prog and description:  # as it is called where it is installed
            description = re.sub(r"python tools/(\w+)\.py", r"bnnfree \1", description)
            description = re.sub(r"recipes/(?:sweeps/)?(\w+)\.yaml", r"\1", description)
        super().__init__(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def read(self, **named: str) -> argparse.Namespace:
        """The arguments of the command line. Errors: BnnfreeError for one that is empty.

        named: argument -> kinds of things (with spaces between) that it may name, see bnnfree.shelf.
        """
        args = self.parse_intermixed_args()
        for name, kinds in named.items():
            for kind in kinds.split():
                if isinstance(given := getattr(args, name), str):
                    setattr(args, name, find(kind, given))
        for action in self._actions:
            value = getattr(args, action.dest, None)
            if "" in (value if isinstance(value, list) else [value]):
                name = action.option_strings[-1] if action.option_strings else action.metavar or action.dest
                raise BnnfreeError(f"{name}: got an empty text, expected a value. Is a variable of the shell empty?")
        return args


def to_file(text: str) -> str:
    """The type of an argument that names a file to write: refused before the work where none can be."""
    return _place(text, folder=False)


def to_folder(text: str) -> str:
    """The type of an argument that names a folder to write into."""
    return _place(text, folder=True)


def _place(text: str, folder: bool) -> str:
    if text:  # Parser.read says what is wrong with an empty one
        check_place(text, folder)
    return text


class Plain:
    """Standard output that prints only what `printable` lets through. Errors: OutputError where it takes no more."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        with _said_of_output():
            self._stream.write(printable(text))
        return len(text)

    def flush(self) -> None:
        with _said_of_output():
            self._stream.flush()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


@contextlib.contextmanager
def _said_of_output():
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        _lose(1)  # Why: what is still held would be tried again when Python ends
        raise OutputError(
            f"standard output: cannot be written: {said(error)}. Send it elsewhere, with > FILE."
        ) from None


def _lose(descriptor: int) -> None:
    """Send all that goes to `descriptor` nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def _open_streams() -> None:
    """Make the standard streams usable. Errors: OutputError where standard output is closed."""
    closed = sys.stdout is None
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            _lose(number)  # Why: the next file opened would get its number, and what is printed
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)  # Why: a bar of stderr stands between
    if closed:
        raise OutputError("standard output: is closed, expected a place to print to. Send it to /dev/null: > /dev/null")


def _check_folder() -> None:
    """Errors: BnnfreeError where the current folder was deleted: torch's libraries would end the process."""
    try:
        os.getcwd()
    except OSError as error:
        raise BnnfreeError(f"current folder: {said(error)}. Go to one that exists, with cd.") from None


_after_interrupt: list[Callable[[], str]] = []  # the last says what is left of the work, and how it goes on


def on_interrupt(tell: Callable[[], str]) -> None:
    """From now on Ctrl-C prints what `tell` returns: what there is of the work by then, and how to go on."""
    _after_interrupt.append(tell)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Within it a first Ctrl-C is a KeyboardInterrupt, and a second one, while that ends the work, ends the process.

    Files are written under temporary names, so nothing is torn; no other code runs, whose half-ended state would print
    tracebacks. Where Ctrl-C is ignored, or another's to handle, it stays so.
    """
    owner, pressed = os.getpid(), False

    def stop(number: int, frame: object) -> None:
        nonlocal pressed
        if pressed and os.getpid() == owner:
            os.write(2, b"\ninterrupted twice: ended at once\n")
            os._exit(130)
        pressed = True
        raise KeyboardInterrupt

    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ours = ours and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        if ours and not pressed:  # Why not after one: Python's own end is interrupted as well
            signal.signal(signal.SIGINT, signal.default_int_handler)


def run(main: Callable[[], object]) -> None:
    """`_run` with Ctrl-C as `_interruptible` has it."""
    with _interruptible():
        _run(main)


def _run(main: Callable[[], object]) -> None:
    """Call a tool's main function.

    A BnnfreeError, an error of the system about a file, memory that does not suffice and a package that is not
    installed end it with one message on stderr and exit code 2. Anything else is a fault of ours, with its traceback.
    """
    warnings.showwarning = _warn
    try:
        _open_streams()
        _check_folder()
        plain = Plain(sys.stdout)
        with contextlib.redirect_stdout(plain):  # type: ignore[type-var]
            main()
            plain.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        _lose(1)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        left = f"; {one_line(_after_interrupt[-1]())}" if _after_interrupt else ""
        print(f"interrupted{left}", file=sys.stderr)
        raise SystemExit(130) from None
    except (BnnfreeError, OSError, MemoryError, ModuleNotFoundError, RuntimeError) as error:
        message = _message(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2) from None


def _message(error: Exception) -> str | None:
    """The message of an error that is the user's business; None of any other."""
    if isinstance(error, BnnfreeError):
        return str(error)
    if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
        return "not enough memory. A smaller data.batch_size, data.image_size or model.width takes less."
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        return one_line(f"this tool needs {missing(package)}") if package not in OUR_OWN else None
    if isinstance(error, OSError) and error.errno is not None:
        path = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return one_line(f"{path}{error.strerror}.")
    return None


def _warn(message, category, filename, lineno, file=None, line=None) -> None:
    """A warning of ours is one line; one of another package says where it comes from."""
    text = warnings.formatwarning(message, category, filename, lineno, "").rstrip()
    ours = filename.startswith(PACKAGE)
    say_beside(one_line(f"{category.__name__}: {message}") if ours else printable(text), file=file or sys.stderr)
