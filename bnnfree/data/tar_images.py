"""Images inside tar files, by the place of their bytes: how a FileSplit reads shards, local or by URL.

A shard at a URL is fetched whole into the cache folder when it is first needed, by one process at a time. An epoch
goes through the shards in random order with WINDOW of them open at a time and takes images from those at random,
so few shards are needed at once.

Must not import bnnfree.nn, models, export or engine, nor bnnfree.data.datasets.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bnnfree.data.addresses import fetch, is_url
from bnnfree.data.file_split import Files
from bnnfree.errors import DataError
from bnnfree.files import OutputError, replacing
from bnnfree.preprocess import read_image

WINDOW = 16  # shards that an epoch takes images from at a time
BLOCK = 512  # bytes: a tar header
SLACK = 2**20  # bytes beyond those of the index: a shard that was made anew is taken, and named for what it is
MEMBER = np.dtype([("shard", np.int32), ("offset", np.int64), ("length", np.int32)])


class Members(Files):
    """Images in shards: where a FileSplit reads. `cache` keeps fetched shards, up to about `limit` bytes of them."""

    def __init__(self, places: list[str], sizes: list[int], members: np.ndarray, cache: Path, limit: int | None):
        self.places, self.sizes, self.members, self.cache, self.limit = places, sizes, members, cache, limit
        self._open: dict[int, Any] = {}
        self._process = os.getpid()

    def __len__(self) -> int:
        return len(self.members)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def name(self, index: int) -> str:
        member = self.members[index]
        return f"{self.places[member['shard']]}: the image at byte {member['offset']}"

    def read(self, index: int) -> bytes:
        shard, offset, length = self.members[index].tolist()
        file = self._file(shard)
        try:
            file.seek(offset - BLOCK)
            data = file.read(BLOCK + length)
        except OSError as error:
            raise DataError(f"shard {self.places[shard]}: cannot be read ({error.strerror or error}).") from None
        if len(data) < BLOCK + length or not _heads(data[:BLOCK], length):
            raise DataError(
                f"shard {self.places[shard]}: got no image of {length} bytes at byte {offset}, where its index has one."
                " The shard is damaged or another than the index was made for."
            )
        return data[BLOCK:]

    def checked(self, index: int) -> Image.Image | str:
        """As Files.checked."""
        # Why a file: what is an image, and what is wrong with one, is decided in one place, which reads files
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "image")
            path.write_bytes(self.read(index))
            return read_image(path, self.reading)

    def order(self, generator: torch.Generator) -> Tensor:
        """Shards in random order, each image at most WINDOW shards after its own turn."""
        turns = torch.randperm(len(self.places), generator=generator)[torch.from_numpy(self.members["shard"]).long()]
        delays = WINDOW * torch.rand(len(self), generator=generator, dtype=torch.float64)
        return torch.argsort(turns + delays, stable=True)

    def listing(self) -> Iterator[bytes]:
        """As Files.listing: names and sizes of the shards, and the places of the images in them."""
        for shard in np.unique(self.members["shard"]).tolist():
            yield f"{os.path.basename(self.places[shard])}\0{self.sizes[shard]}\n".encode()
        members = self.members.astype(MEMBER)
        members["shard"] -= members["shard"].min(initial=0)
        yield members.tobytes()

    def _file(self, shard: int):
        """The shard, open for reading; as many as an epoch needs at a time stay open."""
        if self._process != os.getpid():  # Why: a forked process shares the position in its parent's files
            self._open, self._process = {}, os.getpid()
        if shard not in self._open:
            while len(self._open) > WINDOW:
                self._open.pop(next(iter(self._open))).close()
            self._open[shard] = self._opened(shard)
        return self._open[shard]

    def _opened(self, shard: int):
        place = self.places[shard]
        try:
            file = open(local(place, self.cache, self.limit, self.sizes[shard]), "rb", buffering=0)
        except OSError as error:
            raise DataError(f"shard {place}: cannot be read ({error.strerror or error}).") from None
        check_size(f"shard {place}", os.fstat(file.fileno()).st_size, self.sizes[shard])
        return file


def _heads(header: bytes, length: int) -> bool:
    """Is this the tar header of a member of `length` bytes?"""
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size == length
    except tarfile.HeaderError:
        return False


def check_size(what: str, size: int, expected: int) -> None:
    """Errors: DataError for a shard whose size in bytes is not the one its index was made for."""
    if size != expected:
        raise DataError(
            f"{what}: got {size} bytes, expected {expected}: it is cut short or another than its index was made for."
        )


def local(place: str, cache: Path, limit: int | None, size: int | None = None) -> Path:
    """The path of a shard, which is fetched if it is a URL and not in the folder `cache`.

    With a `limit` in bytes, the shards whose use is longest ago then make room. From the web not much more than
    `size` bytes are taken. Errors: DataError.
    """
    if not is_url(place):
        return Path(place)
    digest = hashlib.sha256(place.encode()).hexdigest()[:24]
    path = cache / "shards" / f"{digest}-{place.split('?')[0].rsplit('/', 1)[1][-80:]}"
    try:
        with _locked(path):
            if not path.exists():
                with replacing(path) as temporary:
                    fetch(place, temporary, None if size is None else size + SLACK)
            os.utime(path)
        if limit is not None:
            _make_room(path, limit)
    except (OSError, OutputError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"shard {place}: cannot be kept in {path.parent} ({reason}). Set data.cache to a folder"
            " that can be written."
        ) from None
    return path


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Only one process at a time is in the block; without locks on a system, two may fetch the same shard."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "wb") as file:
        try:
            import fcntl
        except ImportError:
            pass
        else:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make_room(newest: Path, limit: int) -> None:
    stats = []
    for path in newest.parent.glob("[!.]*"):
        try:
            stats.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        except FileNotFoundError:  # another process made room
            continue
    total = sum(size for _, size, _ in stats)
    for _, size, path in sorted(stats):
        if total > limit and path != newest:
            path.unlink(missing_ok=True)
            total -= size
