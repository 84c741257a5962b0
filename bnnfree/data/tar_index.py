"""Tar shards, the layout of the webdataset library: samples of an image and its class.

    OUT/index.json, OUT/train-000000.tar, ...     what `write` makes of an image folder
    00000000.cls 00000000.jpg 00000001.cls ...    members of a shard; .cls holds the class as a decimal number

An index says where in its shard each image lies. So any image can be read at any time, an epoch is a permutation
as for files, and order, resuming and the parts of several processes are those of every other split. Shards without
an index are scanned once. tar_images.py reads and fetches them.

Must not import bnnfree.nn, models, export or engine, nor bnnfree.data.datasets.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tarfile
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bnnfree.data.addresses import expand, fetch, is_plain, is_url, webdataset
from bnnfree.data.folder import list_tree
from bnnfree.data.tar_images import BLOCK, MEMBER, Members, check_size, local
from bnnfree.errors import BnnfreeWarning, DataError
from bnnfree.files import OutputError, replacing
from bnnfree.preprocess import image_endings, read_image
from bnnfree.progress import Progress, over

INDEX = "index.json"
ORDER_SEED = 20  # of the images in the shards; the order of an epoch has the recipe's
LARGEST = 2**31  # bytes of an image, and of an index
# tarfile raises any of these for a damaged or hostile header
TAR_ERRORS = (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, RecursionError, LookupError)
PARTS = Literal["train", "test", "val"]


class Shard(BaseModel):
    """A tar and the images in it, in its order: their bytes from `offsets` on, `lengths` of them, and classes."""

    model_config = ConfigDict(extra="forbid", strict=True)
    file: str = Field(min_length=1)
    """a name in the folder of the index; else a path or URL"""
    bytes: Annotated[int, Field(ge=0, lt=2**62)]
    offsets: list[Annotated[int, Field(ge=BLOCK, lt=2**62)]] = []
    lengths: list[Annotated[int, Field(ge=0, lt=LARGEST)]] = []
    labels: list[int] = []


class Index(BaseModel):
    """Contents of index.json."""

    model_config = ConfigDict(extra="forbid", strict=True)
    format: Literal["bnnfree shards 1"]
    classes: list[str] = Field(min_length=1)
    parts: dict[PARTS, Annotated[list[Shard], Field(min_length=1)]]


@dataclass
class Found:
    """A data set of shards: `parts[name]` is (members [N] of dtype MEMBER, labels [N]) over all `places`."""

    classes: list[str]
    places: list[str]  # paths or URLs
    sizes: list[int]  # bytes
    parts: dict[str, tuple[np.ndarray, np.ndarray]]
    cache: Path
    limit: int | None

    def files(self, members: np.ndarray) -> Members:
        """Reader of these images."""
        return Members(self.places, self.sizes, members, self.cache, self.limit)


def scan(place: str, path: Path) -> Shard:
    """The images of a shard and their classes, found by reading the headers of the tar at `path`.

    Errors: DataError for what is no whole, uncompressed tar and for a sample that is not one image and one .cls.
    """
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        found = Shard(file=place, bytes=path.stat().st_size)
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile():
                    folder, name = os.path.split(member.name)
                    stem, _, ending = name.partition(".")
                    kind = "cls" if ending == "cls" else "image" if f".{ending.lower()}" in image_endings() else ""
                    samples.setdefault(os.path.join(folder, stem), {})[kind] = member
            for name, sample in samples.items():
                if not {"image", "cls"} <= set(sample):
                    kinds = "no .cls" if "image" in sample else "no image"
                    raise DataError(f"shard {place}: sample {name!r} has {kinds}, expected an image and a .cls.")
                text = tar.extractfile(sample["cls"]).read(32)  # type: ignore[union-attr]
                if not text.strip().isdigit():
                    raise DataError(f"shard {place}: sample {name!r}: got the class {text!r}, expected a number.")
                if not 0 <= sample["image"].size < LARGEST:
                    raise DataError(f"shard {place}: sample {name!r}: got {sample['image'].size} bytes for an image.")
                found.offsets.append(sample["image"].offset_data)
                found.lengths.append(sample["image"].size)
                found.labels.append(int(text))
            after = found.bytes - tar.offset
    except TAR_ERRORS as error:
        raise DataError(f"shard {place}: is no whole, uncompressed tar ({error}).") from None
    if not found.offsets or after > 2 * tarfile.RECORDSIZE:  # Why: tarfile takes a damaged header for the end
        raise DataError(f"shard {place}: is damaged or no tar: {len(found.offsets)} images, then {after} bytes more.")
    return found


def find_shards(
    root: str | None,
    test_root: str | None,
    val_root: str | None,
    *,
    classes: int,
    cache: Path,
    limit: int | None,
    where: str,
) -> Found:
    """The data set at `root`: a folder (or URL) with an index, or a pattern of tars, then with `test_root`.

    `classes`: how many there are, where no index tells. `cache`, `limit`: as in members.local. Errors: DataError for
    what is missing, damaged or does not fit together.
    """
    if not root:
        raise DataError(
            f"{where}: root: got {root!r}, expected a folder or URL with {INDEX}, or a pattern of tars such as"
            " FOLDER/train-{000000..000127}.tar."
        )
    if not root.endswith(".tar"):
        if test_root or val_root:
            raise DataError(f"{where}: test_root, val_root: belong to a root that ends in .tar, got root {root!r}.")
        names, parts = _from_index(root, where)
        return _joined(Found(names, [], [], {}, cache, limit), parts, where)
    if not test_root:
        raise DataError(f"{where}: test_root: got {test_root!r}, expected a pattern of tars, as root is one.")
    places = {"train": expand(root, f"{where}: root"), "test": expand(test_root, f"{where}: test_root")}
    if val_root:
        places["val"] = expand(val_root, f"{where}: val_root")
    everything = [place for part in places.values() for place in part]
    for place, times in Counter(everything).items():
        if times > 1:
            raise DataError(f"{where}: shard {place} is named {times} times in root, test_root and val_root.")
        if not is_url(place) and not Path(place).is_file():
            raise DataError(f"{where}: shard {place}: no such file.")
    scanned = _scan_all(everything, cache, limit)
    parts = {part: [scanned[place] for place in names] for part, names in places.items()}
    names = [f"class{label}" for label in range(classes)]
    return _joined(Found(names, [], [], {}, cache, limit), parts, where)


def _scan_all(places: list[str], cache: Path, limit: int | None) -> dict[str, Shard]:
    """Each shard by its place; what they held is remembered in `cache`, of local ones until they change."""
    stats = [None if is_url(place) else os.stat(place) for place in places]
    key = [(place, stat and (stat.st_size, stat.st_mtime_ns)) for place, stat in zip(places, stats, strict=True)]
    known = cache / f"shards-{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.json"
    try:
        rows = json.loads(known.read_text(encoding="utf-8"))
        return {place: Shard(**row) for place, row in zip(places, rows, strict=True)}
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        warnings.warn(f"index {known} cannot be used ({reason}); scanning again.", BnnfreeWarning, stacklevel=2)
    counted = over(places, "scanning shards", "shards", delay=1)
    found = {place: scan(place, local(place, cache, limit)) for place in counted}
    try:
        with replacing(known) as temporary:
            temporary.write_text(json.dumps([shard.model_dump() for shard in found.values()]), encoding="utf-8")
    except OutputError as error:
        warnings.warn(f"{error} The next run scans again.", BnnfreeWarning, stacklevel=2)
    return found


def _from_index(root: str, where: str) -> tuple[list[str], dict[str, list[Shard]]]:
    """(classes, the shards of each part) as root/index.json says; local shards must be there, whole."""
    remote = is_url(root)
    base = root.rstrip("/") if remote else os.path.expanduser(root)
    place = f"{base}/{INDEX}" if remote else os.path.join(base, INDEX)
    try:
        if remote:
            with tempfile.TemporaryDirectory() as folder:
                fetch(place, Path(folder) / INDEX, LARGEST)
                index = _read_index(Path(folder) / INDEX, place, where)
        else:
            index = _read_index(Path(place), place, where)
    except OSError as error:
        raise DataError(
            f"{where}: root: got {root!r}, without {INDEX} ({error.strerror or error}). tools/shard.py makes shards"
            " with an index; others are given as a pattern of tars."
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise DataError(f"{where}: {place}: is no index of shards: {key}: {first['msg']}.") from None
    parts: dict[str, list[Shard]] = {}
    for name, shards in index.parts.items():
        parts[name] = [_placed(shard, base, remote, where) for shard in shards]
    for part in ("train", "test"):
        if not parts.get(part):
            raise DataError(f"{where}: {place}: got the parts {', '.join(parts) or 'none'}, expected train and test.")
    return index.classes, parts


def _read_index(path: Path, place: str, where: str) -> Index:
    """The index in the file `path`, which came from `place`."""
    if (size := path.stat().st_size) > LARGEST:
        raise DataError(f"{where}: {place}: is no index of shards: got {size} bytes, expected at most {LARGEST}.")
    return Index.model_validate_json(path.read_bytes())


def _placed(shard: Shard, base: str, remote: bool, where: str) -> Shard:
    """A shard of an index, with its place instead of its name."""
    if not is_plain(shard.file):
        raise DataError(
            f"{where}: {INDEX}: got the file {shard.file!r}, expected a name without folders, of letters, digits and"
            " . _ - ~ + @ % = ,"
        )
    place = f"{base}/{shard.file}" if remote else os.path.join(base, shard.file)
    if not remote:
        try:
            size = os.path.getsize(place)
        except OSError as error:
            raise DataError(f"{where}: shard {place}: {error.strerror}. Its index names it.") from None
        check_size(f"{where}: shard {place}", size, shard.bytes)
    return shard.model_copy(update={"file": place})


def _joined(found: Found, parts: dict[str, list[Shard]], where: str) -> Found:
    """`found` with the shards of all parts. Errors: DataError for a class out of range and for an odd index."""
    for part, shards in parts.items():
        members, labels = [], []
        for shard in shards:
            if not len(shard.offsets) == len(shard.lengths) == len(shard.labels):
                raise DataError(f"{where}: shard {shard.file}: its index has unequal numbers of offsets and labels.")
            if any(start + length > shard.bytes for start, length in zip(shard.offsets, shard.lengths, strict=True)):
                raise DataError(f"{where}: shard {shard.file}: its index has an image beyond its {shard.bytes} bytes.")
            rows = np.empty(len(shard.offsets), MEMBER)
            rows["shard"], rows["offset"], rows["length"] = len(found.places), shard.offsets, shard.lengths
            for label in shard.labels:
                if not 0 <= label < len(found.classes):
                    raise DataError(
                        f"{where}: shard {shard.file}: got class {label}, expected 0 to {len(found.classes) - 1}."
                        " Without an index, data.classes says how many there are."
                    )
            members.append(rows)
            labels.append(np.array(shard.labels, np.int64))
            found.places.append(shard.file)
            found.sizes.append(shard.bytes)
        found.parts[part] = np.concatenate(members), np.concatenate(labels)
        if not len(found.parts[part][1]):
            raise DataError(f"{where}: the shards of {part}, {shards[0].file} and so on, hold no images.")
    return found


def write(root: str, out: str | Path, *, size: int = 100_000_000, skip_bad: bool = False, where: str = "shards") -> int:
    """Copy the image folder `root` (see folder.py) into shards of about `size` bytes in a new folder `out`.

    Each part's images come in an order drawn at random, the same every time, so that a shard is a fair sample; their
    files are copied as they are. Returns the number of bad files left out with `skip_bad`; without it they are a
    DataError, as is an `out` with something in it.
    """
    tree, out = list_tree(root, where), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{where}: the folder {out} is there and not empty; expected a new one.")
    bad = dict(tree.bad)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    total = sum(len(files) for files, _ in tree.parts.values())
    parts: dict[str, list[dict]] = {}
    try:
        with Progress(total, "writing shards", "images", delay=1) as bar:
            for part, (files, labels) in tree.parts.items():
                parts[part] = []
                for number, chunk in enumerate(_chunks(files, size)):
                    name = f"{part}-{number:06d}.tar"
                    written = _write_shard(temporary / name, [(i, files[i], labels[i]) for i in chunk], bad, bar)
                    if bad and not skip_bad:
                        file, reason = next(iter(bad.items()))
                        raise DataError(f"{where}: {file} {reason}. --skip-bad leaves such files out.")
                    if written:
                        parts[part].append(scan(name, temporary / name).model_dump())
                if not parts[part]:
                    raise DataError(f"{where}: none of the {len(files)} images of {part} is one.")
        index = {"format": "bnnfree shards 1", "classes": tree.classes, "parts": parts}
        (temporary / INDEX).write_text(json.dumps(index), encoding="utf-8")
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return len(bad)


def _chunks(files: Sequence[str], size: int) -> Iterator[list[int]]:
    """The numbers of the files in random order, cut into lists whose files have `size` bytes or just more."""
    chunk: list[int] = []
    room = size
    for index in np.random.RandomState(ORDER_SEED).permutation(len(files)).tolist():
        chunk.append(index)
        with contextlib.suppress(OSError):  # a file that cannot be read is found to be bad when it is copied
            room -= os.path.getsize(files[index])
        if room <= 0:
            yield chunk
            chunk, room = [], size
    if chunk:
        yield chunk


def _write_shard(path: Path, samples: list[tuple[int, str, int]], bad: dict[str, str], bar) -> int:
    """Write (number, file, class) samples as one tar, return how many; files that are no images go to `bad`."""
    library, written = webdataset("writing shards"), 0
    with open(path, "wb") as file, library.TarWriter(file, encoder=False, mtime=0, user="", group="") as tar:
        for number, name, label in samples:
            bar.update()
            try:
                with Image.open(name):  # Why only opened: to decode all takes hours; training finds the damaged ones
                    data = Path(name).read_bytes()
            except (OSError, Image.DecompressionBombError):
                bad[name] = str(read_image(name))
                continue
            ending = os.path.splitext(name)[1][1:].lower()
            tar.write({"__key__": f"{number:08d}", ending: data, "cls": str(label).encode()})
            written += 1
    return written
