"""Data sets by name: `load_data(options)` finds one, splits it into train, val and test and measures it.

To add a data set: one function (options, where) -> Source and one line of DATASETS. A source (parts.py) gives
images as one uint8 array [N,H,W,C] per part, or as an array of what its `files` opens; all after that is the same.

The validation split is carved from the training images, the same way for every seed, unless the data set
brings its own. Batches are the business of pixel_split.py, folders of image_folder.py, arrays of arrays.py.

Must not import bnnfree.nn, models, export or engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bnnfree.data.addresses import is_url
from bnnfree.data.arrays import arrays, describe_arrays
from bnnfree.data.augment import MIXTURES, POLICIES, Mixing
from bnnfree.data.file_split import FILE_AUGMENTS, FileSplit, sample_pixels
from bnnfree.data.folder import cache_folder, check_root
from bnnfree.data.image_folder import check_folder, describe_folder, image_folder, imagenet
from bnnfree.data.parts import (
    CIFAR10,
    CIFAR100,
    IMAGENET,
    STREAMED_SIZE,
    TRIED,
    DataOptions,
    Source,
    Stats,
    check_names,
    check_range,
    is_decoded,
    known_of_files,
    measure,
    reading_of,
    resized,
    spread,
)
from bnnfree.data.pixel_split import GEOMETRIES, PixelSplit, Split
from bnnfree.data.sizes import size_of
from bnnfree.data.subset import SPLIT_SEED, carve, thin
from bnnfree.data.tar_index import Found, find_shards
from bnnfree.errors import DataError, pick
from bnnfree.names import AUGMENTS
from bnnfree.preprocess import DECODED_SIZE

__all__ = ["CIFAR10", "CIFAR100", "IMAGENET", "Data", "DataOptions", "Source", "Stats", "describe", "load_data"]

KNOWN = {  # classes, channels, side, training images
    "digits": (10, 1, 16, 1438),
    "cifar10": (10, 3, 32, 50_000),
    "cifar100": (100, 3, 32, 50_000),
    "imagenet": (1000, 3, STREAMED_SIZE, 1_281_167),
}


@dataclass
class Data:
    """A data set ready to train on. `mean` and `std` are per channel, of pixels scaled to 0..1."""

    train: Split
    val: Split | None
    test: Split
    classes: list[str]
    channels: int
    image_size: tuple[int, int]  # height, width
    mean: list[float]
    std: list[float]
    unusable: int = 0  # bad files found while loading

    def resized(self, image_size: int | list[int] | None) -> Data:
        """The same data at another size, of a recipe, with the statistics of these (None: as they are)."""
        size = size_of(image_size)
        if size is None or self.image_size == size:
            return self
        splits = {name: getattr(self, name) for name in ("train", "val", "test")}
        smaller = {name: split and split.resized(size) for name, split in splits.items()}
        return replace(self, **smaller, image_size=size)

    def listing(self) -> dict[str, list]:
        """For train, val and test: the number of images and a hash of them (see Split.digest)."""
        splits = {"train": self.train, "val": self.val, "test": self.test}
        return {name: [len(split), split.digest()] for name, split in splits.items() if split}

    def describe(self) -> str:
        """Size, channels, classes and counts, in one line."""
        height, width = self.image_size
        names = ", ".join(self.classes[:3]) + (", ..." if len(self.classes) > 3 else "")
        held_out = f", {len(self.val):,} to validate" if self.val else ""
        return (
            f"images {height}x{width}x{self.channels}, {len(self.classes)} classes ({names}): {len(self.train):,} to"
            f" train on{held_out}, {len(self.test):,} to test"
        )

    @property
    def skipped(self) -> int:
        """Bad images left out so far: those found while loading and those found while streaming."""
        return self.unusable + sum(split.skipped for split in (self.train, self.val, self.test) if split)


def load_data(options: DataOptions, *, where: str = "data") -> Data:
    """Load the data set that `options` describes; `where` names the recipe's section in messages.

    Errors: UnknownNameError for a name in no table; DataError for files that are missing or damaged, for
    class folders that do not fit together and for a val_fraction that leaves nothing to validate on.
    """
    if not 0 <= options.val_fraction < 1:
        raise DataError(f"{where}: val_fraction: got {options.val_fraction}, expected 0 <= val_fraction < 1.")
    for name in options.augment:  # Why: before minutes of decoding; which table applies is known after
        pick(dict.fromkeys(AUGMENTS), name, f"{where}: augment")
    source = pick(DATASETS, options.name, f"{where}: name")(options, where)
    check_names(source.classes, where)
    for part, limit in (("train", options.train_limit), ("test", options.test_limit)):
        images, labels = source.parts[part]
        source.parts[part] = thin(images, labels, limit, f"{where}: {part}_limit")
    if options.val_fraction and "val" not in source.parts:
        images, labels = source.parts["train"]
        train, val = carve(images, labels, options.val_fraction)
        if not len(val[1]):
            raise DataError(
                f"{where}: val_fraction: got {options.val_fraction}, which leaves no image to validate on;"
                " expected a class with two training images or more. Set data.val_fraction=0."
            )
        source.parts |= {"train": train, "val": val}
    stats = source.stats or _measured(source, where)
    train = _split(source, "train", stats, options, where)
    train.burst = options.burst
    if mixtures := [name for name in options.augment if name in MIXTURES]:
        train.mixing = Mixing(mixtures, options.mix_alpha, len(source.classes))
    return Data(
        train=train,
        val=_split(source, "val", stats, options, where) if "val" in source.parts else None,
        test=_split(source, "test", stats, options, where),
        classes=source.classes,
        channels=source.channels,
        image_size=source.size,
        mean=list(stats[0]),
        std=list(stats[1]),
        unusable=len(source.bad),
    )


def _split(source: Source, part: str, stats: Stats, options: DataOptions, where: str) -> Split:
    """One part of a source as the kind of split that its images call for; only train is augmented."""
    images, labels = source.parts[part]
    augment = options.augment if part == "train" else []
    decoded = images.dtype == np.uint8
    table = dict.fromkeys((*(GEOMETRIES if decoded else FILE_AUGMENTS), *POLICIES, *MIXTURES))
    for name in augment:
        kind = "in memory" if decoded else f"over {DECODED_SIZE} pixels"
        pick(table, name, f"{where}: augment of images {kind}")
        if name in POLICIES and source.channels not in (1, 3):
            raise DataError(
                f"{where}: augment: got {name!r} for images of {source.channels} channels, expected 1 or 3."
            )
    if decoded:
        return PixelSplit(images, labels, *stats, augment)
    skip_bad = options.bad_images == "skip"
    files = source.opened(images)
    return FileSplit(files, labels, *stats, augment, size=source.size, workers=options.workers, skip_bad=skip_bad)


def describe(options: DataOptions, where: str = "data") -> dict[str, Any]:
    """Description of the data as a network needs it, images unread: classes, channels, image_size, samples.

    samples: training images, validation included. Only image_folder and an imagenet that is there are looked
    at (the names in their folders, and the size of one image), and shards (their index). Errors: as load_data.
    """
    pick(DATASETS, options.name, f"{where}: name")
    size = size_of(options.image_size)
    there = options.root is not None and Path(options.root).expanduser().is_dir()
    if options.name == "image_folder" or (options.name == "imagenet" and there):
        classes, channels, size, samples = describe_folder(options, where)
    elif options.name == "arrays":
        classes, channels, size, samples = describe_arrays(options, where)
    elif options.name == "shards":
        found = _find(options, where)
        classes, channels, samples = found.classes, options.channels, len(found.parts["train"][1])
    elif options.name == "fake":
        classes, channels, samples, size = (
            _numbered(options.classes),
            options.channels,
            options.samples,
            size or (32, 32),
        )
    else:
        count, channels, side, samples = KNOWN[options.name]
        classes, size = _numbered(count), size or (side, side)
    check_names(classes, where)
    samples = min(samples, options.train_limit or samples)
    height, width = size or (STREAMED_SIZE, STREAMED_SIZE)
    return {"classes": classes, "channels": channels, "image_size": [height, width], "samples": samples}


def check_files(options: DataOptions, where: str = "data") -> str:
    """Look for bad files, as far as is cheap before a training: errors as load_data's. Says what was looked at."""
    if options.name == "image_folder":
        return f"files: {check_folder(options, where)}; a training decodes all"
    return "" if options.name in ("digits", "fake") else "files: not looked at"


