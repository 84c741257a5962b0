"""Settings of the whole process that training wants. Imports torch only."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # numbers that glibc's mallopt gives these settings


@contextmanager
def settings(deterministic: bool) -> Iterator[None]:
    """Train within this: with or without torch's deterministic algorithms, and on Linux with memory that is kept.

    Deterministic, torch would fill every new tensor with NaN, which costs a tenth of a step; that is left out: what is
    computed from memory that nobody has written is found by the tests (they repeat whole runs to the bit).
    Memory: the allocator of the C library gives large blocks back when they are freed and gets them again, zeroed page
    by page, in the next layer. Meanwhile it is told to keep them, unless MALLOC_ variables say what it is to do.
    """
    torch_settings: Any = torch.utils.deterministic  # its one setting is not in torch's types
    before = torch.are_deterministic_algorithms_enabled(), torch_settings.fill_uninitialized_memory
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch_settings.fill_uninitialized_memory = False
    kept = _tell_allocator(1 << 30, (1 << 31) - 1)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch_settings.fill_uninitialized_memory = before[1]
        if kept:
            _tell_allocator(1 << 25, 1 << 26)  # where it would have moved them by itself
            ctypes.CDLL(None).malloc_trim(0)


def _tell_allocator(largest: int, kept: int) -> bool:
    """From which size blocks come from the system, and how much is kept, bytes. Has this C library such settings?"""
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(MMAP_THRESHOLD, largest) and mallopt(TRIM_THRESHOLD, kept))
