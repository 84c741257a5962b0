"""Passes of an optimiser step: what each shows, and its part in centring gradients.

Imports torch, bnnfree.nn and its own room.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from bnnfree.nn import NORMS, Part, ask_before, gradient_centres, plan_step, set_part
from bnnfree.recipe.schema import Recipe
from bnnfree.train.dist import Dist

FEW = 8  # images of a step: below, the others' mean is mostly noise, and images of steps before pay


class Pass(NamedTuple):
    """Images, labels of the last of them (the others have no loss), and the part in centring gradients."""

    images: Tensor
    labels: Tensor
    part: Part | None


class Passes:
    """Division of steps into passes, such that gradients do not depend on it (`bnnfree.nn.centring`).

    recent       images of the steps before, where steps are too small for a group of their own
    shows_again  may images be in a second pass, without a loss? Not with batch statistics or BNP, which would see them
    """

    def __init__(self, recipe: Recipe, model: nn.Module, dist: Dist):
        self.recipe, self.dist = recipe, dist
        self.centres = gradient_centres(model)
        self.like = next(model.parameters())
        self.recent: list[Tensor] = []
        self.shows_again = recipe.optimizer.precondition is None and not NORMS[recipe.model.norm].batch_dependent
        for centre in self.centres:
            centre.size = recipe.free.group

    def asks_before(self, count: int) -> bool:
        """True where a step of so many images is centred by images of steps before."""
        wanted = self.recipe.free.reference > 0 and count < FEW
        return wanted and self.shows_again and self.dist.world == 1 and bool(self.centres)

    def usual_sizes(self) -> set[int]:
        """Images of a pass but for an epoch's last ones, and those shown again."""
        size = self.recipe.data.batch_size
        share = len(range(self.dist.rank, size, self.dist.world))
        if self.asks_before(size * self.recipe.accumulate):
            return {share, max(share, self.recipe.free.reference)}
        return {share}

    def of_step(self, group: list[tuple[Tensor, Tensor]]) -> tuple[list[Pass], Tensor]:
        """The passes of a step whose images and labels are `group`, and its samples in all processes."""
        own = [len(labels) for _, labels in group]
        counts = self.dist.sum_(torch.tensor(own, dtype=torch.float32, device=self.dist.device))
        if not self.centres:
            return [Pass(*each, None) for each in group], counts.sum()
        sizes = own if self.dist.world == 1 else [int(count) for count in counts.tolist()]
        if self.asks_before(sum(sizes)):
            return self._after_those_before(group), counts.sum()
        if self.shows_again:
            parts, again = self._plan(sizes, own)
        else:  # each pass for itself
            parts, again = [self._plan([size], [n])[0][0] for size, n in zip(sizes, own, strict=True)], []
        passes = [Pass(*each, part) for each, part in zip(group, parts, strict=True)]
        for rows, part in again:
            images = torch.stack([group[i][0][n] for i, n in rows])
            images = images.contiguous(memory_format=torch.channels_last)
            passes.append(Pass(images, group[0][1][:0], part))
        return passes, counts.sum()

    def _plan(self, sizes: list[int], own: list[int]):
        dist = self.dist
        sum_ = None if dist.world == 1 else dist.sum_
        return plan_step(sizes, self.recipe.free.group, own, self.like, dist.rank, dist.world, sum_)

    def _after_those_before(self, group: list[tuple[Tensor, Tensor]]) -> list[Pass]:
        """In the last pass images of before come first."""
        count, (images, labels) = self.recipe.free.reference, group[-1]
        seen = torch.cat([*self.recent, *(each for each, _ in group)])
        self.recent = [seen[-count:]]
        shown = seen[-max(count, len(images)) :]
        passes = [Pass(x, y, ask_before(len(x), len(x), 0, False, self.like)) for x, y in group[:-1]]
        last = ask_before(len(shown), len(images), min(count, len(shown)), True, self.like)
        return [*passes, Pass(shown, labels, last)]

    def begin(self, of: Pass | None, first: bool = False) -> None:
        """Say that the network's next pass is this one (None: of no step); `first` of its step."""
        set_part(self.centres, None if of is None else of.part, first)