def _numbered(classes: int) -> list[str]:
    return [f"class{label}" for label in range(classes)]


def _measured(source: Source, where: str) -> Stats:
    """Statistics of the training images, of some where they are files."""
    images = source.parts["train"][0]
    pixels = images if images.dtype == np.uint8 else sample_pixels(source.opened(images), source.size, where)
    return measure(pixels)


def digits(options: DataOptions, where: str) -> Source:
    """scikit-learn's 1797 handwritten digits, 8x8 grey scaled to 16x16; a fixed fifth of each class tests."""
    from sklearn.datasets import load_digits

    size = size_of(options.image_size) or (16, 16)
    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    train, test = carve(resized(pixels, size), bunch.target.astype(np.int64), 0.2)
    return Source([str(digit) for digit in range(10)], {"train": train, "test": test}, size, channels=1)


def cifar10(options: DataOptions, where: str) -> Source:
    """CIFAR-10 in its Python archive: 50,000 training and 10,000 test images of 32x32."""
    return _cifar(options, where, "CIFAR10", CIFAR10)


def cifar100(options: DataOptions, where: str) -> Source:
    """CIFAR-100 in its Python archive: 50,000 training and 10,000 test images of 32x32."""
    return _cifar(options, where, "CIFAR100", CIFAR100)


