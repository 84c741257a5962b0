"""Folders of images: list the files, say what is wrong with them, decode small images once and cache them.

    root/train/<class>/**.jpg          the images to train on
    root/test/<class>/**.jpg           and/or root/val: the held-out images, with these class folders or some of them

With a `test_fraction`, root/train/<class>/ alone or root/<class>/: so many of each class are the test images.
Names of class folders that Unicode writes in two ways (NFC, NFD) are one class, in NFC.

Hidden files and folders and the sidecars of file browsers are passed over; every other file must be an image
that Pillow opens. How it becomes pixels is the business of bnnfree.preprocess.

Must not import torch, bnnfree.nn, models, export or engine.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bnnfree.data.subset import carve
from bnnfree.errors import BnnfreeWarning, DataError, nearest, nearest_path
from bnnfree.files import OutputError, replacing
from bnnfree.preprocess import Reading, Size, image_endings, read_image, square
from bnnfree.progress import Progress

SIDECARS = {"thumbs.db", "desktop.ini", "__macosx"}
CACHE_FORMAT = 2  # part of every cache key: raise it when the same files would decode to other pixels
CHUNK = 64  # files per task of a decoding thread
SMALL_FILE = 16_384  # bytes


@dataclass
class Tree:
    """A listed image folder: `parts[name]` is (files, labels) with labels indexing the sorted `classes`.

    `bad` maps a file that cannot be used to what is wrong with it; such files are in no part.
    """

    classes: list[str]
    parts: dict[str, tuple[list[str], list[int]]]
    bad: dict[str, str]


def list_tree(root: str | None, where: str, test_fraction: float | None = None) -> Tree:
    """List `root`. Its parts are train, test and, only where both test/ and val/ exist, val.

    test_fraction: the share of each class to test on where there are no test images, the same ones every time.
    Errors: DataError for a root, a split or a class folder that is missing, empty or misnamed.
    """
    folder = check_root(root, where)
    found, _ = _entries(folder)
    held_out = [name for name in ("test", "val") if name in found]
    if test_fraction is not None:
        return _carved(folder, found, held_out, test_fraction, where)
    for name, there in (("train", "train" in found), ("test", bool(held_out))):
        if not there:
            raise DataError(
                f"{where}: no folder {name!r} in {folder}: got {_shown(found)}, {EXPECTED}."
                f"{nearest(name, set(found) - {'train'}, f'{folder}/')} data.test_fraction=0.2 would hold out a fifth "
                "of each class."
            )
    classes = list(_classes(folder / "train"))
    if not classes:
        raise DataError(f"{where}: {folder / 'train'} has no class folders: {EXPECTED}.")
    sources = {"train": "train"} | dict(zip(("test", "val"), held_out, strict=False))
    tree = Tree(classes, {}, {})
    for part, name in sources.items():
        tree.parts[part] = _list_part(folder / name, tree, where, whole=part == "train")
    return tree


EXPECTED = "expected train/ and test/ (or val/), each with one folder per class"


def _carved(folder: Path, found: list[str], held_out: Sequence[str], fraction: float, where: str) -> Tree:
    """The tree of a folder without test images: class folders, in train/ or not, divided by `carve`."""
    if held_out or ("train" in found and found != ["train"]):
        raise DataError(
            f"{where}: test_fraction: got {fraction}, where {folder} has {_shown(found)}; expected class folders only,"
            " or train/ only. Without data.test_fraction, test/ (or val/) is what is tested on."
        )
    folder = folder / "train" if found == ["train"] else folder
    classes = list(_classes(folder))
    if not classes:
        raise DataError(f"{where}: {folder} has no class folders, expected one per class.")
    tree = Tree(classes, {}, {})
    files, labels = _list_part(folder, tree, where, whole=True)
    for part, (kept, kinds) in zip(
        ("train", "test"), carve(np.array(files, object), np.array(labels), fraction), strict=True
    ):
        tree.parts[part] = kept.tolist(), kinds.tolist()
    if not tree.parts["test"][0]:
        raise DataError(f"{where}: test_fraction: got {fraction} of classes of one image, expected two or more of one.")
    return tree


HINT = "Set data.root=FOLDER."


def check_root(root: str | None, where: str) -> Path:
    """`root` as an existing folder. Errors: DataError if it is None, missing, or a file."""
    if not root:
        raise DataError(f"{where}: root: got {root!r}, expected the folder that holds the images. {HINT}")
    folder = Path(root).expanduser()
    if not folder.exists():
        raise DataError(
            f"{where}: root: got {str(folder)!r}, which does not exist, expected the folder that holds the"
            f" images.{nearest_path(folder) or ' ' + HINT}"
        )
    if not folder.is_dir():
        raise DataError(f"{where}: root: got {str(folder)!r}, which is a file, expected a folder. Unpack it?")
    return folder


def _list_part(folder: Path, tree: Tree, where: str, whole: bool) -> tuple[list[str], list[int]]:
    """(files, labels) below one split's folder in order of classes; unusable files go to `tree.bad`.

    whole: every class must have an image.
    """
    names, (_, strays) = _classes(folder), _entries(folder)
    if extra := sorted(set(names) - set(tree.classes)):
        missing = sorted(set(tree.classes) - set(names))
        raise DataError(
            f"{where}: the class folders of {folder} and of train/ differ: {_shown(missing)} missing,"
            f" {_shown(extra)} only here. Every class must be in train/." + (nearest(extra[0], missing))
        )
    tree.bad |= {str(folder / name): "lies outside the class folders" for name in strays}
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(tree.classes):
        inside = [path for each in names.get(name, ()) for path in _walk(str(folder / each))]
        images = [path for path in inside if os.path.splitext(path)[1].lower() in image_endings()]
        if not images and whole:
            raise DataError(
                f"{where}: class folder {folder / names[name][0]} has no images: got {len(inside)} other files,"
                " expected at least one image. Remove the folder if the class does not exist."
            )
        tree.bad |= {path: "is not an image file" for path in sorted(set(inside) - set(images))}
        files += images
        labels += [label] * len(images)
    if not files:
        raise DataError(f"{where}: {folder} holds no image in a class folder: {EXPECTED}.")
    return files, labels


def _classes(folder: Path) -> dict[str, list[str]]:
    """The class names in `folder`, sorted, each with its folders: of a name written in NFC and NFD there are two."""
    found: dict[str, list[str]] = {}
    for name in _entries(folder)[0]:
        found.setdefault(unicodedata.normalize("NFC", name), []).append(name)
    return dict(sorted(found.items()))


def _entries(folder: str | Path) -> tuple[list[str], list[str]]:
    """The sorted names of the folders and of the files in `folder`, without hidden ones and sidecars."""
    try:
        with os.scandir(folder) as entries:
            seen = sorted((entry.name, _is_folder(entry)) for entry in entries if _counts(entry.name))
    except OSError as error:
        raise DataError(f"data: the folder {folder} cannot be read ({error.strerror or error}).") from None
    return [name for name, is_dir in seen if is_dir], [name for name, is_dir in seen if not is_dir]


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; it is named as a file that cannot be read
        return False


def _walk(folder: str, above: frozenset[tuple[int, int]] = frozenset()):
    """Every counting file at any depth below `folder`, in a fixed order. `above`: the folders on the way there."""
    stat = os.stat(folder)
    here = stat.st_dev, stat.st_ino
    if here in above:
        raise DataError(f"data: the folder {folder} is a link to one that it lies in. Remove the link.")
    folders, files = _entries(folder)
    yield from (os.path.join(folder, name) for name in files)  # Why no Path: a million of them take seconds
    for name in folders:
        yield from _walk(os.path.join(folder, name), above | {here})


def _counts(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in SIDECARS


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(repr(name) for name in names[:5]) + more if names else "nothing"


def decode(
    files: list[str], size: Size, reading: Reading, on_bad: Callable[[str, str], None]
) -> tuple[np.ndarray, list[int]]:
    """Decode every file into (pixels uint8 [N, *size, C] of the readable ones, indices of the others).

    `on_bad(path, reason)` is told of each unreadable file, in order.
    """
    pixels = np.empty((len(files), *size, reading.channels), np.uint8)

    def decode_chunk(first: int) -> dict[int, str]:
        reasons = {}
        for index in range(first, min(first + CHUNK, len(files))):
            image = read_image(files[index], reading)
            if isinstance(image, str):
                reasons[index] = image
            else:
                pixels[index] = np.asarray(square(image, size)).reshape(pixels.shape[1:])
        return reasons

    bad: list[int] = []
    bar = Progress(len(files), "decoding images", "images", delay=1)
    lengths = [_stat(file)[0] for file in files[:100]]
    # Why: on small files the interpreter lock makes two threads slower than one
    threads = os.cpu_count() if sum(lengths) > SMALL_FILE * len(lengths) else 1
    with ThreadPoolExecutor(threads) as pool, bar:
        for reasons in pool.map(decode_chunk, range(0, len(files), CHUNK)):
            for index, reason in reasons.items():
                on_bad(files[index], reason)
            bad += reasons
            bar.update(CHUNK)
    return (np.delete(pixels, bad, axis=0) if bad else pixels), bad


def decode_cached(
    files: list[str], size: Size, reading: Reading, on_bad: Callable[[str, str], None], cache: str | None
) -> tuple[np.ndarray, list[int]]:
    """The result of `decode`, from the cache file of exactly these files, size and reading where there is one.

    A damaged cache is rebuilt and an unwritable folder is gone without, each with a BnnfreeWarning.
    """
    path = _cache_path(files, size, reading, cache)
    try:
        with np.load(path, allow_pickle=False) as saved:
            pixels, bad, reasons = saved["pixels"], saved["bad"].tolist(), saved["reasons"].tolist()
        if pixels.shape != (len(files) - len(bad), *size, reading.channels) or pixels.dtype != np.uint8:
            raise ValueError(f"pixels are {pixels.dtype} {list(pixels.shape)}")
    except (FileNotFoundError, NotADirectoryError):
        pass  # nothing cached yet
    except Exception as error:  # Why: a damaged archive fails in many ways
        message = f"image cache {path} cannot be used ({error}); decoding the images again."
        warnings.warn(message, BnnfreeWarning, stacklevel=2)
    else:
        for index, reason in zip(bad, reasons, strict=True):
            on_bad(files[index], reason)
        return pixels, bad

    told: list[str] = []

    def note(file: str, reason: str) -> None:
        on_bad(file, reason)
        told.append(reason)

    pixels, bad = decode(files, size, reading, note)
    if any(reason.startswith("cannot be read") for reason in told):
        return pixels, bad  # Why: permissions or a network may be mended without the file changing
    arrays = {"pixels": pixels, "bad": np.array(bad, np.int64), "reasons": np.array(told, np.str_)}
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
    except OutputError as error:
        again = f"The next run decodes the {len(files)} images again."
        message = f"image cache {error} {again} Set data.cache to a folder that can be written."
        warnings.warn(message, BnnfreeWarning, stacklevel=2)
    return pixels, bad


def _cache_path(files: list[str], size: Size, reading: Reading, cache: str | None) -> Path:
    """The cache file named by a hash of each file's path, length and modification time, of `size` and `reading`."""
    digest = hashlib.sha256(f"{CACHE_FORMAT} {size} {reading}".encode())
    for file in files:
        length, modified = _stat(file)
        digest.update(os.fsencode(os.path.abspath(file)) + f"\0{length} {modified}\n".encode())
    return cache_folder(cache) / f"images-{digest.hexdigest()[:24]}.npz"


def cache_folder(cache: str | None) -> Path:
    """The folder that data.cache names, or bnnfree/ in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache or os.path.join(base, "bnnfree")).expanduser()


def _stat(file: str) -> tuple[int, int]:
    """(length in bytes, modification time in ns), or zeros for a link to nowhere."""
    try:
        stat = os.stat(file)
    except OSError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns
