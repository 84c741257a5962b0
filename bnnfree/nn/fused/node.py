"""One autograd node for a sign, a binary convolution and what follows it. Imports torch and bnnfree.nn only.

    x = act(v)                       v: what stands before the activation of the block before
    s = sign(beta x + threshold)
    h = factor (s * W - <W, inputs>) + bias + x      or + identity, or nothing
    W = sign(z), z the standardised latents          see `passes.Latent`

Kept for the backward pass: v, in the trunk's type (4 bytes per activation in float32, 2 in bfloat16), of which sign,
estimator and activation are functions; a window per sample, two numbers per output channel. Signs and weights are made
again. Everything else is a parameter.

backward  with g = d h:   d s = correlation of g with factor W
                          d W = factor (correlation of g with s - sum(g) inputs), and on through z by the identity
                          d x = g + beta slope(t) d s, and on through the activation
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from bnnfree.nn.fused.passes import Activation, Gate, Latent, Passes, Prepared, Shared


class Place(NamedTuple):
    """How a kernel moves over the map."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    pad_value: int

    def padded(self, s: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The map with its padding, where that is not of zeros, and the padding left for the convolution."""
        high, wide = self.padding
        if not self.pad_value or not (high or wide):
            return s, self.padding
        padded = F.pad(s, (wide, wide, high, high), value=float(self.pad_value))
        return padded.contiguous(memory_format=torch.channels_last), (0, 0)


class Step(NamedTuple):
    """What is fixed of a node.

    passes    those of `native` or of `passes`
    signs     dtype of signs, weights and their products, and of gradients with respect to them
    added     x is added to h
    counts    the sum over samples of the means of s are an output
    shared    weights of this optimiser step, if micro-batches share them
    """

    passes: Passes
    place: Place
    latent: Latent
    ste: str
    per_sample: bool
    signs: torch.dtype
    added: bool
    counts: bool
    shared: Shared | None


class BinaryNode(Function):
    """See the module; the arguments of `apply` are those of `forward`. Gives h, and counts [C] or None.

    undo [O]: the size that the signs' gradient is divided by (None: 1, or mean |z| where the factor has it not yet).
    inputs [I, kh, kw], beta, parameter and undo get no gradient. What a block does not have is None.
    """

    @staticmethod
    def forward(
        ctx, step, v, slope, shift_in, shift_out, threshold, beta, parameter, latents, undo, factor, bias, inputs,
        identity,
    ):  # fmt: skip
        act, gate = Activation(slope, shift_in, shift_out), Gate(threshold, beta, step.ste, parameter, step.per_sample)
        s, windows, counts = step.passes.binarize(v, act, gate, step.signs, step.per_sample, step.counts)
        made = _weight(step, latents, inputs)
        y = _convolve(step, s, made.weight)
        whole = factor if made.sizes is None else factor * made.sizes
        shift = bias if made.expected is None else bias - whole * made.expected
        if step.added:
            h = step.passes.residual(y, whole, shift, v, act)
        elif identity is not None:
            h = step.passes.residual(y, whole, shift, identity, Activation())
        else:
            h = step.passes.residual(y, whole, shift, None, act).to(v.dtype)
        ctx.step, ctx.of_identity = step, None if identity is None else identity.dtype
        ctx.save_for_backward(
            v, slope, shift_in, shift_out, threshold, beta, parameter, latents, undo, factor, inputs,
            windows, made.constants, made.sizes,
        )  # fmt: skip
        if counts is not None:
            ctx.mark_non_differentiable(counts)
        return h, counts

    @staticmethod
    @once_differentiable
    def backward(ctx, g, _):
        step = ctx.step
        (v, slope, shift_in, shift_out, threshold, beta, parameter, latents, undo, factor, inputs,
         windows, constants, sizes) = ctx.saved_tensors  # fmt: skip
        act, gate = Activation(slope, shift_in, shift_out), Gate(threshold, beta, step.ste, parameter, step.per_sample)
        whole = factor if sizes is None else factor * sizes
        s, _, _ = step.passes.binarize(v, act, gate, step.signs, False, False)
        made = step.passes.prepare(latents, step.latent, step.signs, whole, constants=constants)
        of_s, raw = _convolve_back(step, g, s, made.weight)
        del s, made
        back = step.passes.backward(v, act, gate, windows, g if step.added else None, of_s)
        total = back.added if back.added is not None else g.to(factor.dtype).sum((0, 2, 3))
        size = sizes if sizes is not None else undo
        undone = whole if size is None else whole / size.clamp_min(1e-12)
        of_latents, dots = step.passes.weight_gradient(latents, step.latent, raw, constants, undone, total, inputs)
        of_factor = dots if sizes is None else dots * sizes
        of_threshold = None if threshold is None else back.threshold
        of_act = [
            None if p is None else d for p, d in zip(act, (back.slope, back.shift_in, back.shift_out), strict=True)
        ]
        of_identity = None if ctx.of_identity is None else g.to(ctx.of_identity)
        return (None, back.v, *of_act, of_threshold, None, None, of_latents, None, of_factor, total, None, of_identity)


class ActivationNode(Function):
    """x = average pool of beta act(v), of which v alone is kept.

    pool: side and stride of the pool, 1 for none; windows that reach over the edge average what is inside.
    """

    @staticmethod
    def forward(ctx, passes, v, slope, shift_in, shift_out, beta, pool):
        ctx.save_for_backward(v, slope, shift_in, shift_out, beta)
        ctx.passes, ctx.pool = passes, pool
        x = passes.activate(v, Activation(slope, shift_in, shift_out), beta).to(v.dtype)
        return x if pool == 1 else F.avg_pool2d(x, pool, ceil_mode=True, count_include_pad=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        v, slope, shift_in, shift_out, beta = ctx.saved_tensors
        if ctx.pool > 1:
            # of the map the shape counts: the derivative of an average does not depend on what is averaged
            side = [ctx.pool, ctx.pool]
            g = torch.ops.aten.avg_pool2d_backward(g, v, side, side, [0, 0], True, False, None)
        act = Activation(slope, shift_in, shift_out)
        back = ctx.passes.backward(v, act, None, None, g, None, beta)
        of_act = [
            None if p is None else d for p, d in zip(act, (back.slope, back.shift_in, back.shift_out), strict=True)
        ]
        return (None, back.v, *of_act, None, None)


def _weight(step: Step, latents: Tensor, inputs: Tensor | None) -> Prepared:
    if step.shared is None:
        return step.passes.prepare(latents, step.latent, step.signs, inputs=inputs)
    return step.shared.get(latents, lambda: step.passes.prepare(latents, step.latent, step.signs, inputs=inputs))


def _convolve(step: Step, s: Tensor, weight: Tensor) -> Tensor:
    place = step.place
    s, padding = place.padded(s)
    return F.conv2d(s, weight, None, place.stride, padding, place.dilation, place.groups)


def _convolve_back(step: Step, g: Tensor, s: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(d s, d weight) of `_convolve`, of which the first is with the factor that `weight` has."""
    place = step.place
    padded, padding = place.padded(s)
    of_s, of_weight, _ = torch.ops.aten.convolution_backward(
        g.to(step.signs), padded, weight, None, place.stride, padding, place.dilation, False, [0, 0], place.groups,
        [True, True, False],
    )  # fmt: skip
    if padding != place.padding:
        (high, wide), (rows, columns) = place.padding, s.shape[2:]
        of_s = of_s[:, :, high : high + rows, wide : wide + columns]
    return of_s, of_weight
