"""`bnnfree probe` from a checkout: bnnfree/commands/probe.py."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # Why not beside it: names here hide modules of Python's own

from bnnfree.commands.cli import run  # noqa: E402
from bnnfree.commands.probe import main  # noqa: E402

if __name__ == "__main__":
    run(main)
