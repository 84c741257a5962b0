"""The passes of a fused block in torch's own operations: what they mean, and what runs where there is no C library.

A pass reads maps once and writes maps once where it is compiled, by torch.compile or as native/*.c. `native.Passes`
has the same methods. Maps are [N, C, H, W]; per-channel vectors [C], None where a block has no such parameter.
Imports torch and bnnfree.nn only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bnnfree.nn.sign import STES, sample_window, sign
from bnnfree.nn.standard import EPS


class Activation(NamedTuple):
    """act(v) = PReLU(v + shift_in; slope) + shift_out."""

    slope: Tensor | None = None
    shift_in: Tensor | None = None
    shift_out: Tensor | None = None


class Gate(NamedTuple):
    """Activation and sign before a binary convolution: t = beta act(v) + threshold, s = sign(t), and its estimator.

    beta, parameter: numbers as 0-dim tensors, beta None for 1. ste: a name of STES. per_sample: its window is that of
    each sample, see `bnnfree.nn.Sign`.
    """

    threshold: Tensor | None
    beta: Tensor | None
    ste: str
    parameter: Tensor
    per_sample: bool


class Latent(NamedTuple):
    """Treatment of latent weights: standardised or not, their signs or not, with mean |z| beside them or not."""

    standardize: bool
    binary: bool
    mean_abs: bool


class Prepared(NamedTuple):
    """A weight [O, I, kh, kw] made of latents, and what went with it.

    constants [O, 2]   mean of each row and 1 / ((std + eps) sqrt(fan_in)), if standardised
    sizes [O]          mean |z| if asked for
    expected [O]       sum over a row of weight times inputs, if there are inputs
    """

    weight: Tensor
    constants: Tensor | None
    sizes: Tensor | None
    expected: Tensor | None


class Shared:
    """The weights of one optimiser step, made once for all its micro-batches.

    Whoever changes latents or input means says `forget`: fused optimisers leave no trace that could be looked for.
    """

    def __init__(self):
        self._made: dict[int, Prepared] = {}

    def get(self, latents: Tensor, make: Callable[[], Prepared]) -> Prepared:
        """Prepared weights of these latents: the ones made since the last `forget`, else the result of `make`."""
        if id(latents) not in self._made:
            self._made[id(latents)] = make()
        return self._made[id(latents)]

    def forget(self) -> None:
        """The latents have changed."""
        self._made.clear()


class Gradients(NamedTuple):
    """d v, and sums over samples and positions [C]: of d threshold, d slope, d shift_in, d shift_out, and of d h."""

    v: Tensor
    threshold: Tensor | None
    slope: Tensor
    shift_in: Tensor
    shift_out: Tensor
    added: Tensor | None


class Passes:
    """See the module."""

    def activate(self, v: Tensor, act: Activation, beta: Tensor | None = None) -> Tensor:
        """act(v) beta."""
        x = _prelu(_shifted(v, act), act)
        return x if beta is None else x * beta.to(x.dtype)

    def binarize(
        self, v: Tensor, act: Activation, gate: Gate, dtype: torch.dtype, windows: bool, counted: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """s = sign(beta act(v) + threshold) in `dtype`; s + 1 in torch.uint8.

        And, if asked for: windows [N], 1 over the deviation of each sample's t (1 for constant ones), and counts [C],
        the sum over the last `counted` samples of the mean over positions of s.
        """
        t = _gate(_prelu(_shifted(v, act), act), gate, fresh=act.slope is not None)
        s = sign(t)
        k = sample_window(t) if windows and gate.per_sample else None
        stored = s + 1 if dtype == torch.uint8 else s
        return stored.to(dtype), k, s[len(s) - counted :].flatten(2).mean(2).sum(0) if counted else None

    def residual(self, y: Tensor, factor: Tensor, bias: Tensor, v: Tensor | None, act: Activation) -> Tensor:
        """h = y factor + bias + act(v), in v's dtype; without v: h = y factor + bias in factor's."""
        h = torch.addcmul(_column(bias), y.to(factor.dtype), _column(factor))
        return h if v is None else h.add_(_prelu(_shifted(v, act), act)).to(v.dtype)

    def backward(
        self,
        v: Tensor,
        act: Activation,
        gate: Gate | None,
        windows: Tensor | None,
        of_h: Tensor | None,
        of_s: Tensor | None,
        beta: Tensor | None = None,
        take: Tensor | None = None,
    ) -> Gradients:
        """From d s (with a gate), less take [N, C], and from d h = of_h.

        To h act(v) was added, without a gate act(v) beta.
        """
        z = _shifted(v, act)
        dx, of_threshold, added = None, None, None
        if gate is not None and of_s is not None:
            t = _gate(_prelu(z, act), gate, fresh=act.slope is not None)
            of_s = of_s if take is None else of_s.to(t.dtype) - take[:, :, None, None].to(t.dtype)
            dx = _slope(t, gate, windows).mul_(of_s)
            of_threshold = _sum(dx)
            dx = dx if gate.beta is None else dx.mul_(gate.beta)
        if of_h is not None:
            dh = of_h.to(z.dtype)
            dh = dh if beta is None else dh * beta.to(dh.dtype)
            added = _sum(dh)
            dx = dh if dx is None else dx.add_(dh)
        assert dx is not None  # one of the two is there
        of_slope = _sum(z.clamp_max(0).mul_(dx))
        dz = dx
        if act.slope is not None:  # Why not torch's backward of PReLU: it takes twice as long as these on a CPU
            below = (z <= 0).to(z.dtype)
            dz = torch.addcmul(dx.new_ones(()), below, _column(act.slope - 1)).mul_(dx)
        return Gradients(dz.to(v.dtype), of_threshold, of_slope, _sum(dz), _sum(dx), added)

    def prepare(
        self,
        latent: Tensor,
        how: Latent,
        dtype: torch.dtype,
        factor: Tensor | None = None,
        inputs: Tensor | None = None,
        constants: Tensor | None = None,
    ) -> Prepared:
        """The weight made of latents, times factor [O] if given. constants: if known. Shapes: inputs [I, kh, kw]."""
        rows = _rows(latent)
        width = rows.shape[1]
        z = rows
        if how.standardize:
            if constants is None:
                mean = rows.mean(1)
                z = rows - mean[:, None]
                std = torch.linalg.vector_norm(z, dim=1) / math.sqrt(width)  # torch.std takes ten times as long
                constants = torch.stack([mean, 1 / ((std + EPS) * math.sqrt(width))], 1)
            else:
                z = rows - constants[:, :1]
        unit = None if constants is None or not how.standardize else constants[:, 1]
        sizes = torch.linalg.vector_norm(z, 1, dim=1) / width if how.mean_abs else None
        sizes = sizes if sizes is None or unit is None else sizes * unit
        made = sign(z) if how.binary else z if unit is None else z * unit[:, None]
        expected = None if inputs is None else made @ inputs.permute(1, 2, 0).reshape(-1)
        weight = made if factor is None else made * factor[:, None]
        return Prepared(_unrowed(weight.to(dtype), latent), constants, sizes, expected)

    def weight_gradient(
        self,
        latent: Tensor,
        how: Latent,
        raw: Tensor,
        constants: Tensor | None,
        undo: Tensor,
        outer: Tensor | None,
        inputs: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """(d latent, dots [O]) from the gradient of the prepared weight without its factor.

        raw less outer inputs is that gradient; times undo [O] it is one of the standardised latents; dots are the sums
        over each row of it times the prepared weight: the factor's gradient.
        """
        e, rows = _rows(raw).to(latent.dtype), _rows(latent)
        if inputs is not None and outer is not None:
            e = torch.addcmul(e, outer[:, None], inputs.permute(1, 2, 0).reshape(1, -1), value=-1)
        if constants is None:
            dots = _dots(sign(rows) if how.binary else rows, e)
            return _unrowed(e * undo[:, None], latent), dots
        mean, unit = constants.unbind(1)
        width = rows.shape[1]
        z = rows - mean[:, None]
        along = _dots(e, z)
        dots = _dots(sign(z), e) if how.binary else along * unit
        sigma = 1 / (unit * math.sqrt(width))
        std = sigma - EPS
        along = torch.where(std > EPS * 1e-3, along / (sigma * std * width), torch.zeros_like(along))
        d = torch.addcmul(e - e.mean(1, keepdim=True), z, along[:, None], value=-1).mul_((unit * undo)[:, None])
        return _unrowed(d, latent), dots


def _rows(weight: Tensor) -> Tensor:
    """[O, I, kh, kw] as [O, kh kw I]: no copy, in channels_last."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


