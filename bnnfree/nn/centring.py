"""Centring the gradient that reaches the inputs of centred layers. Imports torch only.

A layer that takes out the expected mean of its outputs (`bnnfree.nn.standard.WeightLayer`, centre "input") holds that
mean at 0 whatever moves the mean of its inputs. To the backward pass the expected mean is a constant: left alone, it
asks thresholds, shifts, gains and weights before the layer for shifts that the layer is about to undo. In a random
ReActNet-20 what is wrong with the gradients of biases is larger than these gradients (tests/test_block.py). It is
known: the gradient with respect to the inputs, as far as it moves all samples together. So, in training,

    dL/dx_n <- dL/dx_n - share (mean over the other m of n's group of the means over positions of dL/dx_m)

without the own share, which is signal. Of M others, share = M^2 / (M^2 + SHRINKAGE^2): one other is mostly noise, and a
sample alone keeps its gradient. It is the gradient of mean-only batch normalisation over a group, but for the own
share; the forward pass knows no batch.

Groups are of GROUP consecutive samples of an optimiser step (the remainder is spread over them), however the step is
divided into passes and processes: `plan_step` says who contributes to which sum and who loses what share of it. A group
within one pass costs nothing more. The samples of a group that passes divide are shown once more, without a loss, when
all have had theirs: centring is linear in the gradients, so what that pass adds is what was left to be taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bnnfree.names import GROUP

SHRINKAGE = 2.0  # others: the mean of fewer is mostly noise (recipes/NOTES.md, section 15)


def weight_of_each(others: Any) -> Any:
    """Share of the mean of `others` samples (a number, or a tensor of such) that is taken, over their number."""
    return others / (others**2 + SHRINKAGE**2)


def groups_of(count: int, size: int) -> int:
    """Number of groups of `count` samples, each of `size` or somewhat more; size 0: one."""
    return max(1, count // size) if size else 1


def group_of_each(count: int, size: int) -> Tensor:
    """[count]: the group of each of `count` consecutive samples, as `Tensor.tensor_split` makes them."""
    small, larger = divmod(count, groups_of(count, size))
    index = torch.arange(count)
    return torch.maximum(index // (small + 1), (index - larger) // max(small, 1))


def taken_alone(own: Tensor, size: int) -> Tensor:
    """Amounts to take from samples whose groups are of this pass alone: [N, C, ...] like `own`, position means."""
    groups = own.tensor_split(groups_of(len(own), size))
    return torch.cat([(group.sum(0) - group) * weight_of_each(len(group) - 1) for group in groups])


class Part(NamedTuple):
    """Part of one pass of N samples in the centring of a step of G groups.

    member   [N, G], 1 where sample n counts in the sum of group g
    taken    [N, G], the share of that sum which sample n loses
    own      [N], the share of its own gradient which it keeps
    divided  sums go on to the step's later passes, where groups are divided by passes
    counted  how many of the pass's last samples are new, and move the running means of layers' inputs
    sum_     sums over processes, in place; None: of one
    """

    member: Tensor
    taken: Tensor
    own: Tensor
    divided: bool
    counted: int
    sum_: Callable[[Tensor], Tensor] | None


class Again(NamedTuple):
    """A group that passes divide: `rows`, (pass, sample) of those of this process, and the part of the pass of them."""

    rows: list[tuple[int, int]]
    part: Part


class GradientCentre:
    """The mean to take from the gradient of a layer's inputs: as `part` says, or (None) by groups of the pass alone."""

    def __init__(self) -> None:
        self.size = GROUP
        self.part: Part | None = None
        self.total: Tensor | None = None  # [G, C], of the passes before, where groups are divided

    def taken(self, grad: Tensor) -> Tensor | None:
        """[N, C] to be subtracted at every position of grad [N, C, ...]; None: nothing."""
        real = torch.float32 if grad.dtype in (torch.bfloat16, torch.float16) else grad.dtype
        own = grad.flatten(2).mean(2, dtype=real) if grad.dim() > 2 else grad.to(real)
        part = self.part
        if part is None:
            return taken_alone(own, self.size) if len(own) > 1 else None
        sums = part.member.to(real).T @ own
        if part.divided:
            self.total = sums = sums if self.total is None else sums + self.total
        if part.sum_ is not None:
            sums = part.sum_(sums.clone())
        return part.taken.to(real) @ sums - part.own.to(real)[:, None] * own

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


