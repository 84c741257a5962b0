"""First import of every tool: finds the checkout, and turns errors into one message and exit code 2.

Why: `python tools/x.py` puts tools/ first on sys.path, where a tool's name could hide a module of the
standard library; that entry is replaced by the repository root, so that `models` is found as well.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bnnfree.errors import BnnfreeError  # noqa: E402


def run(main: Callable[[], object]) -> None:
    """Call a tool's main function; a BnnfreeError ends it with its message on stderr and exit code 2."""
    try:
        main()
    except BnnfreeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted; trainings keep a checkpoint: train.py --resume and sweep.py go on", file=sys.stderr)
        raise SystemExit(130) from None
