"""The command `bnnfree` without its console script: `python -m bnnfree`, or this file by its path."""

import sys
from pathlib import Path

if not __package__:  # by its path: its folder is then the first that modules are looked for in
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bnnfree.commands.console import main  # noqa: E402

if __name__ == "__main__":
    main()
