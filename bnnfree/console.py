"""Lines on a terminal, and the command that starts this package in a process of its own. Imports bnnfree.errors."""

from __future__ import annotations

import sys
from pathlib import Path

from bnnfree.errors import one_line


def say(*lines: object) -> None:
    """Print each argument as one line, whatever names are in it."""
    print(*map(one_line, lines), sep="\n")


def process_of(command: str, *arguments: str) -> list[str]:
    """`bnnfree COMMAND ...` for a process of its own, from wherever this package was imported."""
    return [sys.executable, str(Path(__file__).resolve().parent / "__main__.py"), command, *arguments]
