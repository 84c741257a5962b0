"""The processor's floating-point mode, which numpy's results depend on. Imports numpy only."""

from __future__ import annotations

import numpy as np

from bnnfree.engine.errors import EngineError

_TINY, _LEAST = np.float32(2**-126), np.float32(2**-149)  # the smallest normal number, and the smallest of all


def check_floats() -> None:
    """Errors: EngineError where this thread flushes denormal numbers to zero, or does not round to nearest and even.

    Libraries made with -ffast-math and torch.set_flush_denormal set such modes for everybody. The native engine runs in
    a mode of its own.
    """
    with np.errstate(all="ignore"):
        a = np.array([_TINY, _LEAST, 1, 1, -1], np.float32)
        b = np.array([0.5, 2.0**100, 2.0**-24, 3 * 2.0**-24, -(2.0**-24)], np.float32)
        products, sums = (a * b).tolist(), (a + b).tolist()
    flushes = products[0] != 2**-127 or products[1] != 2**-49
    if flushes or sums[2:] != [1.0, 1 + 2**-22, -1.0]:
        wrong = "denormal numbers are flushed to zero" if flushes else "results are not rounded to the nearest number"
        raise EngineError(
            f"numpy engine: {wrong} in this thread, so its results would be others. Switch that off "
            "(torch.set_flush_denormal(False)), or take the native backend, which has a mode of its own."
        )
