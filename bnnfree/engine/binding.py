"""The C library native/bnnfree.h by ctypes: models and sessions as objects that free what they hold.

Calls release the interpreter's lock. A model may be shared by threads; a session is lent to one at a time, and
those that are given back wait for the next run. Nothing of a session outlives its process: a child that was forked
makes its own, since the threads of the parent's are not there.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from bnnfree.engine.errors import EngineError
from bnnfree.library import ENGINE, BuildFailure

ISAS = ("avx512", "avx512base", "avx2", "scalar")  # names that the library may know, run here or not
MESSAGE = 256  # bytes
ALIGN = 64
MOST = (1 << 31) - 1  # of C's int; the library says how many threads it takes

Bytes = bytes | memoryview | mmap.mmap | np.ndarray
Handle = ctypes.c_void_p
Size = ctypes.c_size_t


class Params(ctypes.Structure):
    """struct bnnf_params"""

    _fields_ = [("isa", ctypes.c_char_p), ("threads", ctypes.c_int), ("keep", ctypes.c_int), ("profile", ctypes.c_int)]


class Info(ctypes.Structure):
    """struct bnnf_info"""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("height", "width", "channels")),
        *((name, ctypes.c_uint32) for name in ("output_height", "output_width", "output_channels")),
        *((name, Size) for name in ("image_bytes", "output_values", "arena_bytes", "session_bytes", "packed_bytes")),
        *((name, ctypes.c_uint32) for name in ("ops", "tensors", "classes")),
        ("threads", ctypes.c_int),
        ("isa", ctypes.c_char_p),
    ]


# name -> what it returns, what it takes
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "bnnf_default_params": (Params, []),
    "bnnf_isa_name": (ctypes.c_char_p, [ctypes.c_int]),
    "bnnf_model_create": (
        ctypes.c_int,
        [ctypes.POINTER(Handle), Handle, Size, ctypes.POINTER(Params), ctypes.c_char_p, Size],
    ),
    "bnnf_model_free": (None, [Handle]),
    "bnnf_model_info": (Info, [Handle]),
    "bnnf_metadata": (ctypes.c_char_p, [Handle, ctypes.c_char_p]),
    "bnnf_kernel_name": (ctypes.c_char_p, [Handle, ctypes.c_uint32]),
    "bnnf_session_create": (ctypes.c_int, [ctypes.POINTER(Handle), Handle, Handle, Size, ctypes.c_char_p, Size]),
    "bnnf_session_free": (None, [Handle]),
    "bnnf_run": (ctypes.c_int, [Handle, Handle, Size, Handle]),
    "bnnf_op_nanoseconds": (ctypes.c_uint64, [Handle, ctypes.c_uint32]),
    "bnnf_read_activation": (Size, [Handle, ctypes.c_uint32, Handle, Size]),
}


@functools.cache
def load_library() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why there is none. The first call may compile it."""
    try:
        lib = ctypes.CDLL(str(ENGINE.path()))
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
    except BuildFailure as failure:
        return None, str(failure)
    except (OSError, AttributeError) as error:
        return None, f"the native library cannot be loaded ({error})."
    return lib, ""


@functools.cache
def isa_names() -> tuple[str, ...]:
    """Instruction sets of the library that this CPU runs, the best first; none without the library."""
    lib, _ = load_library()
    names: list[str] = []
    while lib is not None and (name := lib.bnnf_isa_name(len(names))) is not None:
        names.append(name.decode())
    return tuple(names)


