"""The two ways to run a packed model: numpy, with a table of kernels, and the native library.

A runner takes images that have been checked. Threads may share it.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from bnnfree.engine.binding import Bytes, NativeModel, aligned
from bnnfree.engine.environment import check_floats
from bnnfree.engine.errors import EngineError
from bnnfree.engine.kernels import Kernel
from bnnfree.engine.run import run_ops
from bnnfree.format import PackedModel, to_bytes
from bnnfree.format.packed import storage_shape
from bnnfree.format.schema import DTYPES

WORKING_SET = 1 << 28  # bytes of activations that images which numpy runs together may take


class Runner(Protocol):
    def run(self, images: np.ndarray) -> np.ndarray:
        """Shapes: uint8 [N, H, W, C], N at least 1 -> float32 [N, H', W', C']."""

    def trace(self, images: np.ndarray) -> dict[int, np.ndarray]:
        """The image and every activation by tensor, with a first axis for the images."""

    def seconds(self, images: np.ndarray, repeat: int) -> list[np.ndarray]:
        """Seconds of each op for all images; one array of all ops per repetition."""

    def kernels(self) -> list[str]:
        """Name of the kernel of each op."""

    def memory(self) -> dict[str, int | None]:
        """session_bytes, scratch_bytes, packed_bytes, as Engine.info has them."""


class NumpyRunner:
    """Images in parts that fit the working set, each part on one of `threads`."""

    def __init__(self, model: PackedModel, table: Mapping[str, Kernel], threads: int, name: str):
        self.model, self.table, self.threads, self.name = model, table, threads, name

    def run(self, images: np.ndarray) -> np.ndarray:
        check_floats()
        together = max(1, min(WORKING_SET // max(1, self.model.arena_bytes), -(-len(images) // self.threads)))
        output = np.empty((len(images), *self.model.tensors[self.model.output].shape), np.float32)

        def run_part(start: int) -> None:
            part = slice(start, start + together)
            output[part] = run_ops(self.model, self.table, images[part])[self.model.output]

        starts = range(0, len(images), together)
        if self.threads == 1 or len(starts) == 1:
            for start in starts:
                run_part(start)
        else:
            with ThreadPoolExecutor(self.threads) as pool:
                list(pool.map(run_part, starts))  # a list: errors of the parts are raised here
        return output

    def trace(self, images: np.ndarray) -> dict[int, np.ndarray]:
        check_floats()
        return run_ops(self.model, self.table, images, keep=True)

    def seconds(self, images: np.ndarray, repeat: int) -> list[np.ndarray]:
        rows = [np.zeros(len(self.model.ops)) for _ in range(repeat)]
        for row in rows:
            run_ops(self.model, self.table, images, watch=row.__setitem__)
        return rows

    def kernels(self) -> list[str]:
        return [self.name] * len(self.model.ops)

    def memory(self) -> dict[str, int | None]:
        return dict.fromkeys(("session_bytes", "scratch_bytes", "packed_bytes"))


class NativeRunner:
    """One image after the other, each op of it on all threads.

    data: the bytes of the model's file; without them they are made of the model.
    """

    def __init__(self, model: PackedModel, isa: str, threads: int, data: Bytes | None = None):
        self.model, self.isa, self.threads = model, isa, threads
        self.data = aligned(to_bytes(model) if data is None else data)
        self.native = self._make()

    def _make(self, **options: bool) -> NativeModel:
        """A model of the library. Errors: EngineError where its shapes are not those that callers were told."""
        native = NativeModel(self.data, self.isa, self.threads, **options)
        info, output = native.info, self.model.tensors[self.model.output].shape
        inside = info.height, info.width, info.channels
        out = info.output_height, info.output_width, info.output_channels
        if (inside, out) != (tuple(self.model.image_shape), tuple(output)):  # a run would read and write beyond arrays
            raise EngineError(
                f"native engine: got the bytes of a model of {inside} to {out}, expected {self.model.image_shape} to"
                f" {tuple(output)}: they are another model's. A mapped file must not change; load it anew."
            )
        return native

    def run(self, images: np.ndarray) -> np.ndarray:
        with self.native.session() as session:
            return session.run(np.ascontiguousarray(images))

    def trace(self, images: np.ndarray) -> dict[int, np.ndarray]:
        values, count = {self.model.input: images}, len(images)
        for index, tensor in enumerate(self.model.tensors):
            if tensor.place == "activation":
                shape = (count, *storage_shape(tensor.dtype, tensor.shape))
                values[index] = np.empty(shape, np.dtype(DTYPES[tensor.dtype].storage))
        with self._make(keep=True).session() as session:
            for number, image in enumerate(np.ascontiguousarray(images)):
                session.run(image[None])
                for index, value in values.items():
                    if index != self.model.input:
                        session.read(index, value[number])
        return values

    def seconds(self, images: np.ndarray, repeat: int) -> list[np.ndarray]:
        images, rows = np.ascontiguousarray(images), []
        with self._make(profile=True).session() as session:
            for _ in range(repeat):
                before = session.nanoseconds()
                session.run(images)
                rows.append((session.nanoseconds() - before) * 1e-9)
        return rows

    def kernels(self) -> list[str]:
        return self.native.kernels()

    def memory(self) -> dict[str, int | None]:
        info = self.native.info
        scratch = info.arena_bytes - self.model.arena_bytes
        return {"session_bytes": info.session_bytes, "scratch_bytes": scratch, "packed_bytes": info.packed_bytes}
