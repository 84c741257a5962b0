"""Centring the gradient that reaches the inputs of centred layers. Imports torch only.

A layer that takes out the expected mean of its outputs (`bnnfree.nn.standard.WeightLayer`, centre "input") holds that
mean at 0 whatever moves the mean of its inputs. To the backward pass the expected mean is a constant: left alone, it
asks thresholds, shifts, gains and weights before the layer for shifts that the layer is about to undo. In a random
ReActNet-20 what is wrong with the gradients of biases is larger than these gradients (tests/test_block.py). It is
known: the gradient with respect to the inputs, as far as it moves all samples together.

    batch       dL/dx_n <- dL/dx_n - share (mean over m != n of the means over positions of dL/dx_m)
                N samples of one pass, without the own share, which is signal. One other is mostly noise:
                share = (N - 1)^2 / ((N - 1)^2 + SHRINKAGE^2). A sample alone keeps its gradient
    gather      dL/dx_n stays, and the means over positions are summed over the passes of a step
    reference   the last pass of a step, at whose end are R reference images, those without a loss among them:
                dL/dx_r <- dL/dx_r - 1/R (that sum + the sum over this pass). What it adds to the gradients is the same
                correction, whatever the passes' size: the response of the inputs' means to the parameters, measured on
                the R images, times the sum

The first is what the mean in batch normalisation does to the gradient, but for the own share. All act in the backward
pass alone; the forward pass knows no batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

SHRINKAGE = 2.0  # others: the mean of fewer is mostly noise (recipes/NOTES.md, section 15)


def weight_of_each(others: int) -> float:
    """What each of `others` samples counts in the mean that is taken: share / others."""
    return others / (others**2 + SHRINKAGE**2)


class GradientCentre:
    """What is taken from the gradient of one layer's inputs; `mode` is batch, gather or reference."""

    def __init__(self) -> None:
        self.mode = "batch"
        self.total: Tensor | None = None  # [C], in mode "gather"
        self.references = 0  # how many, in mode "reference"
        self.counted: int | None = None  # samples at a pass's end that the running mean of inputs counts; None: all

    def taken(self, grad: Tensor) -> Tensor | None:
        """[N, C] to be subtracted at every position of grad [N, C, ...]; None: nothing."""
        real = torch.float32 if grad.dtype in (torch.bfloat16, torch.float16) else grad.dtype
        own = grad.flatten(2).mean(2, dtype=real) if grad.dim() > 2 else grad.to(real)
        if self.mode != "batch":
            total = own.sum(0) if self.total is None else own.sum(0) + self.total
            if self.mode == "gather":
                self.total = total
                return None
            taken = torch.zeros_like(own)
            taken[-self.references :] = total / self.references
            return taken
        if len(own) < 2:
            return None
        return (own.sum(0) - own) * weight_of_each(len(own) - 1)

    def __call__(self, x: Tensor) -> Tensor:
        """x, whose gradient will lose what is taken."""
        return _Centred.apply(x, self)


class _Centred(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, centre: GradientCentre) -> Tensor:
        ctx.centre = centre
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        taken = ctx.centre.taken(grad)
        if taken is None:
            return grad, None
        return grad - taken.view(*taken.shape, *[1] * (grad.dim() - 2)).to(grad.dtype), None


def gradient_centres(model: nn.Module) -> list[GradientCentre]:
    """Those of all layers that have one."""
    found = (getattr(module, "gradient_centre", None) for module in model.modules())
    return [centre for centre in found if centre is not None]


def gather_gradients(model: nn.Module) -> bool:
    """From now on passes gather; whether there is a layer that does."""
    centres = gradient_centres(model)
    for centre in centres:
        centre.mode, centre.total, centre.counted = "gather", None, None
    return bool(centres)


@contextmanager
def reference_pass(model: nn.Module, references: int, counted: int) -> Iterator[None]:
    """Within it is the last pass of a step; afterwards passes gather for the next.

    references: how many of its last images are reference images
    counted: how many of its last images are new, and move the running means of layers' inputs
    """
    for centre in gradient_centres(model):
        centre.mode, centre.references, centre.counted = "reference", references, counted
    try:
        yield
    finally:
        gather_gradients(model)
