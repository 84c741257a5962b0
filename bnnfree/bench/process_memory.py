"""Memory that this process holds, bytes. Standard library and bnnfree.errors only."""

from __future__ import annotations

import sys
from pathlib import Path

from bnnfree.errors import BnnfreeError


def resident() -> int:
    """Bytes held now; where the system does not tell them, the most that were held. Errors: BnnfreeError."""
    return told("VmRSS") or _most_resident()


def peak_resident() -> int:
    """The most that it held, since the system was last told to forget. Errors: as `resident`."""
    return told("VmHWM") or _most_resident()


def told(key: str) -> int:
    """A line of /proc/self/status; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key + ":")), 0)


def _most_resident() -> int:
    try:
        import resource
    except ImportError:
        raise BnnfreeError("memory: this system does not tell how much a process holds.") from None
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