def _unrowed(rows: Tensor, like: Tensor) -> Tensor:
    outputs, inputs, tall, broad = like.shape
    return rows.view(outputs, tall, broad, inputs).permute(0, 3, 1, 2)


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """[O]: the product of each row with its like."""
    return torch.bmm(a[:, None], b[:, :, None]).flatten()


def _gate(x: Tensor, gate: Gate, fresh: bool) -> Tensor:
    """beta x + threshold; over x, where it is `fresh`, that is nobody else's."""
    if gate.beta is not None:
        x, fresh = x.mul_(gate.beta) if fresh else x * gate.beta.to(x.dtype), True
    if gate.threshold is None:
        return x
    return x.add_(_column(gate.threshold)) if fresh else x + _column(gate.threshold)


def _slope(t: Tensor, gate: Gate, windows: Tensor | None) -> Tensor:
    parameter = gate.parameter.to(t.dtype)
    if windows is None:
        return STES[gate.ste].slope(t, parameter)
    k = windows.to(t.dtype).view(-1, 1, 1, 1)
    return STES[gate.ste].slope(k * t, parameter) * k


def _shifted(v: Tensor, act: Activation) -> Tensor:
    """v + shift_in, in the parameters' dtype."""
    v = v.float() if v.dtype in (torch.bfloat16, torch.float16) else v
    return v if act.shift_in is None else v + _column(act.shift_in)


def _prelu(z: Tensor, act: Activation) -> Tensor:
    if act.slope is None:
        return z if act.shift_out is None else z + _column(act.shift_out)
    x = F.prelu(z, act.slope)
    return x if act.shift_out is None else x.add_(_column(act.shift_out))


def _column(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def _sum(x: Tensor) -> Tensor:
    return x.sum((0, 2, 3))


PASSES = Passes()
