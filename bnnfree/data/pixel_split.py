"""Splits of a data set: their interface, and the kind that holds pixels in memory; file_split.py reads files.

Everything random about a training sample is a function of (seed, epoch) and of its position in the epoch's
order, never of the batch it falls into, the rank, the worker or the device. So four batches of 32 in a row
hold the pixels of one batch of 128, the ranks' parts make up the one-process batch, and an epoch can be
resumed at any batch. torch's global random state is neither read nor changed.

To add an augmentation of pixels in memory: one function and one line of GEOMETRIES; augment.py has those that streamed
images know too.

Must not import bnnfree.nn, models, export or engine, nor bnnfree.data.datasets: data sets are not its business.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bnnfree.data.augment import POLICIES, Mixing, neighbours, policy, seeded
from bnnfree.errors import DataError

Batches = Iterator[tuple[Tensor, Tensor]]
Numbered = tuple[Tensor, Tensor, Tensor]  # images, labels, and the images' numbers
Part = slice | Tensor  # positions of an epoch
SETTLING = 128  # images in a batch that statistics are measured on


def flip(images: Tensor, draws: Tensor) -> Tensor:
    """Mirror left-right the images whose first draw is below 0.5. Shapes: [B,H,W,C], draws [B,2] in [0,1)."""
    return torch.where(draws[:, 0, None, None, None] < 0.5, images.flip(2), images)


def crop(images: Tensor, draws: Tensor) -> Tensor:
    """Pad by an eighth of the width with the mean pixel (0 once normalised), crop back at a random place."""
    return _crop(images, draws, max(1, images.shape[2] // 8))


def shift(images: Tensor, draws: Tensor) -> Tensor:
    """`crop` by at most one pixel, for images as small as digits."""
    return _crop(images, draws, 1)


def _crop(images: Tensor, draws: Tensor, pad: int) -> Tensor:
    """Crop [H,W] windows out of padded images as one gather. Shapes: [B,H,W,C], draws [B,2] in [0,1)."""
    count, height, width, _ = images.shape
    padded = F.pad(images, (0, 0, pad, pad, pad, pad))
    top, left = (draws * (2 * pad + 1)).long().unbind(1)
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    sample = torch.arange(count, device=images.device)[:, None, None]
    return padded[sample, rows[:, :, None], columns[:, None, :]]


GEOMETRIES = {"flip": flip, "crop": crop, "shift": shift}


def in_bursts(order: Tensor, labels: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """The images of `order`, `length` of one class in a row (a class's last ones: fewer), the runs shuffled.

    Shapes: order [N] of image numbers, labels of the images.
    """
    classes = labels[order]
    by_class = torch.argsort(classes, stable=True)
    counts = torch.bincount(classes)
    rank = torch.empty_like(order)  # of an image among those of its class
    rank[by_class] = torch.arange(len(order)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    runs = torch.stack([classes, rank // length], 1).unique(dim=0, return_inverse=True)[1]
    place = torch.randperm(int(runs.max()) + 1, generator=generator)
    return order[torch.argsort(place[runs], stable=True)]


class Split:
    """Labelled images and the order they come in; a subclass says how they are read.

    Both kinds of iterator yield (images, labels): float32 [B,C,H,W] in channels_last memory order, normalised
    as (pixel/255 - mean)/std, and int64 [B], or with `mixing` the classes' shares [B,classes]. `batch_size` counts
    the images of all `world` ranks together; a rank takes every world-th image of each batch, so the parts of a
    batch differ by at most one image.
    """

    skipped = 0  # unreadable images left out so far
    burst = 1  # training images of one class that come in a row; 1: shuffled
    mixing: Mixing | None = None  # of training images with their neighbours

    def __init__(self, labels: np.ndarray, mean: Sequence[float], std: Sequence[float], augment: Sequence[str] = ()):
        self.labels = torch.from_numpy(np.asarray(labels, np.int64))
        self.mean, self.std, self.augment = tuple(mean), tuple(std), tuple(augment)

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)

    def train_steps(self, batch_size: int, world: int = 1) -> int:
        """Batches per epoch. The last one may be smaller; one that would leave a rank empty is dropped.

        Errors: DataError where not even one batch has an image for every rank.
        """
        if min(batch_size, len(self)) < world or world < 1:
            raise DataError(
                f"train_batches: got batch_size {batch_size} of {len(self)} images for {world} ranks,"
                " expected at least one image for each rank."
            )
        whole, rest = divmod(len(self), batch_size)
        return whole + (rest >= world)

    def batches(self, batch_size: int, *, device: str | torch.device = "cpu", rank: int = 0, world: int = 1) -> Batches:
        """Every image once, in order and without augmentation; all ranks together cover each exactly once.

        Ranks may yield different numbers of batches: collect their sums after the loop, not inside it.
        """
        parts = _parts(len(self), batch_size, rank, world)
        parts = [part for part in parts if _length(part)]
        for images, labels, _ in self._read(torch.arange(len(self)), None, parts, device):
            yield images, labels

    def spread(self, count: int) -> tuple[Tensor, Tensor]:
        """`count` images (all, if there are fewer) from first to last at equal distances, and their labels, on the CPU.

        Why not the first ones: files lie in folders by class. Not augmented, normalised as in training.
        """
        count = min(count, len(self))
        order = torch.arange(count) * len(self) // count
        parts = [slice(first, min(first + 256, count)) for first in range(0, count, 256)]
        images, labels, _ = zip(*self._read(order, None, parts, "cpu"), strict=True)
        return torch.cat(images), torch.cat(labels)

    def train_batches(
        self,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        device: str | torch.device = "cpu",
    ) -> Batches:
        """The augmented batches of one epoch in its random order, from batch number `start` on."""
        parts = _parts(len(self), batch_size, rank, world)[start : self.train_steps(batch_size, world)]
        words = [seed & (2**64 - 1), epoch]
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))
        order = self._order(generator)
        if self.burst > 1:
            order = in_bursts(order, self.labels.cpu(), self.burst, generator)
        draws = self._draw(generator)
        if self.mixing is None:
            for images, labels, _ in self._read(order, draws, parts, device):
                yield images, labels
        else:
            own = [torch.arange(len(self))[part] for part in parts]
            seeds = np.random.SeedSequence([*words, 1]).generate_state(1)
            yield from self._mixed(order, draws, own, self.mixing.draw(len(self), int(seeds[0])), device)

    def _mixed(self, order: Tensor, draws: Tensor, parts: list[Tensor], mixtures: Tensor, device) -> Batches:
        """Training batches mixed with their neighbours, which are read too where they are not in the batch."""
        assert self.mixing is not None
        others = [neighbours(own, len(self)) for own in parts]
        wanted = [torch.cat([own, other[~torch.isin(other, own)]]) for own, other in zip(parts, others, strict=True)]
        read = self._read(order, draws, wanted, device)
        for own, other, (images, labels, numbers) in zip(parts, others, read, strict=True):
            found = order[torch.stack([own, other])][..., None] == numbers.cpu()
            readable = found.any(2)  # an unreadable image is left out, and its neighbour alone
            rows = found.long().argmax(2)
            place, beside = torch.where(readable, rows, rows[0])[:, readable[0]].to(device)
            shares = mixtures[own[readable[0]]].to(device)
            yield self.mixing(images[place], images[beside], labels[place], labels[beside], shares)

    def first_batches(self, wanted: int, batch_size: int, **epoch: Any) -> Batches:
        """An epoch's first batches, as many as hold `wanted` images; `epoch` as in `train_batches`."""
        yield from itertools.islice(self.train_batches(batch_size, **epoch), -(-wanted // batch_size))

    def settling_batches(self, wanted: int, batch_size: int, **epoch: Any) -> Iterator[Tensor]:
        """Images of an epoch's first batches for `bnnfree.nn.settle`, SETTLING of them or more in a batch.

        Why: the statistics of fewer images scatter, which costs a network of batch norms up to a point.
        """
        size = max(batch_size, min(SETTLING, wanted))
        return (images for images, _ in self.first_batches(wanted, size, **epoch))

    def resized(self, size: tuple[int, int]) -> Split:
        """The same images, order and augmentation at (height, width), normalised by the same statistics."""
        raise NotImplementedError

    def digest(self) -> str:
        """A hash of the images, or of what lists them, and of their labels, in order: other data have another."""
        digest = hashlib.blake2b(self.labels.numpy(force=True).astype("<i8").tobytes(), digest_size=12)
        for part in self._listing():
            digest.update(part)
        return digest.hexdigest()

    def _listing(self) -> Iterable[bytes]:
        """Bytes that tell the images from others."""
        raise NotImplementedError

    def _order(self, generator: torch.Generator) -> Tensor:
        """The order of an epoch: a permutation of the images."""
        return torch.randperm(len(self), generator=generator)

    def _draw(self, generator: torch.Generator) -> Tensor:
        """Random numbers of the augmentation, one row for each position of an epoch. Shapes: [N, ...]."""
        raise NotImplementedError

    def _fill(self) -> tuple[int, ...]:
        """The mean pixel: what augmentations put where an image has none."""
        return tuple(round(255 * mean) for mean in self.mean)

    def _read(self, order: Tensor, draws: Tensor | None, parts: Sequence[Part], device) -> Iterator[Numbered]:
        """Batches of the images `order[part]`, augmented by `draws[part]` where there are draws."""
        raise NotImplementedError

    def _normaliser(self, device):
        """uint8 [B,H,W,C] on `device` -> normalised float32 of that shape."""
        # Why: dividing by a tensor rounds alike on every device; CUDA multiplies by 1/255 for a plain number
        full, mean, std = (torch.tensor(value, device=device) for value in ([255.0], self.mean, self.std))
        return lambda pixels: pixels.float().div_(full).sub_(mean).div_(std)


def _parts(count: int, batch_size: int, rank: int, world: int) -> list[slice]:
    """The positions that `rank` takes of each batch of an epoch of `count` images."""
    if not 0 <= rank < world or batch_size < 1:
        raise DataError(
            f"batches: got batch_size {batch_size}, rank {rank}, world {world};"
            " expected batch_size >= 1 and 0 <= rank < world."
        )
    return [slice(first + rank, min(first + batch_size, count), world) for first in range(0, count, batch_size)]


def _length(part: slice) -> int:
    return len(range(part.start, part.stop, part.step))


class PixelSplit(Split):
    """Decoded images held in memory. Shapes: pixels uint8 [N,H,W,C], labels [N]."""

    def __init__(self, pixels: np.ndarray, labels, mean, std, augment: Sequence[str] = ()):
        super().__init__(labels, mean, std, augment)
        self.pixels = torch.from_numpy(pixels)

    def resized(self, size: tuple[int, int]) -> PixelSplit:
        def scaled(pixels: Tensor) -> Tensor:
            planes = pixels.permute(0, 3, 1, 2)
            return F.interpolate(planes, size, mode="bilinear", antialias=True).permute(0, 2, 3, 1)

        pixels = torch.cat([scaled(part) for part in self.pixels.split(1024)]).contiguous()
        split = PixelSplit(pixels.numpy(force=True), self.labels.cpu(), self.mean, self.std, self.augment)
        split.burst, split.mixing = self.burst, self.mixing
        return split

    def to(self, device: str | torch.device) -> PixelSplit:
        """Move the images to `device` and keep them there; batches on another device move them again."""
        self.pixels, self.labels = self.pixels.to(device), self.labels.to(device)
        return self

    def _listing(self) -> Iterable[bytes]:
        yield str(list(self.pixels.shape)).encode()
        yield from (part.numpy(force=True).tobytes() for part in self.pixels.split(1024))

    def _draw(self, generator: torch.Generator) -> Tensor:
        return torch.rand(len(self), len(self.augment), 2, generator=generator)

    def _read(self, order: Tensor, draws: Tensor | None, parts: Sequence[Part], device) -> Iterator[Numbered]:
        self.to(device)
        pixels, labels, normalise = self.pixels, self.labels, self._normaliser(device)
        order = order.to(device)
        draws = None if draws is None else draws.to(device)
        for part in parts:
            index = order[part]
            images = normalise(pixels[index])
            if draws is not None:
                for column, name in enumerate(self.augment):
                    if name in GEOMETRIES:
                        images = GEOMETRIES[name](images, draws[part, column])
                    elif name in POLICIES:
                        images = normalise(self._changed(images, name, draws[part, column]))
            yield images.permute(0, 3, 1, 2), labels[index], index

    def _changed(self, images: Tensor, name: str, draws: Tensor) -> Tensor:
        """Normalised images as pixels again, each changed by a policy. Shapes: [B,H,W,C], draws [B,2] in [0,1)."""
        mean, std = (torch.tensor(value, device=images.device) for value in (self.mean, self.std))
        pixels = ((images * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 3, 1, 2)
        change = policy(name, self._fill())
        changed = []
        with seeded() as seed:
            for image, (high, low) in zip(pixels, (draws.double() * 2**24).long().tolist(), strict=True):
                seed(high << 24 | low)
                changed.append(change(image).permute(1, 2, 0))
        return torch.stack(changed)
