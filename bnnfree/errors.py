"""How bnnfree says that something is wrong. Standard library only; every room may import this file.

The house form of a message is: what, where, the value received, what is allowed, and a hint.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BnnfreeError(Exception):
    """Base of every error that a user's input can cause; the tools print it without a traceback and exit 2."""


class UnknownNameError(BnnfreeError, ValueError):
    """A name that is not a key of the table it was looked up in."""


class DataError(BnnfreeError):
    """A data set that is missing, empty, truncated or not what its recipe says."""


class CheckpointError(BnnfreeError):
    """A file that is not a checkpoint, or one that does not fit the network it is loaded into."""


class BnnfreeWarning(UserWarning):
    """Something was skipped, counted or replaced; the run goes on."""


def nearest(got: str, allowed: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the allowed name closest to `got`, or an empty string."""
    close = difflib.get_close_matches(str(got), [str(name) for name in allowed], n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def unknown_name(what: str, got: object, allowed: Iterable[str]) -> UnknownNameError:
    """The error for a name that is in no table: `what: got 'x', expected one of a, b. Did you mean 'a'?`"""
    names = list(allowed)
    return UnknownNameError(f"{what}: got {got!r}, expected one of {', '.join(names)}.{nearest(str(got), names)}")


def pick(table: dict, name: str, what: str):
    """`table[name]`, or the UnknownNameError that lists the table's names."""
    if name not in list(table):  # Why a list: a name may be anything, and not everything hashes
        raise unknown_name(what, name, table)
    return table[name]