def _cifar(options: DataOptions, where: str, kind: str, stats: Stats) -> Source:
    from torchvision import datasets

    loader = getattr(datasets, kind)
    if options.download and options.root:
        Path(options.root).expanduser().mkdir(parents=True, exist_ok=True)
    root = check_root(options.root, where)
    size = size_of(options.image_size) or (32, 32)
    try:
        halves = [loader(root, train=train, download=options.download) for train in (True, False)]
    except (RuntimeError, OSError, ValueError) as error:
        if options.download:
            raise DataError(
                f"{where}: {kind} cannot be downloaded to {root}: {error}. Without a network: data.root=FOLDER with its"
                " Python archive unpacked, or data.name=image_folder for folders of image files."
            ) from error
        raise DataError(
            f"{where}: root: got {root}, which lacks {kind}: no undamaged folder {loader.base_folder!r}. Set"
            " data.download=true to fetch it, or data.name=image_folder for folders of image files."
        ) from error
    parts = {
        part: (resized(half.data, size), np.asarray(half.targets, np.int64))
        for part, half in zip(("train", "test"), halves, strict=True)
    }
    return Source(list(halves[0].classes), parts, size, stats=stats)


def shards(options: DataOptions, where: str) -> Source:
    """Tar shards by index or pattern, local or by URL (see tar_index.py); validated and tested as image_folder."""
    size = size_of(options.image_size) or (STREAMED_SIZE, STREAMED_SIZE)
    if is_decoded(size):
        raise DataError(
            f"{where}: image_size: got {options.image_size}, expected more than {DECODED_SIZE}: shards are for large"
            " images. data.name=image_folder reads small ones."
        )
    found = _find(options, where)
    reading = reading_of(options, where)
    stats = known_of_files(reading)
    source = Source(found.classes, found.parts, size, options.channels, stats, files=found.files, reading=reading)
    if not any(map(is_url, found.places)):  # Why: to look at those would fetch them
        files = source.opened(found.parts["train"][0])
        check_range((files.checked(index) for index in spread(len(files), TRIED)), where)
    return source


def _find(options: DataOptions, where: str) -> Found:
    roots = options.root, options.test_root, options.val_root
    limit = None if options.cache_gb is None else int(options.cache_gb * 1e9)
    return find_shards(*roots, classes=options.classes, cache=cache_folder(options.cache), limit=limit, where=where)


def fake(options: DataOptions, where: str) -> Source:
    """Noise over one coarse pattern per class: easy to learn, the same every time, for tests and dry runs.

    `samples` training images and a quarter as many to test, at least one per class each.
    """
    channels, classes = options.channels, options.classes
    height, width = size = size_of(options.image_size) or (32, 32)
    if min(classes, channels) < 1 or options.samples < classes:
        raise DataError(
            f"{where}: fake: got {options.samples} samples of {classes} classes with {channels} channels,"
            " expected at least one class, one channel and one sample per class."
        )
    random = np.random.RandomState(SPLIT_SEED)
    rows, columns = (np.arange(side) * 4 // side for side in size)
    patterns = random.randint(0, 128, (classes, 4, 4, channels), np.uint8)[:, rows][:, :, columns]
    parts = {}
    for part, count in (("train", options.samples), ("test", max(options.samples // 4, classes))):
        labels = np.arange(count) % classes
        noise = random.randint(0, 128, (count, height, width, channels), np.uint8)
        parts[part] = patterns[labels] + noise, labels
    return Source(_numbered(classes), parts, size, channels)


DATASETS: dict[str, Callable[[DataOptions, str], Source]] = {
    "digits": digits,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "imagenet": imagenet,
    "image_folder": image_folder,
    "shards": shards,
    "arrays": arrays,
    "fake": fake,
}
