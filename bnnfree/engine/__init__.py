"""How a packed file runs: `load(path).run(images)`. Imports numpy, bnnfree.ops and bnnfree.format; never torch.

    engine = load("model.bnnf")
    logits = engine.run(pixels)          # uint8 [N, H, W, C] -> float32 [N, classes]

All backends give the same bits: integers are exact, and the order of every float sum is part of what an op means.
To add a backend: a line in BACKENDS.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bnnfree.engine.kernels import FAST, REFERENCE, Kernel
from bnnfree.engine.run import run_ops
from bnnfree.errors import BnnfreeError, pick
from bnnfree.format import PackedModel, read
from bnnfree.format.schema import CONVOLUTIONS

# name -> kernels; the first is what "auto" takes
BACKENDS: dict[str, Mapping[str, Kernel]] = {"numpy": FAST, "reference": REFERENCE}
WORKING_SET = 1 << 28  # bytes of activations that images run together may take


class EngineError(BnnfreeError):
    """Images that do not fit the model, or a backend or thread count that cannot be."""


def backends() -> list[str]:
    """The names that `load` takes as backend on this machine, the preferred one first."""
    return list(BACKENDS)


def load(path: str | Path, backend: str = "auto", threads: int = 1) -> Engine:
    """The model in a packed file, ready to run.

    backend: one of backends(), or "auto". threads: how many work on a batch; the results do not depend on it.
    Errors: FormatError for a file that is damaged or no packed model, EngineError, UnknownNameError.
    """
    return Engine(read(path), backend, threads)


class Engine:
    """A packed model and the backend that runs it. It keeps no state between calls: threads may share it."""

    def __init__(self, model: PackedModel, backend: str = "auto", threads: int = 1):
        if not isinstance(threads, int) or threads < 1:
            raise EngineError(f"threads: got {threads!r}, expected a whole number of 1 or more.")
        self.model, self.threads = model, threads
        self.backend = backends()[0] if backend == "auto" else backend
        self._kernels = pick(BACKENDS, self.backend, "backend")

    def run(self, images: np.ndarray) -> np.ndarray:
        """Logits of images: uint8 [N, H, W, C] -> float32 [N, classes] ([N, H', W', C'] where maps come out)."""
        images = self._checked(images)
        height, width, channels = self.model.tensors[self.model.output].shape
        shape = (channels,) if (height, width) == (1, 1) else (height, width, channels)
        together = max(1, min(WORKING_SET // max(1, self.model.arena_bytes), -(-len(images) // self.threads)))
        parts = [images[i : i + together] for i in range(0, len(images), together)]
        if not parts:
            return np.empty((0, *shape), np.float32)
        if self.threads == 1 or len(parts) == 1:
            results = list(map(self._run, parts))
        else:
            with ThreadPoolExecutor(self.threads) as pool:
                results = list(pool.map(self._run, parts))
        return np.concatenate(results).reshape(len(images), *shape)

    def trace(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Every activation by its name: float32 [N, H, W, C], or uint64 words of bits [N, H, W, ceil(C / 64)]."""
        values = run_ops(self.model, self._kernels, self._checked(images), keep=True)
        return {self.model.tensors[index].name: value for index, value in values.items()}

    def info(self) -> dict[str, Any]:
        """What the model is: image_size (H, W), channels, classes, ops, bytes, arena_bytes, and how it runs.

        bytes: of the constants, as stored; arena_bytes: of the activations of one image.
        """
        model = self.model
        height, width, channels = model.image_shape
        kinds: dict[str, int] = {}
        for op in model.ops:
            kinds[op.name] = kinds.get(op.name, 0) + 1
        sizes: dict[str, int] = {}
        for tensor in model.tensors:
            if tensor.place == "constant":
                sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.bytes
        return {
            "image_size": (height, width),
            "channels": channels,
            "classes": list(model.classes),
            "ops": kinds,
            "bytes": sum(sizes.values()),
            "bytes_by_dtype": sizes,
            "arena_bytes": model.arena_bytes,
            "producer": model.producer,
            "metadata": model.metadata,
            "backend": self.backend,
            "threads": self.threads,
        }

    def profile(self, images: np.ndarray, repeat: int = 5) -> list[dict[str, Any]]:
        """Per op, in order: name of what it writes, op, shape, macs per image, ms (median of `repeat` runs of all
        `images`, one thread)."""
        images = self._checked(images)
        if repeat < 1:
            raise EngineError(f"repeat: got {repeat}, expected 1 or more.")
        seconds: list[list[float]] = [[] for _ in self.model.ops]
        for _ in range(repeat):
            run_ops(self.model, self._kernels, images, watch=lambda number, taken: seconds[number].append(taken))
        rows = []
        for op, taken in zip(self.model.ops, seconds, strict=True):
            written = self.model.tensors[op.writes()[0]]
            macs = 0
            if op.name in CONVOLUTIONS:
                weights = self.model.tensors[op.weights].shape
                macs = written.shape[0] * written.shape[1] * int(np.prod(weights, dtype=np.int64))
            rows.append(
                {"name": written.name, "op": op.name, "shape": written.shape, "macs": macs, "ms": 1e3 * median(taken)}
            )
        return rows

    def _run(self, images: np.ndarray) -> np.ndarray:
        return run_ops(self.model, self._kernels, images)[self.model.output]

    def _checked(self, images: np.ndarray) -> np.ndarray:
        images = np.asarray(images)
        expected = self.model.image_shape
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != expected:
            shape = ", ".join(map(str, expected))
            raise EngineError(
                f"images: got {images.dtype} {list(images.shape)}, expected uint8 [N, {shape}]: pixels from 0 to 255, "
                "height, width and channels as the model was exported. tools/predict.py resizes image files."
            )
        return images
