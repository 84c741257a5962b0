"""The passes of a fused block as C (native/*.c), for maps in channels_last on a CPU. Imports torch and bnnfree only.

The library is compiled when it is first needed (`bnnfree.library.FUSED`). Samples, and rows of weights, are shared
among as many threads as torch has; their number changes no bit.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from bnnfree.library import FUSED, BuildFailure
from bnnfree.nn.fused.passes import Activation, Gradients, Passes, Prepared
from bnnfree.nn.sign import Sign
from bnnfree.nn.standard import EPS

KINDS = {"approx": 0, "clip": 1, "identity": 2}  # estimators that the library knows, by their number there
TYPES = {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.uint8: "u8", torch.int8: "s8"}
PAIRS = {  # (trunk, signs) that it knows
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
}
MAPS = ("binarize", "residual", "activate", "backward")
WEIGHTS = ("prepare", "weight_gradient")
SMALL = 1 << 15  # values below which threads are not worth their start


@functools.cache
def load_passes() -> tuple[NativePasses | None, str]:
    """The passes, or None and why there are none. The first call may compile the library."""
    try:
        return NativePasses(ctypes.CDLL(str(FUSED.path()))), ""
    except BuildFailure as failure:
        return None, str(failure)
    except (OSError, AttributeError) as error:
        return None, f"the library of fused passes cannot be loaded ({error})."


class NativePasses(Passes):
    """The methods of `Passes`; maps are brought into channels_last where they are not."""

    def __init__(self, library: ctypes.CDLL):
        self._functions = {}
        for trunk, signs in PAIRS:
            for name in MAPS + (WEIGHTS if trunk != torch.bfloat16 else ()):
                self._functions[name, trunk, signs] = getattr(library, f"{name}_{TYPES[trunk]}_{TYPES[signs]}")
                self._functions[name, trunk, signs].restype = None
        for name, signs in (("binarize", torch.uint8), ("prepare", torch.int8)):
            self._functions[name, torch.float32, signs] = getattr(library, f"{name}_f32_{TYPES[signs]}")
            self._functions[name, torch.float32, signs].restype = None
        self._pool: ThreadPoolExecutor | None = None
        self._pool_of = (0, 0)  # threads, process
        self._constants: dict[tuple, Tensor] = {}

    def __reduce__(self):
        return _loaded, ()

    def __deepcopy__(self, _):
        return self

    def unknown(self, model: nn.Module) -> str | None:
        """Name the part of a network that the library does not know, as a text; None: it knows all."""
        for module in model.modules():
            if isinstance(module, Sign) and module.ste not in KINDS:
                return f"the library does not know the estimator {module.ste!r}"
        kinds = {p.dtype for p in model.parameters()} - {torch.float32, torch.float64}
        return f"the library does not know parameters of {kinds.pop()}" if kinds else None

    def activate(self, v: Tensor, act: Activation, beta: Tensor | None = None) -> Tensor:
        v = _dense(v)
        x = torch.empty_like(v, memory_format=torch.channels_last)
        self._over_samples("activate", v, v.dtype, [v, x], [*self._act(v, act), _number(v, beta)])
        return x

    def binarize(self, v, act, gate, dtype, windows, counted):
        v, real = _dense(v), _real(v.dtype)
        n, channels = v.shape[:2]
        s = torch.empty_like(v, dtype=dtype, memory_format=torch.channels_last)
        moments = v.new_zeros((n, 3, channels), dtype=real) if windows and gate.per_sample else None
        ones = v.new_zeros((n, channels), dtype=real) if counted else None
        parameters = [*self._act(v, act), _number(v, gate.beta), self._vector(v, gate.threshold, 0.0), moments, ones]
        self._over_samples("binarize", v, dtype, [v, s], parameters)
        area = v.shape[2] * v.shape[3]
        k = None
        if moments is not None:
            pivots, sums, squares = moments.double().unbind(1)  # of each channel, about its pivot
            pivots = pivots - (pivots + sums / area).mean(1, keepdim=True)
            std = (squares / area + pivots * (2 * sums / area + pivots)).mean(1).clamp_min(0).sqrt()
            k = torch.where(std > 1e-5, 1 / std, torch.ones_like(std)).to(real)
        return s, k, None if ones is None else (2 * ones[n - counted :].double().sum(0) / area - counted).to(real)

    def residual(self, y, factor, bias, v, act):
        y = _dense(y)
        v = None if v is None else _dense(v)
        trunk = factor.dtype if v is None else v.dtype
        h = torch.empty_like(y, dtype=trunk, memory_format=torch.channels_last)
        parameters = [*self._act(h, act), self._vector(h, factor), self._vector(h, bias)]
        self._over_samples("residual", h, y.dtype, [y, v, h], parameters)
        return h

    def backward(self, v, act, gate, windows, of_h, of_s, beta=None, take=None):
        v = _dense(v)
        of_h = None if of_h is None else _dense(of_h.to(v.dtype))
        of_s = None if of_s is None else _dense(of_s)
        n, channels = v.shape[:2]
        d = torch.empty_like(v, memory_format=torch.channels_last)
        sums = v.new_zeros((n, 5, channels), dtype=_real(v.dtype))
        signs = v.dtype if of_s is None else of_s.dtype
        threshold = self._vector(v, None if gate is None else gate.threshold, 0.0)
        beta = beta if gate is None else gate.beta
        inverse = 1.0 if gate is None else 1 / float(gate.parameter)
        kind = KINDS["identity" if gate is None else gate.ste]
        take = None if take is None else take.to(sums.dtype).contiguous()
        numbers = [_number(v, beta), threshold, _number(v, inverse), windows, take, sums, ctypes.c_int(kind)]
        self._over_samples("backward", v, signs, [v, of_h, of_s, d], [*self._act(v, act), *numbers])
        of_threshold, of_slope, of_in, of_out, added = sums.double().sum(0).to(sums.dtype)
        return Gradients(d, of_threshold, of_slope, of_in, of_out, None if of_h is None else added)

    def prepare(self, latent, how, dtype, factor=None, inputs=None, constants=None):
        rows = latent.shape[0]
        latent, inputs = _in_layout(latent, inputs)
        made = torch.empty_like(latent, dtype=dtype)
        measure = constants is None
        if measure and how.standardize:
            constants = latent.new_empty((rows, 2))
        sizes = latent.new_empty(rows) if how.mean_abs else None
        expected = None if inputs is None else latent.new_empty(rows)
        flags = [ctypes.c_int(flag) for flag in (how.standardize, how.binary, measure)]
        tensors = [_row(factor, latent), inputs, sizes, expected]
        self._over_rows("prepare", latent, dtype, [latent, made, constants], [*tensors, *flags])
        return Prepared(made, constants, sizes, expected)

    def weight_gradient(self, latent, how, raw, constants, undo, outer, inputs):
        latent, inputs = _in_layout(latent, inputs)
        raw = torch.empty_like(latent, dtype=raw.dtype).copy_(raw) if raw.stride() != latent.stride() else raw
        d, dots = torch.empty_like(latent), latent.new_empty(latent.shape[0])
        flags = [ctypes.c_int(flag) for flag in (how.standardize, how.binary)]
        tensors = [_row(undo, latent), None if inputs is None else _row(outer, latent), inputs, dots]
        self._over_rows("weight_gradient", latent, raw.dtype, [latent, raw, d, constants], [*tensors, *flags])
        return d, dots

    def _act(self, v: Tensor, act: Activation) -> list[Tensor]:
        return [self._vector(v, value, start) for value, start in zip(act, (1.0, 0.0, 0.0), strict=True)]

    def _vector(self, v: Tensor, value: Tensor | None, absent: float = 0.0) -> Tensor:
        """[C] in what is calculated with; a constant where there is no such parameter."""
        real = _real(v.dtype)
        if value is not None:
            return value.detach().to(real).contiguous()
        key = v.shape[1], real, absent
        if key not in self._constants:
            self._constants[key] = torch.full((v.shape[1],), absent, dtype=real)
        return self._constants[key]

    def _over_samples(self, name: str, v: Tensor, signs: torch.dtype, maps: list, parameters: list) -> None:
        n, channels, height, width = v.shape
        shape = [ctypes.c_size_t(height * width), ctypes.c_size_t(channels)]
        function = self._functions[name, v.dtype, signs]
        self._shared(function, n, v.numel(), [*map(_pointer, maps)], [*shape, *map(_pointer, parameters)])

    def _over_rows(self, name: str, latent: Tensor, dtype: torch.dtype, maps: list, parameters: list) -> None:
        rows = latent.shape[0]
        shape = [ctypes.c_size_t(latent.numel() // rows), _number(latent, EPS)]
        function = self._functions[name, latent.dtype, dtype]
        self._shared(function, rows, latent.numel(), [*map(_pointer, maps)], [*shape, *map(_pointer, parameters)])

    def _shared(self, function: Callable, count: int, size: int, before: list, after: list) -> None:
        """function(*before, first, last, *after) over [0, count), by torch's number of threads."""
        threads = min(torch.get_num_threads(), count) if size > SMALL else 1
        if threads == 1:
            function(*before, ctypes.c_size_t(0), ctypes.c_size_t(count), *after)
            return
        if self._pool is None or self._pool_of != (threads, os.getpid()):
            self._pool, self._pool_of = ThreadPoolExecutor(threads), (threads, os.getpid())
        edges = [count * i // threads for i in range(threads + 1)]
        parts = [
            self._pool.submit(function, *before, ctypes.c_size_t(first), ctypes.c_size_t(last), *after)
            for first, last in zip(edges, edges[1:], strict=False)
        ]
        for part in parts:
            part.result()


def _loaded() -> NativePasses:
    passes, why = load_passes()
    if passes is None:
        raise BuildFailure(why)
    return passes


def _real(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.bfloat16 else dtype


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _in_layout(latent: Tensor, inputs: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The latents such that a row's values lie densely, and inputs [I, kh, kw] in the same order as these."""
    latent = latent.detach()
    order = torch.channels_last if latent.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    inputs = None if inputs is None else inputs[None].to(latent.dtype).contiguous(memory_format=order)
    return latent.contiguous(memory_format=order), inputs


def _row(vector: Tensor | None, latent: Tensor) -> Tensor | None:
    return None if vector is None else vector.detach().to(latent.dtype).contiguous()


def _number(like: Tensor, value: Tensor | float | None):
    number = 1.0 if value is None else float(value)
    return ctypes.c_double(number) if like.dtype == torch.float64 else ctypes.c_float(number)


def _pointer(value):
    """A tensor's address; None and C numbers as they are."""
    return ctypes.c_void_p(value.data_ptr()) if isinstance(value, Tensor) else value
