"""Data sets by name: `load_data(options)` finds one, splits it into train, val and test and measures it.

To add a data set: one function (options, where) -> Source and one line of DATASETS. A source gives images as
one uint8 array [N,H,W,C] per part, or as an array of what its `files` opens; all after that is the same.

The validation split is carved from the training images, the same way for every seed, unless the data set
brings its own. Batches are the business of images.py, folders and decoding that of folder.py.

Must not import bnnfree.nn, models, export or engine.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from bnnfree.errors import BnnfreeWarning, DataError, pick
from bnnfree.preprocess import DECODED_SIZE, read_image, square
from bnnfree.train.augment import MIXTURES, POLICIES, Mixing
from bnnfree.train.folder import cache_folder, check_root, decode_cached, list_tree
from bnnfree.train.images import AUGMENTS, NAMES, PixelSplit, Split
from bnnfree.train.shards import Found, find_shards
from bnnfree.train.streamed import FILE_AUGMENTS, Files, FileSplit
from bnnfree.train.subset import SPLIT_SEED, carve, thin

STREAMED_SIZE = 224  # the size of larger images where the recipe names none

KNOWN = {  # classes, channels, side, training images
    "digits": (10, 1, 16, 1437),
    "cifar10": (10, 3, 32, 50_000),
    "cifar100": (100, 3, 32, 50_000),
    "imagenet": (1000, 3, STREAMED_SIZE, 1_281_167),
}

Stats = tuple[Sequence[float], Sequence[float]]  # mean and standard deviation per channel, of pixel/255
CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR100 = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DataOptions(Protocol):
    """The `data` section of a recipe, as far as this file reads it."""

    name: str  # a key of DATASETS
    root: str | None  # folder of the images or archives, or shards; digits and fake need none
    test_root: str | None  # shards only, where root is a pattern
    val_root: str | None  # likewise
    image_size: int | None  # side in pixels; None: the data set's own
    train_limit: int | None  # training images to use, validation included; None: all
    test_limit: int | None  # test images to use; None: all
    val_fraction: float  # share of the training images to validate on, in [0, 1)
    burst: int  # training images of one class in a row; 1: shuffled
    augment: list[str]  # keys of AUGMENTS (decoded) or FILE_AUGMENTS (streamed), POLICIES and MIXTURES, in order
    mix_alpha: float  # mixtures only: of their Beta distribution
    bad_images: Literal["error", "skip"]
    workers: int  # processes that read streamed images
    download: bool  # fetch cifar10 or cifar100 if root lacks it
    cache: str | None  # folder of decoded images and fetched shards; None: bnnfree/ in the user's cache folder
    cache_gb: float | None  # shards only: about so much of fetched ones stays; None: all
    samples: int  # fake only: training images
    classes: int  # fake, and shards without an index
    channels: int  # fake only


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

    def resized(self, size: int | None) -> Data:
        """The same data at `size` x `size` pixels, with the statistics of these (None: as they are)."""
        if size is None or self.image_size == (size, size):
            return self
        splits = {name: getattr(self, name) for name in ("train", "val", "test")}
        smaller = {name: split and split.resized(size) for name, split in splits.items()}
        return replace(self, **smaller, image_size=(size, size))

    def listing(self) -> dict[str, list]:
        """For train, val and test: the number of images and a hash of them (see Split.digest)."""
        splits = {"train": self.train, "val": self.val, "test": self.test}
        return {name: [len(split), split.digest()] for name, split in splits.items() if split}

    @property
    def skipped(self) -> int:
        """Bad images left out so far: those found while loading and those found while streaming."""
        return self.unusable + sum(split.skipped for split in (self.train, self.val, self.test) if split)


@dataclass
class Source:
    """What a data set function returns: parts[train|test|val] = (images, labels) as the file's head says.

    `stats` None means: measured on the training images. `files` opens images that are not pixels.
    """

    classes: list[str]
    parts: dict[str, tuple[np.ndarray, np.ndarray]]
    size: int
    channels: int = 3
    stats: Stats | None = None
    bad: dict[str, str] = field(default_factory=dict)
    files: Callable[[np.ndarray], Files] = Files


def load_data(options: DataOptions, *, where: str = "data") -> Data:
    """Load the data set that `options` describes; `where` names the recipe's section in messages.

    Errors: UnknownNameError for a name in no table; DataError for files that are missing or damaged, for
    class folders that do not fit together and for a val_fraction that leaves nothing to validate on.
    """
    if not 0 <= options.val_fraction < 1:
        raise DataError(f"{where}: val_fraction: got {options.val_fraction}, expected 0 <= val_fraction < 1.")
    for name in options.augment:  # Why: before minutes of decoding; which table applies is known after
        pick(dict.fromkeys(NAMES), name, f"{where}: augment")
    source = pick(DATASETS, options.name, f"{where}: name")(options, where)
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
    stats = source.stats or measure(source.parts["train"][0])
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
        image_size=(source.size, source.size),
        mean=list(stats[0]),
        std=list(stats[1]),
        unusable=len(source.bad),
    )


def _split(source: Source, part: str, stats: Stats, options: DataOptions, where: str) -> Split:
    """One part of a source as the kind of split that its images call for; only train is augmented."""
    images, labels = source.parts[part]
    augment = options.augment if part == "train" else []
    decoded = images.dtype == np.uint8
    table = dict.fromkeys((*(AUGMENTS if decoded else FILE_AUGMENTS), *POLICIES, *MIXTURES))
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
    files = source.files(images)
    return FileSplit(files, labels, *stats, augment, size=source.size, workers=options.workers, skip_bad=skip_bad)


def describe(options: DataOptions, where: str = "data") -> dict[str, Any]:
    """What a network must know of the data, without reading it: classes, channels, image_size, samples.

    samples: training images, validation included. Only image_folder and an imagenet that is there are looked
    at (the names in their folders, and the size of one image), and shards (their index). Errors: as load_data.
    """
    pick(DATASETS, options.name, f"{where}: name")
    there = options.root is not None and Path(options.root).expanduser().is_dir()
    if options.name == "image_folder" or (options.name == "imagenet" and there):
        tree = list_tree(options.root, where)
        files = tree.parts["train"][0]
        own = STREAMED_SIZE if options.name == "imagenet" else 0
        size = options.image_size or own or _own_size(files, where)
        return _shape(tree.classes, 3, size, len(files), options)
    if options.name == "shards":
        found = _find(options, where)
        size = options.image_size or STREAMED_SIZE
        return _shape(found.classes, 3, size, len(found.parts["train"][1]), options)
    if options.name == "fake":
        size = options.image_size or 32
        return _shape(_numbered(options.classes), options.channels, size, options.samples, options)
    classes, channels, size, samples = KNOWN[options.name]
    return _shape(_numbered(classes), channels, options.image_size or size, samples, options)


def _shape(classes: list[str], channels: int, size: int, samples: int, options: DataOptions) -> dict[str, Any]:
    samples = min(samples, options.train_limit or samples)
    return {"classes": classes, "channels": channels, "image_size": [size, size], "samples": samples}


def _numbered(classes: int) -> list[str]:
    return [f"class{label}" for label in range(classes)]


def measure(pixels: np.ndarray) -> Stats:
    """Mean and standard deviation per channel of uint8 [N,H,W,C] scaled to 0..1; std is at least 1/255."""
    counts = np.zeros((pixels.shape[3], 256), np.int64)
    for first in range(0, len(pixels), 1024):
        for channel, row in enumerate(counts):
            row += np.bincount(pixels[first : first + 1024, ..., channel].ravel(), minlength=256)
    values = np.arange(256) / 255
    share = counts / counts.sum(1, keepdims=True)
    mean = share @ values
    variance = (share * (values - mean[:, None]) ** 2).sum(1)
    return mean.tolist(), np.sqrt(variance).clip(1 / 255).tolist()


def resized(pixels: np.ndarray, size: int) -> np.ndarray:
    """uint8 [N,H,W,C] scaled (bilinear, antialiased) to [N,size,size,C]; C is 1 or 3."""
    if pixels.shape[1:3] == (size, size):
        return pixels
    scaled = [np.asarray(square(Image.fromarray(image.squeeze()), (size, size))) for image in pixels]
    return np.stack(scaled).reshape(len(pixels), size, size, pixels.shape[3])


def digits(options: DataOptions, where: str) -> Source:
    """scikit-learn's 1797 handwritten digits, 8x8 grey scaled to 16x16; a fixed fifth of each class tests."""
    from sklearn.datasets import load_digits

    size = options.image_size or 16
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
    size = options.image_size or 32
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


