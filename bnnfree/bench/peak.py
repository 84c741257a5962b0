"""Peak of the processor: products of signs per second, counted in loops on registers alone.

avx512, scalar: xor, popcount, add. avx2 and avx512 without VPOPCNTDQ, which have no popcount: the table look-ups and
sums of their kernels. A kernel that counts with fewer instructions than these can be above: that of avx512 takes 10
for 12.
"""

from __future__ import annotations

import ctypes
import functools
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from bnnfree.library import compile_library

BASE = "avx512base"  # AVX-512 without VPOPCNTDQ and VNNI
CODES = {"scalar": 0, "avx2": 1, "avx512": 2, BASE: 3}
SECONDS = 0.002  # of one sample: short, so that most are undisturbed
SAMPLES = 15


class Peak:
    """Measures the peak of one instruction set on `threads` threads; `best` is None where it cannot be compiled."""

    def __init__(self, isa: str, threads: int = 1):
        self.code, self.threads = CODES.get(isa), threads
        self._lib = _library() if self.code is not None else None
        self._rounds = 1000
        self._samples: list[float] = []
        while self._lib is not None and self._seconds() < SECONDS:
            self._rounds *= 2

    def measure(self) -> None:
        """Takes samples; to be called before, between and after what is compared with it."""
        if self._lib is None:
            return
        barrier = threading.Barrier(self.threads)

        def sample(_: int) -> float:
            barrier.wait()
            start = time.perf_counter()
            return self._run() / (time.perf_counter() - start)

        with ThreadPoolExecutor(self.threads) as pool:
            for _ in range(SAMPLES):
                self._samples.append(sum(pool.map(sample, range(self.threads))) / 1e9)

    @property
    def best(self) -> float | None:
        """10^9 products per second that nine of ten samples stay below."""
        return float(np.percentile(self._samples, 90)) if self._samples else None

    def _run(self) -> int:
        assert self._lib is not None
        return self._lib.bench_products(self.code, self._rounds)

    def _seconds(self) -> float:
        start = time.perf_counter()
        self._run()
        return time.perf_counter() - start


@functools.cache
def _library() -> ctypes.CDLL | None:
    source = Path(__file__).with_name("peak.c")
    with tempfile.TemporaryDirectory(prefix="bnnfree-", ignore_cleanup_errors=True) as folder:
        path = compile_library([source], Path(folder) / "peak.so")
        lib = None if path is None else ctypes.CDLL(str(path))
    if lib is not None:
        lib.bench_products.restype, lib.bench_products.argtypes = ctypes.c_uint64, [ctypes.c_int, ctypes.c_uint64]
    return lib
