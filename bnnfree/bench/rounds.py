"""Timing that a shared machine disturbs evenly: all contenders take turns, again and again.

In a round each contender has one turn: a call that is not counted, for its caches, then some that are. Others are
given a moment to fall asleep first: a thread pool that still spins would slow down whoever comes next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np

TURN = 0.1  # seconds that the counted calls of one turn take, about
PAUSE = 0.03  # seconds before a turn, where there are threads


def measure(
    contenders: Mapping[str, Callable[[], object]],
    seconds: float,
    threads: int,
    progress: Callable[[float], object] = lambda passed: None,
) -> dict[str, np.ndarray]:
    """Milliseconds of each counted call, by contender; about `seconds` for all of them, at least three rounds.

    progress: called after each round with the seconds that have passed.
    """
    calls: dict[str, int] = {}
    for name, call in contenders.items():
        call()
        calls[name] = min(100, max(1, round(TURN / max(_timed(call), 1e-6))))
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    end, names, rounds = time.perf_counter() + seconds, list(contenders), 0
    while rounds < 3 or time.perf_counter() < end:
        for name in names:
            time.sleep(PAUSE if threads > 1 else 0)
            contenders[name]()
            taken[name] += [_timed(contenders[name]) for _ in range(calls[name])]
        names = names[1:] + names[:1]  # nobody always follows the same one
        rounds += 1
        progress(time.perf_counter() - end + seconds)
    return {name: 1e3 * np.array(values) for name, values in taken.items()}


def figures(milliseconds: np.ndarray) -> dict[str, float]:
    """median_ms, p10_ms, p90_ms and runs."""
    low, median, high = np.percentile(milliseconds, (10, 50, 90)).tolist()
    return {"median_ms": median, "p10_ms": low, "p90_ms": high, "runs": len(milliseconds)}


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