def imagenet(options: DataOptions, where: str) -> Source:
    """ImageNet unpacked as root/train/<class>/ and root/val/<class>/: an image_folder of known statistics."""
    source = image_folder(options, where, size=STREAMED_SIZE)
    source.stats = IMAGENET
    return source


def image_folder(options: DataOptions, where: str, size: int | None = None) -> Source:
    """root/train and root/test or root/val, each with one folder per class; always 3 channels.

    With both test/ and val/ the latter validates; a lone one of them is the test split and validation images
    are carved from train/. Without an image_size, images whose first has a short side of up to 64 pixels keep
    that side and larger ones become 224. Sizes up to 64 are decoded once, to the centre square, and cached.
    """
    tree = list_tree(options.root, where)
    on_bad = _rejecter(options, where, tree.bad)
    size = options.image_size or size or _own_size(tree.parts["train"][0], where)
    images = [file for files, _ in tree.parts.values() for file in files]
    labels = np.array([label for _, part in tree.parts.values() for label in part], np.int64)
    owner = np.repeat(list(tree.parts), [len(files) for files, _ in tree.parts.values()])
    items = np.array(images, object)
    if size <= DECODED_SIZE:
        items, unreadable = decode_cached(images, size, on_bad, options.cache)
        labels, owner = np.delete(labels, unreadable), np.delete(owner, unreadable)
    if tree.bad:
        names = list(tree.bad)
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        message = f"{where}: {len(names)} bad images skipped: {shown}"
        warnings.warn(message, BnnfreeWarning, stacklevel=3)
    parts = {part: (items[owner == part], labels[owner == part]) for part in tree.parts}
    for part, (_, part_labels) in parts.items():
        for label in np.flatnonzero(np.bincount(part_labels, minlength=len(tree.classes)) == 0):
            raise DataError(f"{where}: class {tree.classes[label]!r} of the {part} split has no readable image.")
    stats = None if size <= DECODED_SIZE else IMAGENET
    return Source(tree.classes, parts, size, stats=stats, bad=tree.bad)


