"""Augmentations that images in memory and streamed images share: policies of torchvision, and mixtures of two images.

A policy changes one uint8 image, by a seed of its own. A mixture joins an image with its neighbour in the epoch's
order (positions 0 and 1, 2 and 3, ...; an odd last one stays alone) by draws that are a function of (seed, epoch) and
of the position. So neither depends on the batch, the rank, the worker or the device.

To add a policy: one line of POLICIES. A mixture: its weights, a line of MIXTURES.

Must not import bnnfree.nn, models, export or engine, nor another file of this room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

POLICIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "color_jitter": ("ColorJitter", "", {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}),
    "randaugment": ("RandAugment", "fill", {"num_ops": 2, "magnitude": 9}),
    "trivialaugment": ("TrivialAugmentWide", "fill", {}),
    "random_erasing": ("RandomErasing", "value", {"p": 0.25}),
}
"""Each: class of torchvision.transforms.v2, its option for the colour of what is left empty, its other options."""


@cache
def policy(name: str, fill: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """uint8 [C,H,W] -> the same, changed at random by torch's global state; what it leaves empty is `fill`."""
    from torchvision.transforms import v2

    kind, colour, options = POLICIES[name]
    return getattr(v2, kind)(**options, **({colour: list(fill)} if colour else {}))


@contextmanager
def seeded() -> Iterator[Callable[[int], Any]]:
    """Within it the given function seeds torch's global state on the CPU, which is afterwards as it was."""
    with torch.random.fork_rng(devices=[]):  # Why: torchvision draws from the global state only
        yield torch.default_generator.manual_seed


def mixup(draws: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Share of the image itself: the first draw, alike for all pixels. Ref: Zhang et al. 2018."""
    return draws[:, 0, None, None], draws[:, 0]


def cutmix(draws: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The neighbour fills a rectangle of 1 - the first draw of the area, about a random place. Ref: Yun et al. 2019."""
    side = (1 - draws[:, 0]).sqrt()

    def inside(length: int, middle: Tensor) -> Tensor:
        centre, half = middle * length, side * length / 2
        place = torch.arange(length, device=draws.device)
        return (place >= (centre - half).round()[:, None]) & (place < (centre + half).round()[:, None])

    rows, columns = inside(height, draws[:, 1]), inside(width, draws[:, 2])
    own = ~(rows[:, :, None] & columns[:, None, :])
    return own.float(), 1 - rows.sum(1) * columns.sum(1) / (height * width)


MIXTURES = {"mixup": mixup, "cutmix": cutmix}
"""Each: (draws [B,3], height, width) -> shares of the image itself: by pixel [B,H,W] or [B,1,1], of its label [B]."""


@dataclass(frozen=True)
class Mixing:
    """Mixtures for training images; of several, each image draws one. Their labels become shares of the `classes`.

    The first draw of a mixture is of Beta(alpha, alpha).
    """

    names: Sequence[str]
    alpha: float
    classes: int

    def draw(self, count: int, seed: int) -> Tensor:
        """Draws for the positions of an epoch of `count` images: which mixture, and its own. Shapes: [count,4]."""
        random = np.random.RandomState(seed)
        draws = random.random_sample((count, 4))
        draws[:, 1] = random.beta(self.alpha, self.alpha, count)
        return torch.from_numpy(draws.astype(np.float32))

    def __call__(self, own: Tensor, other: Tensor, labels: Tensor, others: Tensor, draws: Tensor):
        """(images, label shares) of images `own` and their neighbours `other` [B,C,H,W], labels [B], draws [B,4]."""
        chosen = (draws[:, 0] * len(self.names)).long().clamp(max=len(self.names) - 1)
        mixed, shares = own, F.one_hot(labels, self.classes).float()
        for number, name in enumerate(self.names):
            weight, share = MIXTURES[name](draws[:, 1:], *own.shape[2:])
            use = chosen == number
            blend = weight[:, None] * own + (1 - weight[:, None]) * other
            targets = F.one_hot(labels, self.classes), F.one_hot(others, self.classes)
            target = share[:, None] * targets[0] + (1 - share[:, None]) * targets[1]
            mixed = torch.where(use[:, None, None, None], blend, mixed)
            shares = torch.where(use[:, None], target, shares)
        return mixed.contiguous(memory_format=torch.channels_last), shares


def neighbours(positions: Tensor, count: int) -> Tensor:
    """The positions of the neighbours, in an epoch of `count` images; one without a neighbour is its own."""
    return torch.where((positions ^ 1) < count, positions ^ 1, positions)
