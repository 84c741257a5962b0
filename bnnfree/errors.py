"""Errors of bnnfree, and the parts of their messages. Standard library only; every room may import this file.

The house form of a message is: what, where, the value received, what is allowed, and a hint.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable
from pathlib import Path

EXTRAS = {
    "numpy": "",
    **dict.fromkeys(("torch", "torchvision", "tqdm", "yaml", "pydantic", "sklearn", "matplotlib"), "train"),
    "PIL": "predict",
    "onnx": "onnx",
    "onnxruntime": "bench",
    "openvino": "bench",
    "webdataset": "shards",
}
"""Package that may be missing -> the extra that brings it; empty: every installation does."""
CHECKOUT = (Path(__file__).resolve().parent.parent / "setup.cfg").is_file()
"""Whether the package lies in a clone or a source distribution; else pip has installed it from a wheel."""
FILLERS = "\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0"  # printable by name, and invisible
MOST_MARKS = 4  # combining characters in a row that scripts use; more climb over other lines


class Lines(Exception):
    """A message with one line for each argument: a name inside one of them cannot begin another."""

    def __str__(self) -> str:
        return "\n".join(one_line(str(line)) for line in self.args)


class BnnfreeError(Lines):
    """Base of every error that a user's input can cause; the tools print it without a traceback and exit 2."""


class UnknownNameError(BnnfreeError, ValueError):
    """A name that is not a key of the table it was looked up in."""


class DataError(BnnfreeError):
    """A data set that is missing, empty, truncated or not what its recipe says."""


class CheckpointError(BnnfreeError):
    """A file that is not a checkpoint, or one that does not fit the network it is loaded into."""


class BnnfreeWarning(Lines, UserWarning):
    """Something was skipped, counted or replaced; the run goes on."""


def lacking(error: ModuleNotFoundError, what: str) -> ModuleNotFoundError:
    """The error to raise where `what` cannot be imported for want of a package: it names the extra that brings it."""
    package = (error.name or "").partition(".")[0]
    return ModuleNotFoundError(f"{what} needs {missing(package)}", name=error.name) if package in EXTRAS else error


def missing(package: str) -> str:
    """`torch, which is not installed. ...`: the package, and how to get it."""
    extra = EXTRAS.get(package)
    if extra is None:
        place = f"'{package}'"
    elif CHECKOUT:
        place = f'-e ".[{extra}]"' if extra else "-e ."
    else:
        place = f'"bnnfree[{extra}]"' if extra else package
    return f"{package}, which is not installed. Install it with: pip install {place}"


def printable(text: str, keep: str = "\n\t") -> str:
    """`text` without what could move or fool a terminal, each such character as its escape; those in `keep` stay.

    Names of files, classes and keys are made by others: controls, marks that turn the direction of reading or have no
    width, line separators, halves of surrogate pairs, and combining characters beyond MOST_MARKS in a row are escaped.
    """
    made, marks = [], 0
    for character in text:
        marks = marks + 1 if unicodedata.category(character) in ("Mn", "Me") else 0
        seen = character.isprintable() and character not in FILLERS
        if character in keep or (seen and marks <= MOST_MARKS):
            made.append(character)
        else:
            made.append(character.encode("unicode_escape", "backslashreplace").decode("ascii"))
    return "".join(made)


def one_line(text: object) -> str:
    """`printable` for a line, a cell of a table, or a name in one: line feeds and tabs are escaped as well."""
    return printable(str(text), keep="")


def nearest(got: str, allowed: Iterable[str], before: str = "") -> str:
    """` Did you mean 'x'?` for the allowed name closest to `got`, or an empty string.

    before: what stands before the name where it is typed, such as its folder.
    """
    close = difflib.get_close_matches(str(got), [str(name) for name in allowed], n=1, cutoff=0.5)
    return f" Did you mean '{before}{close[0]}'?" if close else ""


def nearest_path(path: Path) -> str:
    """` Did you mean 'folder/x'?` for what is beside `path` and has the closest name, as it would be typed."""
    try:
        names = [each.name for each in path.parent.iterdir()]
    except (OSError, ValueError):
        return ""
    return nearest(path.name, names, "" if path.parent == Path(".") else f"{path.parent}/".replace("//", "/"))


def unknown_name(what: str, got: object, allowed: Iterable[str]) -> UnknownNameError:
    """The error for a name that is in no table: `what: got 'x', expected one of a, b. Did you mean 'a'?`"""
    names = list(allowed)
    return UnknownNameError(f"{what}: got {got!r}, expected one of {', '.join(names)}.{nearest(str(got), names)}")


def pick(table: dict, name: str, what: str):
    """`table[name]`, or the UnknownNameError that lists the table's names."""
    if name not in list(table):  # Why a list: a name may be anything, and not everything hashes
        raise unknown_name(what, name, table)
    return table[name]