def shards(options: DataOptions, where: str) -> Source:
    """Tar shards by index or pattern, local or by URL (see shards.py); validated and tested as image_folder."""
    size = options.image_size or STREAMED_SIZE
    if size <= DECODED_SIZE:
        raise DataError(
            f"{where}: image_size: got {size}, expected more than {DECODED_SIZE}: shards are for large images."
            " data.name=image_folder reads small ones."
        )
    found = _find(options, where)
    return Source(found.classes, found.parts, size, stats=IMAGENET, files=found.files)


def _find(options: DataOptions, where: str) -> Found:
    roots = options.root, options.test_root, options.val_root
    limit = None if options.cache_gb is None else int(options.cache_gb * 1e9)
    return find_shards(*roots, classes=options.classes, cache=cache_folder(options.cache), limit=limit, where=where)


def _rejecter(options: DataOptions, where: str, bad: dict[str, str]) -> Callable[[str, str], None]:
    """What to do with a bad file: note it in `bad` under bad_images=skip, else raise; `bad` itself counts."""

    def on_bad(file: str, reason: str) -> None:
        if options.bad_images != "skip":
            raise DataError(f"{where}: {file} {reason}. Set data.bad_images=skip to leave such files out.")
        bad[file] = reason

    for file, reason in list(bad.items()):
        on_bad(file, reason)
    return on_bad


def _own_size(files: list[str], where: str) -> int:
    """The short side of the first readable image if it is small enough to decode once, else 224."""
    for file in files:
        image = read_image(file)
        if not isinstance(image, str):
            side = min(image.size)
            return side if side <= DECODED_SIZE else STREAMED_SIZE
    raise DataError(f"{where}: none of the {len(files)} training images can be read; the first: {files[0]}")


def fake(options: DataOptions, where: str) -> Source:
    """Noise over one coarse pattern per class: easy to learn, the same every time, for tests and dry runs.

    `samples` training images and a quarter as many to test, at least one per class each.
    """
    size, channels, classes = options.image_size or 32, options.channels, options.classes
    if min(classes, channels) < 1 or options.samples < classes:
        raise DataError(
            f"{where}: fake: got {options.samples} samples of {classes} classes with {channels} channels,"
            " expected at least one class, one channel and one sample per class."
        )
    random = np.random.RandomState(SPLIT_SEED)
    cell = np.arange(size) * 4 // size
    patterns = random.randint(0, 128, (classes, 4, 4, channels), np.uint8)[:, cell][:, :, cell]
    parts = {}
    for part, count in (("train", options.samples), ("test", max(options.samples // 4, classes))):
        labels = np.arange(count) % classes
        noise = random.randint(0, 128, (count, size, size, channels), np.uint8)
        parts[part] = patterns[labels] + noise, labels
    return Source(_numbered(classes), parts, size, channels)


DATASETS: dict[str, Callable[[DataOptions, str], Source]] = {
    "digits": digits,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "imagenet": imagenet,
    "image_folder": image_folder,
    "shards": shards,
    "fake": fake,
}
