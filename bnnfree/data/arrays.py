"""The data set `arrays`: images, sounds or readings of sensors as numpy arrays, with labels.

data.root is a folder of .npy files (mapped, not read whole) or one .npz, with these names:

    train_images, test_images, val_images    [N,H,W,C] or [N,H,W] (C = 1): uint8, or other numbers (see below)
    train_labels, test_labels, val_labels    [N]: whole numbers from 0
    classes                                  names by label: [K] of text, or classes.txt in a folder, a name a line

test_* may be left out with data.test_fraction, val_* and classes always. Values become the uint8 that the engine
takes: those of data.range = [low, high] come to 0 and 255, rounded to nearest, beyond it clipped. uint8 and uint16
have a range of their own (uint16 keeps its high byte); other numbers need one. Pickled objects are refused.

Must not import torch, bnnfree.nn, models, export or engine.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bnnfree.data.parts import DataOptions, Source, warn_if_narrow
from bnnfree.data.sizes import size_of
from bnnfree.data.subset import carve
from bnnfree.errors import BnnfreeWarning, DataError
from bnnfree.preprocess import Limits, Size, check_limits, to_bytes

PARTS = ("train", "test", "val")
STEP = 256  # images that are scaled at a time
CLIPPED = 0.01  # share of values beyond the range from which on a warning comes
MOST_CLASSES = 1_000_000


def arrays(options: DataOptions, where: str) -> Source:
    """The arrays at data.root as uint8 images. Errors: DataError for what is missing, damaged or does not fit."""
    found = _opened(options, where)
    classes, parts = _checked(found, options, where)
    limits = _limits(parts["train"][0], options, where)
    held = {part: (_as_bytes(images, limits, part, where), labels) for part, (images, labels) in parts.items()}
    if "test" not in held:
        held["train"], held["test"] = carve(*held["train"], options.test_fraction or 0)
        if not len(held["test"][1]):
            raise DataError(f"{where}: test_fraction: got {options.test_fraction}, but no class has two images.")
    pixels = held["train"][0]
    warn_if_narrow(int(pixels.min()), int(pixels.max()), where)
    height, width, channels = pixels.shape[1:]
    return Source(classes, held, (height, width), channels)


def describe_arrays(options: DataOptions, where: str) -> tuple[list[str], int, Size, int]:
    """(classes, channels, size, training images), by shapes and labels."""
    classes, parts = _checked(_opened(options, where), options, where)
    images, labels = parts["train"]
    if "test" not in parts:
        labels = carve(labels, labels, options.test_fraction or 0)[0][1]
    height, width, channels = images.shape[1:]
    return classes, channels, (height, width), len(labels)


def _opened(options: DataOptions, where: str) -> dict[str, np.ndarray]:
    """The arrays by their names; those of a folder are mapped."""
    if not options.root:
        raise DataError(f"{where}: root: got {options.root!r}, expected a folder of .npy files, or a .npz.")
    root = Path(options.root).expanduser()
    names = [f"{part}_{kind}" for part in PARTS for kind in ("images", "labels")]
    if root.is_dir():
        files = {name: root / f"{name}.npy" for name in [*names, "classes"]}
        found = {name: _load(file, where) for name, file in files.items() if file.exists()}
        if (listed := root / "classes.txt").exists():
            found["classes"] = np.array(_lines(listed, where), str)
    elif root.is_file():
        archive = _load(root, where)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DataError(f"{where}: root: got {root}, a single array, expected a folder of such files, or a .npz.")
        with archive:
            found = {name: _member(archive, name, root, where) for name in [*names, "classes"] if name in archive}
    else:
        raise DataError(f"{where}: root: got {str(root)!r}, which does not exist, expected a folder or a .npz.")
    wanted = ["train_images", "train_labels"]
    wanted += [] if options.test_fraction is not None else ["test_images", "test_labels"]
    if missing := [name for name in wanted if name not in found]:
        raise DataError(
            f"{where}: {root}: got {', '.join(found) or 'no array of these names'}; {', '.join(missing)} missing."
            " data.test_fraction=0.2 would hold out a fifth of each class to test on."
        )
    if options.test_fraction is not None and ("test_images" in found or "test_labels" in found):
        raise DataError(f"{where}: test_fraction: got {options.test_fraction}, but {root} has test images of its own.")
    return found


def _load(file: Path, where: str) -> Any:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # Why: damaged files fail in many ways
        raise DataError(f"{where}: {file}: cannot be read as arrays without pickle ({_first(error)}).") from None


def _member(archive: Mapping[str, np.ndarray], name: str, root: Path, where: str) -> np.ndarray:
    try:
        return archive[name]
    except Exception as error:  # Why: damaged archives fail in many ways
        raise DataError(f"{where}: {root}: {name}: cannot be read without pickle ({_first(error)}).") from None


def _first(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _lines(file: Path, where: str) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: {file}: cannot be read as text ({_first(error)}).") from None


def _checked(
    found: dict[str, np.ndarray], options: DataOptions, where: str
) -> tuple[list[str], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """(class names, {part: (images [N,H,W,C], labels [N])}), of shapes and labels that fit together."""
    parts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for part in PARTS:
        names = f"{part}_images", f"{part}_labels"
        pair = [found[name] for name in names if name in found]
        if len(pair) == 1:
            raise DataError(f"{where}: got only one of {names[0]} and {names[1]}, expected both or none.")
        if pair:
            parts[part] = _checked_pair(pair[0], pair[1], part, where)
    images, labels = parts["train"]
    shape = images.shape[1:]
    for part, (other, _) in parts.items():
        if other.shape[1:] != shape or other.dtype != images.dtype:
            raise DataError(
                f"{where}: {part}_images: got {other.dtype} {list(other.shape[1:])}, expected {images.dtype}"
                f" {list(shape)} as of train_images."
            )
    if options.image_size is not None and size_of(options.image_size) != shape[:2]:
        raise DataError(
            f"{where}: image_size: got {options.image_size}, expected null: arrays keep their size,"
            f" {shape[0]}x{shape[1]}."
        )
    return _class_names(found.get("classes"), parts, where), parts


def _checked_pair(images: np.ndarray, labels: np.ndarray, part: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    if images.dtype.kind not in "uif":
        raise DataError(f"{where}: {part}_images: got values of type {images.dtype}, expected numbers.")
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or 0 in images.shape:
        raise DataError(
            f"{where}: {part}_images: got the shape {list(images.shape)}, expected [N,H,W,C], or [N,H,W] of one"
            " channel, without a 0. A signal of length L may be [N,1,L,1]."
        )
    if labels.dtype.kind not in "ui" or labels.shape != images.shape[:1]:
        raise DataError(
            f"{where}: {part}_labels: got {labels.dtype} {list(labels.shape)}, expected whole numbers"
            f" [{len(images)}], one for each image."
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= MOST_CLASSES:
        raise DataError(f"{where}: {part}_labels: got {low} to {high}, expected 0 to {MOST_CLASSES - 1} at most.")
    return images, labels.astype(np.int64)


def _class_names(names: np.ndarray | None, parts: dict[str, tuple[np.ndarray, np.ndarray]], where: str) -> list[str]:
    """The names by label. Errors: DataError for labels without a name and classes without a training image."""
    labels = parts["train"][1]
    if names is not None and (names.ndim != 1 or names.dtype.kind != "U"):
        raise DataError(f"{where}: classes: got {names.dtype} {list(names.shape)}, expected a list of texts.")
    count = int(labels.max()) + 1 if names is None else len(names)
    for part, (_, others) in parts.items():
        if others.max() >= count:
            raise DataError(f"{where}: {part}_labels: got class {others.max()}, expected 0 to {count - 1}.")
    if len(lost := np.flatnonzero(np.bincount(labels, minlength=count) == 0)):
        raise DataError(
            f"{where}: train_labels: got no image of class {lost[0]}, expected some of each of 0 to {count - 1}."
        )
    return [f"class{label}" for label in range(count)] if names is None else names.tolist()


def _limits(images: np.ndarray, options: DataOptions, where: str) -> Limits | None:
    if options.range is not None:
        return check_limits(options.range, f"{where}: range")
    if images.dtype not in (np.uint8, np.uint16):
        raise DataError(
            f"{where}: range: got null for images of {images.dtype}, expected [low, high], the values that become 0 and"
            " 255 for the engine. Only uint8 and uint16 have a range of their own."
        )
    return None


def _as_bytes(images: np.ndarray, limits: Limits | None, part: str, where: str) -> np.ndarray:
    """The images as uint8 in memory; of mapped files a few at a time are read."""
    pixels = np.empty(images.shape, np.uint8)
    beyond = 0
    for first in range(0, len(images), STEP):
        values = images[first : first + STEP]
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            bad = first + int(np.flatnonzero(~np.isfinite(values).all((1, 2, 3)))[0])
            raise DataError(f"{where}: {part}_images: image {bad} holds values that are not finite.")
        if limits is None and values.dtype == np.uint8:
            pixels[first : first + STEP] = values
            continue
        pixels[first : first + STEP] = to_bytes(values, limits)
        if limits is not None:
            beyond += int(((values < limits[0]) | (values > limits[1])).sum())
    if beyond > CLIPPED * images.size:
        message = (
            f"{where}: {part}_images: {beyond / images.size:.0%} of the values lie beyond data.range and are clipped."
        )
        warnings.warn(message, BnnfreeWarning, stacklevel=4)
    return pixels
