"""Speed of reading images: by phase, by number of processes, cores to feed a GPU; and synthetic trees to measure it on.

Must not import bnnfree.nn, models, export or engine.
"""

from __future__ import annotations

import io
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms  # noqa: F401  Why: what is measured then has it
from PIL import Image

from bnnfree.bench.process_memory import told
from bnnfree.data.file_split import FileSplit, Reader, collate
from bnnfree.data.pixel_split import Split
from bnnfree.errors import DataError

PHASES = ("read", "decode", "augment", "collate")
ROUGHNESS = (15.0, 65.0)  # standard deviation of a synthetic image's brightness, from the smoothest to the roughest
QUALITY = (83, 97)  # of its JPEG, from the lowest up to, not including, the highest


def make_tree(
    folder: str | Path,
    files: int,
    classes: int,
    *,
    distinct: int | None = None,
    size: tuple[int, int] = (500, 375),
    seed: int = 0,
) -> dict[str, Any]:
    """Write an image folder of JPEGs as hard to decode as photos: folder/train and folder/val, a tenth in the latter.

    An image is noise whose amplitude falls as 1/frequency, as that of photos does, of a roughness drawn for each:
    at 500x375 (width, height) files have 110 kB on average, half of them 80 to 135 kB, as ImageNet's do. Only
    `distinct` files (all, if None) are drawn; the other names are hard links to them, so that a tree of 100,000
    needs little disk, and the page cache holds all of it: reading then looks faster than a disk is.
    Returns files, distinct, and of the distinct ones' bytes mean, smallest and largest.
    Errors: DataError for a folder with something in it, or fewer than one image of each class and part.
    """
    folder = Path(folder)
    if classes < 1 or files < 2 * classes or (distinct is not None and distinct < 1):
        raise DataError(f"make_tree: got {files} files, {classes} classes, {distinct} distinct; expected 2 a class.")
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"make_tree: the folder {folder} is there and not empty; expected a new one.")
    random = np.random.RandomState(seed)
    held_out = max(classes, files // 10)
    drawn: list[Path] = []
    sizes: list[int] = []
    for part, count in (("train", files - held_out), ("val", held_out)):
        for label in range(classes):
            (folder / part / f"class{label:04d}").mkdir(parents=True)
        for number in range(count):
            path = folder / part / f"class{number % classes:04d}" / f"image_{number:08d}.JPEG"
            if distinct is None or len(drawn) < distinct:
                path.write_bytes(_noisy_jpeg(random, size))
                drawn.append(path)
                sizes.append(path.stat().st_size)
            else:
                _link(drawn[random.randint(len(drawn))], path)
    return {
        "files": files,
        "distinct": len(drawn),
        "mean_bytes": sum(sizes) / len(sizes),
        "smallest_bytes": min(sizes),
        "largest_bytes": max(sizes),
    }


def _link(source: Path, path: Path) -> None:
    try:
        os.link(source, path)
    except OSError:  # Why: a file has at most 65,000 names on ext4, and some file systems know no links
        shutil.copyfile(source, path)


def _noisy_jpeg(random: np.random.RandomState, size: tuple[int, int]) -> bytes:
    """A JPEG of 1/f noise, width and height `size`, its colours half as rough as its brightness."""
    width, height = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    planes = []
    for _ in range(3):
        plane = np.fft.irfft2(np.fft.rfft2(random.standard_normal((height, width))) / frequency, s=(height, width))
        planes.append(plane / max(plane.std(), 1e-9))
    light, warm, cold = planes
    rough = random.uniform(*ROUGHNESS)
    colours = np.stack([light + 0.5 * warm, light - 0.25 * warm + 0.25 * cold, light - 0.5 * cold], 2)
    pixels = np.clip(120 + rough * colours, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=random.randint(*QUALITY))
    return file.getvalue()


def streamed(split: Split) -> FileSplit:
    """The split, if its images are read from files. Errors: DataError for one that holds its pixels in memory."""
    if not isinstance(split, FileSplit):
        raise DataError("data: its images are held in memory, expected large ones that are read from files.")
    return split


def phases(split: FileSplit, seconds: float, *, batch_size: int = 32, seed: int = 0) -> dict[str, float]:
    """Milliseconds per training image of each of PHASES, in this process, over about `seconds`.

    read: the bytes of the file, with waiting for them; the others count computing only. decode: all that Pillow does
    to a whole image; augment: what a training sample takes beyond that (a crop that lets Pillow decode a smaller
    size can make it negative); collate: into the batch, and the batch to where another process finds it.
    """
    reader = Reader(split.files, split.size, split.augment, split._fill())
    spent = dict.fromkeys(PHASES, 0.0)
    good: list[torch.Tensor] = []
    images = 0
    with _one_thread():
        for index in _random(len(split), seed, seconds):
            start = time.perf_counter()
            try:
                data = split.files.read(index)
                read, times = time.perf_counter() - start, [time.process_time()]
                with Image.open(io.BytesIO(data)) as image:
                    image.load()
            except Exception:  # Why: training names the bad ones; here they only do not count
                continue
            times.append(time.process_time())
            sample = reader.change(Image.open(io.BytesIO(data)), index)
            times.append(time.process_time())
            good.append(sample)
            if len(good) == batch_size:
                collate(good).share_memory_()
                good.clear()
            times.append(time.process_time())
            decode, whole, last = (b - a for a, b in zip(times, times[1:], strict=False))
            for phase, value in zip(PHASES, (read, decode, whole - decode, last), strict=True):
                spent[phase] += value
            images += 1
    if not images:
        raise DataError("data: none of the images that were tried can be read.")
    return {phase: 1000 * value / images for phase, value in spent.items()}


def _random(count: int, seed: int, seconds: float) -> Iterator[int]:
    """Random images, for so long."""
    random = np.random.RandomState(seed)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        yield from random.randint(count, size=16).tolist()


class _one_thread:
    """In the block torch uses one thread, as it does in a worker process."""

    def __enter__(self) -> None:
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.threads)


class _Raw(FileSplit):
    """Batches of uint8: to normalise them is the work of the device, not of the cores that read."""

    def _normaliser(self, device):
        return lambda pixels: pixels


def rate(split: FileSplit, workers: int, seconds: float, *, batch_size: int = 32, seed: int = 0) -> tuple[float, float]:
    """Training images that `workers` processes (0: this one) deliver, per second and per second that this one computes.

    The second number says with workers=0 what a core can do when others have work for it too; it leaves out waiting
    for a disk. Over about `seconds`; the clock starts when each process has delivered two batches: what they had
    ready does not count.
    """
    measured = _Raw(
        split.files, split.labels, split.mean, split.std, split.augment, size=split.size, workers=workers, skip_bad=True
    )
    batch_size = min(batch_size, len(split))
    warm, images, elapsed, computed, epoch = 2 * max(workers, 1), 0, 0.0, 0.0, 0
    start = computed_before = 0.0
    with _one_thread():
        while elapsed < seconds:
            for _, labels in measured.train_batches(batch_size, seed=seed, epoch=epoch):
                warm -= 1
                if warm == 0:
                    start, computed_before = time.perf_counter(), time.process_time()
                elif warm < 0:
                    images += len(labels)
                    elapsed, computed = time.perf_counter() - start, time.process_time() - computed_before
                    if elapsed >= seconds:
                        break
            epoch += 1
    return images / elapsed, images / computed


def cores_needed(images_per_second: float, per_core: float) -> int:
    """Number of cores that deliver so many images per second."""
    return math.ceil(images_per_second / per_core)


def memory(load: Callable[[], Any]) -> tuple[Any, float, int | None]:
    """(what `load` returns, its seconds, by how many bytes this process has grown; None where that is not told)."""
    before, start = told("VmRSS"), time.perf_counter()
    loaded = load()
    seconds, after = time.perf_counter() - start, told("VmRSS")
    return loaded, seconds, max(0, after - before) if before and after else None
