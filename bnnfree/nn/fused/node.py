"""One autograd node for a sign, a binary convolution and what follows it. Imports torch and bnnfree.nn only.

    x = act(v)                       v: what stands before the activation of the block before
    s = sign(beta x + threshold)
    h = factor (s * W - <W, inputs>) + bias + x      or + identity, or nothing
    W = sign(z), z the standardised latents          see `passes.Latent`

Kept for the backward pass: v, in the trunk's type (4 bytes per activation in float32, 2 in bfloat16), of which sign,
estimator and activation are functions; a window per sample, two numbers per output channel. Signs and weights are made
again. Everything else is a parameter.

backward  with g = d h:   d s = correlation of g with factor W, less what centring takes
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

from bnnfree.nn.centring import GradientCentre
from bnnfree.nn.fused import int8
from bnnfree.nn.fused.passes import Activation, Gate, Gradients, Latent, Passes, Prepared, Shared
from bnnfree.nn.fused.place import Place

SMALL = 16  # positions of a map: below, a product of matrices finds the weights' gradient sooner, measured on AVX-512


class Step(NamedTuple):
    """Constants of a node.

    passes    those of `native` or of `passes`
    signs     dtype of signs, weights and their products, and of gradients with respect to them
    added     x is added to h
    counted   of so many samples, from the last, the sum of the means of s is an output
    centre    what is taken from the signs' gradient (bnnfree.nn.centring)
    shared    weights of this optimiser step, if micro-batches share them
    int8      the products of the forward pass are whole numbers of 8 bits, see `int8`
    """

    passes: Passes
    place: Place
    latent: Latent
    ste: str
    per_sample: bool
    signs: torch.dtype
    added: bool
    counted: int
    centre: GradientCentre | None
    shared: Shared | None
    int8: bool


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
        kind = int8.SIGNS if step.int8 else step.signs
        s, windows, counts = step.passes.binarize(v, act, gate, kind, step.per_sample, step.counted)
        made = _weight(step, latents, inputs)
        y = _convolve(step, s, made.weight, len(latents))
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
        s, _, _ = step.passes.binarize(v, act, gate, step.signs, False, 0)
        made = step.passes.prepare(latents, step.latent, step.signs, whole, constants=constants)
        of_s, raw = _convolve_back(step, g, s, made.weight)
        del s, made
        take = None if step.centre is None else step.centre.taken(of_s)
        back = step.passes.backward(v, act, gate, windows, g if step.added else None, of_s, take=take)
        total = back.added if back.added is not None else g.to(factor.dtype).sum((0, 2, 3))
        size = sizes if sizes is not None else undo
        undone = whole if size is None else whole / size.clamp_min(1e-12)
        of_latents, dots = step.passes.weight_gradient(latents, step.latent, raw, constants, undone, total, inputs)
        of_factor = dots if sizes is None else dots * sizes
        of_threshold = None if threshold is None else back.threshold
        of_identity = None if ctx.of_identity is None else g.to(ctx.of_identity)
        return (
            None,
            back.v,
            *_of_act(act, back),
            of_threshold,
            None,
            None,
            of_latents,
            None,
            of_factor,
            total,
            None,
            of_identity,
        )


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
        return (None, back.v, *_of_act(act, back), None, None)


def _of_act(act: Activation, back: Gradients) -> list[Tensor | None]:
    """Gradients of the parameters that the activation has."""
    given = back.slope, back.shift_in, back.shift_out
    return [None if mine is None else gradient for mine, gradient in zip(act, given, strict=True)]


def _weight(step: Step, latents: Tensor, inputs: Tensor | None) -> Prepared:
    def make() -> Prepared:
        if not step.int8:
            return step.passes.prepare(latents, step.latent, step.signs, inputs=inputs)
        made = step.passes.prepare(latents, step.latent, int8.WEIGHTS, inputs=inputs)
        return made._replace(weight=int8.pack(made.weight, step.place))

    return make() if step.shared is None else step.shared.get(latents, make)


def _convolve(step: Step, s: Tensor, weight: Tensor, channels: int) -> Tensor:
    place = step.place
    if step.int8:
        return int8.convolve(s, weight, channels, place)
    s, padding = place.padded(s)
    return F.conv2d(s, weight, None, place.stride, padding, place.dilation, place.groups)


def _convolve_back(step: Step, g: Tensor, s: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(d s, d weight) of `_convolve`, of which the first is with the factor that `weight` has."""
    place = step.place
    padded, padding = place.padded(s)
    g = g.to(step.signs)
    small = g.device.type == "cpu" and place.groups == 1 and g.shape[2] * g.shape[3] <= SMALL
    of_s, of_weight, _ = torch.ops.aten.convolution_backward(
        g, padded, weight, None, place.stride, padding, place.dilation, False, [0, 0], place.groups,
        [True, not small, False],
    )  # fmt: skip
    if small:
        of_weight = _product(g, padded, padding, weight.shape, place)
    if padding != place.padding:
        (high, wide), (rows, columns) = place.padding, s.shape[2:]
        of_s = of_s[:, :, high : high + rows, wide : wide + columns]
    return of_s, of_weight


def _product(g: Tensor, s: Tensor, padding: tuple[int, int], shape: torch.Size, place: Place) -> Tensor:
    """d weight as one product of matrices. Shapes: g [N, O, H', W'], s [N, I, H, W], shape [O, I, kh, kw]."""
    outputs, inputs, tall, broad = shape
    x = F.pad(s, (padding[1], padding[1], padding[0], padding[0])).contiguous(memory_format=torch.channels_last)
    x = x.permute(0, 2, 3, 1)
    sample, row, column, one = x.stride()
    n, _, height, width = g.shape
    (down, right), (below, beside) = place.stride, place.dilation
    steps = sample, down * row, right * column, below * row, beside * column, one
    seen = x.as_strided((n, height, width, tall, broad, inputs), steps)
    rows = g.permute(0, 2, 3, 1).reshape(-1, outputs)
    made = rows.t() @ seen.reshape(len(rows), -1)
    return made.view(outputs, tall, broad, inputs).permute(0, 3, 1, 2)
