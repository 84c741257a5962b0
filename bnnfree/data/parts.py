"""Parts of data sets: the options they read, what they return, and statistics of pixels.

Must not import bnnfree.nn, models, export or engine.
"""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from bnnfree.data.file_split import Files
from bnnfree.errors import BnnfreeWarning, DataError
from bnnfree.preprocess import DECODED_SIZE, MODES, NARROW, Reading, Size, check_limits, square

LONGEST_NAME = 1024  # bytes of a class name; the packed format's MAX_LINE
TRIED = 16  # image files that are decoded to see what range their values have
STREAMED_SIZE = 224  # the size of larger images where the recipe names none

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
    image_size: int | list[int] | None  # side, or [height, width], in pixels; None: the data set's own
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
    channels: int  # fake, and of image files: 1 (grey), 3 or 4 (RGBA)
    orientation: Literal["exif", "stored"]  # of image files, see bnnfree.preprocess.Reading
    range: list[float] | None  # values that become 0 and 255: of files of more than 8 bits, of arrays
    test_fraction: float | None  # image_folder, arrays: share to test on where no test images are given


@dataclass
class Source:
    """The result of a data set function: parts[train|test|val] = (images, labels), see datasets.py.

    `stats` None means: measured on the training images. `files` opens images that are not pixels.
    """

    classes: list[str]
    parts: dict[str, tuple[np.ndarray, np.ndarray]]
    size: Size  # height, width
    channels: int = 3
    stats: Stats | None = None
    bad: dict[str, str] = field(default_factory=dict)
    files: Callable[[np.ndarray], Files] = Files
    reading: Reading = Reading()  # noqa: RUF009

    def opened(self, images: np.ndarray) -> Files:
        """The reader of these images, which are not pixels."""
        files = self.files(images)
        files.reading = self.reading
        return files


def is_decoded(size: Size) -> bool:
    """True where image files become this size once, to be held in memory; larger ones are read for each batch."""
    return max(size) <= DECODED_SIZE


def reading_of(options: DataOptions, where: str) -> Reading:
    """The reading of image files that the options ask for. Errors: DataError."""
    if options.channels not in MODES:
        raise DataError(f"{where}: channels: got {options.channels}, expected 1 (grey), 3 (RGB) or 4 (RGBA) of files.")
    limits = None if options.range is None else check_limits(options.range, f"{where}: range")
    return Reading(options.channels, options.orientation, limits)


def known_of_files(reading: Reading) -> Stats | None:
    """Statistics of files that are not all decoded: those of ImageNet, of RGB files of 8 bits; None: to be measured."""
    return IMAGENET if reading.channels == 3 and reading.limits is None else None


def check_names(classes: list[str], where: str) -> None:
    """Errors: DataError for a name of a class that no packed file can hold."""
    for name in classes:
        try:
            length = len(name.encode())
        except UnicodeEncodeError:
            length = -1
        if not 0 < length <= LONGEST_NAME or any(unicodedata.category(letter) == "Cc" for letter in name):
            raise DataError(
                f"{where}: class name: got {name!a:.200}, expected 1 to {LONGEST_NAME} bytes of UTF-8 without control"
                " characters. A packed file can hold no other: rename the class."
            )


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers 0 to count - 1, at equal distances."""
    return [place * count // most for place in range(most)] if count > most else list(range(count))


def check_range(images: Iterable[Image.Image | str], where: str) -> None:
    """Warn where all values of some images, whole and decoded, are in a small part of their range."""
    seen = [np.reshape(image.getextrema(), (-1, 2))[:3] for image in images if not isinstance(image, str)]  # no alpha
    if seen:
        limits = np.array(seen)
        warn_if_narrow(int(limits[..., 0].min()), int(limits[..., 1].max()), where)


def warn_if_narrow(low: int, high: int, where: str) -> None:
    """A BnnfreeWarning where pixels of 0..255 all lie in low..high, which is a small part of that."""
    if high - low < NARROW:
        message = (
            f"{where}: all values of the images lie between {low} and {high} of 0..255: they fill a small part of their"
            " type's range, and most of their steps are lost. data.range=[low, high] in the files' own values (12 bits:"
            " [0, 4095]; 8-bit files have none) makes them fill it."
        )
        warnings.warn(message, BnnfreeWarning, stacklevel=3)


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


def resized(pixels: np.ndarray, size: Size) -> np.ndarray:
    """uint8 [N,H,W,C] scaled (bilinear, antialiased) and cropped to the centre of shape `size`; C is 1 or 3."""
    if pixels.shape[1:3] == size:
        return pixels
    scaled = [np.asarray(square(Image.fromarray(image.squeeze()), size)) for image in pixels]
    return np.stack(scaled).reshape(len(pixels), *size, pixels.shape[3])
