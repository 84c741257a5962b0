"""Run a packed file: `load(path).run(images)`. Imports numpy, bnnfree.ops and bnnfree.format; never torch.

    engine = load("model.bnnf")
    logits = engine.run(pixels)          # uint8 [N, H, W, C] -> float32 [N, classes]

What runs it is the native library (native/bnnfree.h, with the best instruction set of the CPU), or where there is no
C compiler to make it, numpy. All backends give the same bits: integers are exact, and the order of every float sum is
part of what an op means. To add a backend in Python: a line in BACKENDS; native kernels: native/kernels.h.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bnnfree.engine.binding import ISAS, Bytes, aligned, isa_names, load_library
from bnnfree.engine.errors import EngineError
from bnnfree.engine.kernels import FAST, REFERENCE, Kernel
from bnnfree.engine.runners import NativeRunner, NumpyRunner, Runner
from bnnfree.errors import BnnfreeWarning, unknown_name
from bnnfree.format import PackedModel, from_bytes, to_bytes
from bnnfree.format.check import check_model
from bnnfree.format.file import read_with_bytes
from bnnfree.format.schema import CONVOLUTIONS

__all__ = ["BACKENDS", "Engine", "EngineError", "backends", "load"]

# name -> kernels; the first is what "auto" takes where the native library is not
BACKENDS: dict[str, Mapping[str, Kernel]] = {"numpy": FAST, "reference": REFERENCE}
NATIVE = "native"
CLOSED = "engine: is closed, expected an open one. Load the file again."
_told: list[str] = []  # the warning, once it was given


def backends() -> list[str]:
    """The names that `load` takes as backend on this machine, the preferred one first.

    The instruction sets of the native library that this CPU runs, "native" for the best of them, "numpy", "reference".
    """
    return [*isa_names(), *([NATIVE] if isa_names() else []), *BACKENDS]


def load(path: str | Path, backend: str = "auto", threads: int = 1, *, mapped: bool = False) -> Engine:
    """The model in a packed file, ready to run; the file is read into memory and may change or go afterwards.

    backend: one of backends(), or "auto", the first of them; that numpy must do is one warning. threads: how many work
    on an image (native) or on a batch (numpy); the results do not depend on it. mapped: the file itself is used, which
    several processes then share; its bytes must not change as long as the engine lives.
    Errors: FormatError for a file that is damaged or no packed model, EngineError, UnknownNameError.
    """
    threads = _count("threads", threads)
    _resolve(backend)  # Why first: what is wrong with it needs no file
    model, data = read_with_bytes(path, mapped)
    return Engine(model, backend, threads, data=data)


class Engine:
    """A packed model and the backend that runs it; `data` is the model's file, where it is at hand.

    A run leaves no trace in it: threads may share it. A native backend keeps, for each run that there ever was at
    one time, the memory and the threads that it works with. `close()`, the end of a `with` block, or dropping the
    engine gives them back. It can be copied and pickled: what travels is the file's bytes and the options, so the
    process that gets it needs no file, and takes its own best backend where that was left open. Copies within a
    process share the bytes.
    """

    def __init__(
        self,
        model: PackedModel,
        backend: str = "auto",
        threads: int = 1,
        *,
        data: Bytes | None = None,
    ):
        if not isinstance(model, PackedModel):
            raise EngineError(f"model: got a {type(model).__name__}, expected a PackedModel. load(path) takes a file.")
        self.threads, self.backend = _count("threads", threads), _resolve(backend)
        self._open: PackedModel | None = model
        self._asked, self._data = backend, data
        self._runner: Runner | None
        if self.backend in BACKENDS:
            self._runner = NumpyRunner(model, BACKENDS[self.backend], self.threads, self.backend)
        else:
            self._runner = NativeRunner(model, self.backend, self.threads, data)

    @property
    def model(self) -> PackedModel:
        """The packed model. Errors: EngineError once the engine is closed."""
        if self._open is None:
            raise EngineError(CLOSED)
        return self._open

    def _running(self) -> Runner:
        """The runner of the model; a local name of it keeps it through a `close` of another thread."""
        runner = self._runner
        if runner is None:
            raise EngineError(CLOSED)
        return runner

    def close(self) -> None:
        """Give back memory and threads; runs under way end first. A closed engine can only be closed again."""
        self._open = self._data = self._runner = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __copy__(self) -> Engine:
        return _from_bytes(type(self), self._bytes(), self._asked, self.threads)

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        return self.__copy__()

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_bytes, (type(self), bytes(self._bytes()), self._asked, self.threads)

    def _bytes(self) -> Bytes:
        """The model's file. Errors: EngineError once the engine is closed."""
        data, model = self._data, self.model  # in this order: another thread may close it between
        return to_bytes(model) if data is None else data

    def run(self, images: np.ndarray) -> np.ndarray:
        """Logits of images: uint8 [N, H, W, C] -> float32 [N, classes] ([N, H', W', C'] where maps come out)."""
        images = self._checked(images)
        height, width, channels = self.model.tensors[self.model.output].shape
        shape = (channels,) if (height, width) == (1, 1) else (height, width, channels)
        if not len(images):
            return np.empty((0, *shape), np.float32)
        return self._running().run(images).reshape(len(images), *shape)

    def trace(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Every activation by its name: float32 [N, H, W, C], or uint64 words of bits [N, H, W, ceil(C / 64)]."""
        values = self._running().trace(self._checked(images))
        return {self.model.tensors[index].name: value for index, value in values.items()}

    def info(self) -> dict[str, Any]:
        """Description of the model: image_size (H, W), channels, classes, ops, bytes, arena_bytes, and how it runs.

        bytes: of the constants, as stored; arena_bytes: of the activations of one image. Of a native backend, else
        None: session_bytes, what one run at a time takes (arena_bytes, scratch_bytes for the kernels, and the pool; not
        the stacks of its threads), and packed_bytes, the weights as the kernels want them, which all runs share.
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
            **self._running().memory(),
            "producer": model.producer,
            "metadata": model.metadata,
            "backend": self.backend,
            "threads": self.threads,
        }

    def profile(self, images: np.ndarray, repeat: int = 5) -> list[dict[str, Any]]:
        """Per op, in order: name of what it writes, op, shape, macs per image, kernel (its name, or that of the
        backend), ms (median of `repeat` runs of all `images`; a native backend uses its threads, numpy one)."""
        images, repeat = self._checked(images), _count("repeat", repeat)
        milliseconds = 1e3 * np.median(self._running().seconds(images, repeat), axis=0)
        rows = []
        for op, kernel, taken in zip(self.model.ops, self.kernels(), milliseconds.tolist(), strict=True):
            written = self.model.tensors[op.writes()[0]]
            macs = 0
            if op.name in CONVOLUTIONS:
                weights = self.model.tensors[op.weights].shape
                macs = written.shape[0] * written.shape[1] * int(np.prod(weights, dtype=np.int64))
            about = {"name": written.name, "op": op.name, "shape": written.shape, "macs": macs}
            rows.append({**about, "kernel": kernel, "ms": taken})
        return rows

    def kernels(self) -> list[str]:
        """Name of what runs each op, in order: a native kernel, or the backend."""
        return self._running().kernels()

    def _checked(self, images: np.ndarray) -> np.ndarray:
        expected = self.model.image_shape
        shape = ", ".join(map(str, expected))
        allowed = (
            f"expected uint8 [N, {shape}]: pixels from 0 to 255, height, width and channels as the model was exported."
        )
        try:
            images = np.asarray(images)
        except (TypeError, ValueError, RuntimeError) as error:  # a list of lists of odd lengths, a tensor of a GPU
            said = " ".join(str(error).split())
            raise EngineError(f"images: got a {type(images).__name__} ({said}), {allowed}") from None
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != expected:
            got = f"{images.dtype} {list(images.shape)}"
            raise EngineError(f"images: got {got}, {allowed} tools/predict.py resizes image files.")
        return images


