"""Settings of the whole process that training wants. Imports torch only."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # numbers that glibc's mallopt gives these settings


@contextmanager
def settings(deterministic: bool) -> Iterator[None]:
    """Train within this: with or without torch's deterministic algorithms, and on Linux with memory that is kept.

    Deterministic, torch would fill every new tensor with NaN, which costs a tenth of a step; that is left out: what is
    computed from memory that nobody has written is found by the tests (they repeat whole runs to the bit).
    Memory: the allocator of the C library gives large blocks back when they are freed and gets them again, zeroed page
    by page, in the next layer. It is told to keep them, unless MALLOC_ variables say what it is to do; it stays told.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    _keep_freed_memory()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]  # type: ignore[attr-defined]


def _keep_freed_memory() -> None:
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, 1 << 30)
        mallopt(TRIM_THRESHOLD, (1 << 31) - 1)