class RefusedError(EngineError):
    """A call that the C library refused. `status` is a value of `enum bnnf_status`."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def _address(array: np.ndarray) -> int:
    return array.ctypes.data


class _Owner:
    """Holds a bnnf_model and the bytes that it works on, and frees it when nobody does any more.

    Why apart from NativeModel: its sessions hold this, and it holds idle sessions, which would be a circle.
    """

    def __init__(self, lib: ctypes.CDLL, data: np.ndarray):
        self.lib, self.data, self.handle = lib, data, Handle()
        # Why not at exit: another thread may still run it, and the process gives back all memory anyway
        weakref.finalize(self, lib.bnnf_model_free, self.handle).atexit = False


class NativeModel:
    """A bnnf_model of the bytes of a file, which are not copied if they are aligned."""

    def __init__(
        self,
        data: Bytes,
        isa: str | None = None,
        threads: int = 1,
        *,
        keep: bool = False,
        profile: bool = False,
    ):
        lib, why = load_library()
        if lib is None:
            raise EngineError(f"native engine: {why}")
        self._owner = owner = _Owner(lib, aligned(data))
        params = lib.bnnf_default_params()
        params.isa, params.threads = None if isa is None else isa.encode(), min(threads, MOST)
        params.keep, params.profile = int(keep), int(profile)
        message = ctypes.create_string_buffer(MESSAGE)
        whole = (_address(owner.data), owner.data.size, ctypes.byref(params))
        _check(lib.bnnf_model_create(ctypes.byref(owner.handle), *whole, message, MESSAGE), message)
        self.info: Info = lib.bnnf_model_info(owner.handle)
        self._idle: list[Session] = []

    def kernels(self) -> list[str]:
        """Name of the kernel of each op."""
        owner = self._owner
        return [owner.lib.bnnf_kernel_name(owner.handle, i).decode() for i in range(self.info.ops)]

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A session that nobody else uses meanwhile."""
        session = None
        while session is None:
            try:
                session = self._idle.pop()
            except IndexError:
                session = Session(self._owner, self.info)
            if session.process != os.getpid():
                session = None
        yield session  # Why no finally: after an error it is not used again
        self._idle.append(session)


def _check(status: int, message: ctypes.Array | None = None) -> None:
    if status:
        text = "" if message is None else message.value.decode(errors="replace")
        raise RefusedError(f"native engine: {text or f'error {status}'}", status)


class Session:
    """A bnnf_session; `run` and what can be asked after it, by one thread at a time."""

    def __init__(self, owner: _Owner, info: Info):
        self.process = os.getpid()
        self._owner, self._info, self._lib = owner, info, owner.lib  # the model lives as long as its sessions
        self._handle = Handle()
        message = ctypes.create_string_buffer(MESSAGE)
        handle = ctypes.byref(self._handle)
        _check(self._lib.bnnf_session_create(handle, owner.handle, None, 0, message, MESSAGE), message)
        weakref.finalize(self, _free_session, self._lib, self._handle, self.process).atexit = False

    def run(self, images: np.ndarray) -> np.ndarray:
        """Shapes: uint8 [N, H, W, C], contiguous -> float32 [N, H', W', C']."""
        info = self._info
        shape = (len(images), info.output_height, info.output_width, info.output_channels)
        output = np.empty(shape, np.float32)
        _check(self._lib.bnnf_run(self._handle, _address(images), len(images), _address(output)))
        return output

    def nanoseconds(self) -> np.ndarray:
        """Of each op, since the session was made; of a model with `profile`."""
        ops = range(self._info.ops)
        return np.array([self._lib.bnnf_op_nanoseconds(self._handle, i) for i in ops], np.int64)

    def read(self, index: int, into: np.ndarray) -> None:
        """Tensor `index` as the last image left it; of a model with `keep`."""
        size = self._lib.bnnf_read_activation(self._handle, index, _address(into), into.nbytes)
        if size != into.nbytes:
            raise EngineError(f"native engine: got {size} bytes of tensor {index}, expected {into.nbytes}.")


def _free_session(lib: ctypes.CDLL, handle: Handle, process: int) -> None:
    if os.getpid() == process:  # Why: freeing waits for its threads, which a forked child has not
        lib.bnnf_session_free(handle)


def aligned(data: Bytes) -> np.ndarray:
    """The bytes as an array that begins at a multiple of 64: a view if they do, else a copy."""
    array = np.frombuffer(data, np.uint8) if len(data) else np.empty(0, np.uint8)
    if _address(array) % ALIGN == 0:
        return array
    room = np.empty(len(array) + ALIGN, np.uint8)
    start = -_address(room) % ALIGN
    copy = room[start : start + len(array)]
    copy[:] = array
    return copy