def _from_bytes(kind: type[Engine], data: Bytes, backend: str, threads: int) -> Engine:
    """An engine that was copied or pickled. Its model and its runner share one array of the bytes."""
    data = aligned(data).data.toreadonly()
    model = from_bytes(data)
    check_model(model)
    return kind(model, backend, threads, data=data)


def _count(what: str, given: Any) -> int:
    try:
        count = 0 if isinstance(given, bool) else operator.index(given)  # numpy's whole numbers too
    except TypeError:
        count = 0
    if count < 1:
        raise EngineError(f"{what}: got {given!r}, expected a whole number of 1 or more.")
    return count


def _resolve(backend: str) -> str:
    """The backend that a name stands for. Errors: EngineError for one that does not run here, UnknownNameError."""
    names = backends()
    if backend == "auto":
        if names[0] in BACKENDS and not _told:
            _told.append(
                f"native engine: {load_library()[1]} {names[0]} runs the models: the same results, many times slower. "
                f"Once that is mended, python -m bnnfree.library compiles it."
            )
            warnings.warn(_told[0], BnnfreeWarning, stacklevel=3)
        return names[0]
    if backend in names:
        return names[0] if backend == NATIVE else backend
    if backend in (NATIVE, *ISAS):
        lib, why = load_library()
        why = why if lib is None else f"this CPU does not run it, expected one of {', '.join(names)}."
        raise EngineError(f"backend: got {backend!r}, but {why}")
    raise unknown_name("backend", backend, ["auto", *names])
