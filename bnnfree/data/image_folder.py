"""The data sets image_folder and imagenet: class folders of image files, their size, and what is wrong with them.

Must not import bnnfree.nn, models, export or engine.
"""

from __future__ import annotations

import warnings

import numpy as np
from PIL import Image

from bnnfree.data.folder import Tree, decode_cached, list_tree
from bnnfree.data.parts import (
    IMAGENET,
    STREAMED_SIZE,
    TRIED,
    DataOptions,
    Source,
    check_names,
    check_range,
    is_decoded,
    known_of_files,
    reading_of,
    spread,
)
from bnnfree.data.sizes import size_of
from bnnfree.errors import BnnfreeWarning, DataError
from bnnfree.preprocess import DECODED_SIZE, Reading, Size, read_image

HEADS = 1000  # files, of any number, whose heads are looked at before the others are read


def image_folder(options: DataOptions, where: str, size: Size | None = None) -> Source:
    """root/train and root/test or root/val, each with one folder per class; grey, RGB or RGBA as data.channels says.

    With both test/ and val/ the latter validates; a lone one of them is the test split and validation images
    are carved from train/. With data.test_fraction there is neither, and the class folders may lie in root itself.
    Without an image_size, images keep the median of their short sides if that is up to 64 pixels, else become 224
    (see `_own_size`). Sizes up to 64 are decoded once, to the centre, and cached.
    """
    tree, reading = _listed(options, where), reading_of(options, where)
    size = size_of(options.image_size) or size or _own_size(tree.parts["train"][0], where)
    images = [file for files, _ in tree.parts.values() for file in files]
    labels = np.array([label for _, part in tree.parts.values() for label in part], np.int64)
    owner = np.repeat(list(tree.parts), [len(files) for files, _ in tree.parts.values()])
    items = np.array(images, object)
    if is_decoded(size):
        items, unreadable = decode_cached(images, size, reading, tree.bad.__setitem__, options.cache)
        labels, owner = np.delete(labels, unreadable), np.delete(owner, unreadable)
        _refuse(tree.bad, options, where)
    else:
        _check_heads(tree, options, where)
    _check_range(tree, reading, where)
    if tree.bad:
        names = list(tree.bad)
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        message = f"{where}: {len(names)} bad images skipped: {shown}"
        warnings.warn(message, BnnfreeWarning, stacklevel=3)
    parts = {part: (items[owner == part], labels[owner == part]) for part in tree.parts}
    _check_classes(tree, parts, where)
    stats = None if is_decoded(size) else known_of_files(reading)
    return Source(tree.classes, parts, size, reading.channels, stats, bad=tree.bad, reading=reading)


def imagenet(options: DataOptions, where: str) -> Source:
    """ImageNet unpacked as root/train/<class>/ and root/val/<class>/: an image_folder of known statistics."""
    source = image_folder(options, where, size=(STREAMED_SIZE, STREAMED_SIZE))
    source.stats = IMAGENET if source.channels == 3 else source.stats
    return source


def describe_folder(options: DataOptions, where: str) -> tuple[list[str], int, Size, int]:
    """(classes, channels, size, training images) of either, by the names in its folders and the heads of some files."""
    tree = _listed(options, where)
    files = tree.parts["train"][0]
    own = (STREAMED_SIZE, STREAMED_SIZE) if options.name == "imagenet" else None
    size = size_of(options.image_size) or own or _own_size(files, where)
    return tree.classes, reading_of(options, where).channels, size, len(files)


def check_folder(options: DataOptions, where: str) -> str:
    """Look at names and some files, and say at how many.

    Errors: DataError that names those that are no images; warns as `check_range`.
    """
    tree = _listed(options, where)
    heads, files = _check_heads(tree, options, where)
    _check_range(tree, reading_of(options, where), where)
    return f"the names of {files:,} and the heads of {heads:,} were looked at"


def _check_range(tree: Tree, reading: Reading, where: str) -> None:
    files = tree.parts["train"][0]
    check_range((read_image(files[index], reading) for index in spread(len(files), TRIED)), where)


def _listed(options: DataOptions, where: str) -> Tree:
    tree = list_tree(options.root, where, options.test_fraction)
    check_names(tree.classes, where)  # Why here too: before minutes of decoding
    return tree


def _own_size(files: list[str], where: str) -> Size:
    """The square of the median of the images' short sides if that is small enough to decode once, else 224.

    By up to HEADS files at equal distances; those that cannot be read do not count.
    """
    sides = []
    for index in spread(len(files), HEADS):
        try:
            with Image.open(files[index]) as image:
                sides.append(min(image.size))
        except Exception:  # Why: damaged files fail in many ways; they are named when they are read
            continue
    if not sides:
        raise DataError(f"{where}: none of the {len(files)} training images can be read; the first: {files[0]}")
    side = sorted(sides)[(len(sides) - 1) // 2]
    side = side if side <= DECODED_SIZE else STREAMED_SIZE
    return side, side


def _check_heads(tree: Tree, options: DataOptions, where: str) -> tuple[int, int]:
    """Numbers of the heads that were looked at and of all files.

    Errors: DataError for files outside of the classes or without the head of an image, of the latter some.
    """
    bad = dict(tree.bad)
    files = [file for part, _ in tree.parts.values() for file in part]
    looked_at = list(spread(len(files), HEADS))
    for index in looked_at:
        try:
            with Image.open(files[index]):
                pass
        except Exception:  # Why: damaged files fail in many ways, which `read_image` tells apart
            bad[files[index]] = str(read_image(files[index]))
    _refuse(bad, options, where)
    return len(looked_at), len(files)


def _refuse(bad: dict[str, str], options: DataOptions, where: str) -> None:
    """Errors: DataError that names the bad files, unless they are to be skipped."""
    if bad and options.bad_images != "skip":
        shown = "; ".join(f"{file} {reason}" for file, reason in list(bad.items())[:5])
        count = f"{len(bad)} bad images: " if len(bad) > 1 else ""
        more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise DataError(f"{where}: {count}{shown}{more}. Set data.bad_images=skip to leave such files out.")


def _check_classes(tree: Tree, parts: dict[str, tuple[np.ndarray, np.ndarray]], where: str) -> None:
    """Every class has an image to train on; what is held out may lack some, with a warning."""
    for part, (_, labels) in parts.items():
        counts = np.bincount(labels, minlength=len(tree.classes))
        lost = [name for name, count in zip(tree.classes, counts, strict=True) if not count]
        if lost and (part == "train" or len(lost) == len(tree.classes)):
            raise DataError(f"{where}: class {lost[0]!r} of the {part} split has no readable image.")
        if lost:
            shown = ", ".join(map(repr, lost[:3])) + (", ..." if len(lost) > 3 else "")
            message = f"{where}: the {part} split has no image of {len(lost)} of {len(counts)} classes: {shown}"
            warnings.warn(message, BnnfreeWarning, stacklevel=4)