def set_part(centres: Sequence[GradientCentre], part: Part | None, first: bool = False) -> None:
    """Say what the coming pass is in its step; `first`: sums of a step before are forgotten."""
    for centre in centres:
        centre.part = part
        if first:
            centre.total = None


def plan_step(
    sizes: Sequence[int],
    size: int,
    own: Sequence[int],
    like: Tensor,
    rank: int = 0,
    world: int = 1,
    sum_: Callable[[Tensor], Tensor] | None = None,
) -> tuple[list[Part | None], list[Again]]:
    """The parts of a step's passes, and the groups to be shown again after them.

    sizes   samples of each pass, over all processes
    size    samples of a group, as for `group_of_each`
    own     samples of each pass in this process: every world-th, from `rank` on
    like    a tensor of the dtype and device to compute in
    None stands for a pass that is centred by groups of its own, without other passes or processes.
    """
    groups = group_of_each(sum(sizes), size)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    if world == 1:
        alone = [group_of_each(each, size) for each in sizes]
        firsts = [sum(int(g[-1]) + 1 for g in alone[:i]) for i in range(len(alone))]
        if torch.equal(torch.cat([g + first for g, first in zip(alone, firsts, strict=True)]), groups):
            return [None] * len(sizes), []
    weights = weight_of_each(groups.bincount().to(torch.float64) - 1)
    ends = [start + each - 1 for start, each in zip(starts, sizes, strict=True)]
    between = {int(groups[end]) for end in ends[:-1]} & {int(groups[start]) for start in starts[1:]}
    spans = sorted(between)
    within = torch.tensor([float(g not in between) for g in range(len(weights))], dtype=torch.float64)
    mine: list[Tensor] = []
    parts: list[Part | None] = []
    for start, end, count in zip(starts, ends, own, strict=True):
        # the end bounds those of a process of which more images could be read than of others
        index = groups[(start + rank + world * torch.arange(count)).clamp(max=end)]
        member = nn.functional.one_hot(index, len(weights)).to(torch.float64)
        each = member * weights
        part = Part(member, each * within, each.sum(1), bool(spans), count, sum_)
        parts.append(_like(part, like))
        mine.append(index)
    again = []
    for group in spans:
        rows = [(i, n) for i, index in enumerate(mine) for n in (index == group).nonzero().flatten().tolist()]
        member = nn.functional.one_hot(torch.full((len(rows),), group), len(weights)).to(torch.float64)
        each = member * weights
        again.append(Again(rows, _like(Part(member, each, each.sum(1), True, 0, sum_), like)))
    return parts, again


def ask_before(seen: int, new: int, references: int, last: bool, like: Tensor) -> Part:
    """The part of a pass in a step of few samples, which is centred by samples of steps before.

    All passes' sums are left to the step's last, whose `seen` samples end in `new` ones; it takes their mean over the
    last `references` from each of these. They are what is asked how the means of inputs respond, without a loss but the
    new ones' (recipes/NOTES.md, sections 14 and 16).
    """
    member = torch.ones(seen, 1)
    taken = torch.zeros(seen, 1, dtype=torch.float64)
    if last:
        taken[seen - references :] = 1 / references
    return _like(Part(member, taken, torch.zeros(seen), True, new, None), like)


def _like(part: Part, like: Tensor) -> Part:
    member, taken, own = (each.to(like.device, like.dtype) for each in (part.member, part.taken, part.own))
    return part._replace(member=member, taken=taken, own=own)
