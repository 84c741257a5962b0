"""Splits whose images are read from their files each time a batch is made, by processes of their own.

A sample depends on its image and its seed only (see pixel_split.py), so the number of processes changes no pixel.
JPEGs are decoded by Pillow, at a half, a quarter or an eighth of their size where the crop needs no more;
torch resizes, which is faster than Pillow. Pixels go to the device as uint8 and are normalised there.

To add an augmentation: one function and one line of FRAMES (which pixels) or CHANGES (what becomes of them); augment.py
has those that images in memory know too.
To read images from somewhere else: a subclass of Files.

Must not import bnnfree.nn, models, export or engine, nor bnnfree.data.datasets: data sets are not its business.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bnnfree.data.augment import POLICIES, policy, seeded
from bnnfree.data.pixel_split import Numbered, Part, Split
from bnnfree.errors import BnnfreeWarning, DataError
from bnnfree.preprocess import Reading, Size, centre, read_image, turned

SAMPLE = 256  # images by which statistics of files are measured
JPEG_MODES = ("RGB", "L", "CMYK")  # what Pillow makes of a JPEG


def middle(image: Image.Image, size: Size, reading: Reading) -> Tensor:
    """The centre of the resized image, to the bit that of bnnfree.preprocess: what evaluation sees."""
    return to_tensor(centre(reading.colours(image), size))


def crop(image: Image.Image, size: Size, reading: Reading) -> Tensor:
    """A random rectangle of 8 to 100 % of the area, its sides 3:4 to 4:3 of those of `size`, resized (antialiased).

    A JPEG not yet decoded is decoded at the smallest of its sizes where the rectangle has `size` pixels.
    """
    from torchvision.transforms import RandomResizedCrop

    rows, columns = size
    shapes = [3 / 4 * (columns / rows), 4 / 3 * (columns / rows)]
    top, left, height, width = RandomResizedCrop.get_params(image, [0.08, 1.0], shapes)  # type: ignore[arg-type]
    whole = image.width
    if height >= 2 * rows and width >= 2 * columns:
        image.draft(None, (image.width * columns // width, image.height * rows // height))  # type: ignore[arg-type]
    part = round(whole / image.width)  # Pillow rounds the smaller sizes up
    box = [round(edge / part) for edge in (left, top, left + width, top + height)]
    pixels = to_tensor(reading.colours(image.crop(box)))  # type: ignore[arg-type]
    return F.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]


def flip(pixels: Tensor) -> Tensor:
    """Mirror left-right with probability 0.5."""
    return pixels.flip(2) if torch.rand(()) < 0.5 else pixels


def to_tensor(image: Image.Image) -> Tensor:
    """The pixels of an image, uint8 [C,H,W] in channels_last memory order."""
    pixels = np.array(image)
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)


FRAMES: dict[str, Callable[[Image.Image, Size, Reading], Tensor]] = {"crop": crop}  # instead of the middle; [C,H,W]
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {"flip": flip}  # after that, in order
FILE_AUGMENTS = CHANGES | FRAMES  # the names


class Files:
    """Images of a FileSplit by number: here, files of their own. Worker processes get a copy."""

    reading = Reading()  # how they become pixels

    def __init__(self, paths: Sequence[str] | np.ndarray):
        # Why: a bytes array is one block that forked workers share; a list of str is copied page by page
        self.paths = np.array([os.fsencode(path) for path in paths])

    def __len__(self) -> int:
        """The number of images."""
        return len(self.paths)

    def name(self, index: int) -> str:
        """Name of an image in messages."""
        return os.fsdecode(self.paths[index])

    def read(self, index: int) -> bytes:
        """The bytes of an image. Errors: OSError for this image; DataError where no more can be read at all."""
        with open(self.paths[index], "rb", buffering=0) as file:
            return file.read()

    def checked(self, index: int) -> Image.Image | str:
        """An image that is no usual JPEG, read by bnnfree.preprocess, or what is wrong with it."""
        return read_image(self.name(index), self.reading)

    def order(self, generator: torch.Generator) -> Tensor:
        """The order of an epoch: a permutation of the images."""
        return torch.randperm(len(self), generator=generator)

    def listing(self) -> Iterator[bytes]:
        """Bytes that tell these images from others, unread: names below their common folder, and sizes."""
        common = os.path.dirname(os.path.commonprefix(self.paths.tolist()))
        for path in self.paths.tolist():
            try:
                size = os.stat(path).st_size
            except OSError:  # it is named when it is read
                size = -1
            yield os.path.relpath(path, common or b".") + b"\0%d\n" % size


class FileSplit(Split):
    """Images read from their files, by `workers` processes, each time a batch is made. size: height, width.

    An image is first seen to be unreadable when its batch is made. With `skip_bad` it is then dropped, which
    makes that batch smaller, and counted in `skipped` (with one BnnfreeWarning, at the first); else, and
    where no image of a batch can be read, it is a DataError. The processes live as long as the split: each
    has two batches ready or in work, in shared memory.
    """

    def __init__(
        self,
        files: Files | Sequence[str] | np.ndarray,
        labels,
        mean,
        std,
        augment: Sequence[str] = (),
        *,
        size: Size,
        workers: int = 0,
        skip_bad: bool = False,
    ):
        import torchvision.transforms  # noqa: F401  Why here: forked workers then find it loaded

        super().__init__(labels, mean, std, augment)
        self.files = files if isinstance(files, Files) else Files(files)
        self.size, self.workers, self.skip_bad = size, workers, skip_bad
        self._bad: set[int] = set()
        self._piped = False  # batches have come through a pipe, and it was said
        self._idle: dict[bool, tuple[_Tasks, torch.utils.data.DataLoader]] = {}

    @property
    def skipped(self) -> int:  # type: ignore[override]
        """Number of files found unreadable and dropped so far."""
        return len(self._bad)

    def resized(self, size: Size) -> FileSplit:
        parts = self.files, self.labels, self.mean, self.std, self.augment
        split = FileSplit(*parts, size=size, workers=self.workers, skip_bad=self.skip_bad)
        split.burst, split.mixing = self.burst, self.mixing
        split._piped = self._piped
        split._bad = self._bad  # a file that cannot be read is counted once
        return split

    def _listing(self) -> Iterable[bytes]:
        return self.files.listing()

    def _order(self, generator: torch.Generator) -> Tensor:
        return self.files.order(generator)

    def _draw(self, generator: torch.Generator) -> Tensor:
        return torch.randint(2**31, (len(self),), generator=generator)

    def _read(self, order: Tensor, draws: Tensor | None, parts: Sequence[Part], device) -> Iterator[Numbered]:
        pinned = torch.device(device).type == "cuda"
        # Why popped: two iterators at a time cannot share the processes; the second one gets its own
        tasks, loader = self._idle.pop(pinned) if pinned in self._idle else self._loader(pinned)
        tasks.order, tasks.parts = order, parts
        tasks.seeds = torch.full((len(self),), -1) if draws is None else draws
        normalise = self._normaliser(device)
        whole = False
        try:
            for pixels, labels, numbers in one_ahead(self._good(loader), device):
                yield normalise(pixels).permute(0, 3, 1, 2), labels, numbers
            whole = True
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"data: one of {self.workers} processes that read images has ended ({str(error).splitlines()[0]})."
                " Memory or shared memory (/dev/shm) may be short: set data.workers or data.batch_size lower."
            ) from None
        finally:
            if whole:
                self._idle[pinned] = tasks, loader
            else:  # batches are on their way in it
                loader._iterator = None  # Why: ends its processes now; the garbage collector takes seconds to

    def _loader(self, pinned: bool) -> tuple[_Tasks, torch.utils.data.DataLoader]:
        tasks = _Tasks()
        if self.workers and not room_for_processes(self.workers):
            warnings.warn(
                f"data: shared memory (/dev/shm) or the system has no room for the {self.workers} processes that read"
                " images; they are read in this one, which is slower. Give it more (docker run --shm-size=2g).",
                BnnfreeWarning,
                stacklevel=4,
            )
            self.workers = 0
        loader = torch.utils.data.DataLoader(
            Reader(self.files, self.size, self.augment, self._fill()),
            batch_sampler=tasks,  # type: ignore[arg-type]
            collate_fn=_as_it_is,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=pinned,
            generator=torch.Generator(),  # Why: without one, the loader draws from torch's global state
        )
        return tasks, loader

    def _good(self, loader) -> Iterator[Numbered]:
        """(pixels, labels, numbers) of the batches; what is wrong with the others is raised or counted."""
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            pixels, good, reasons = batch
            self._report(reasons, len(good))
            if isinstance(pixels, np.ndarray):
                self._warn_of_pipes()
                pixels = torch.from_numpy(pixels)
            yield pixels, self.labels[good], torch.tensor(good)

    def _warn_of_pipes(self) -> None:
        if not self._piped:
            self._piped = True
            message = (
                "data: shared memory (/dev/shm) is full, so batches of images come through pipes, which is slower."
                " Give it more (docker run --shm-size=2g), or set data.workers or data.batch_size lower."
            )
            warnings.warn(message, BnnfreeWarning, stacklevel=3)

    def _report(self, reasons: dict[int, str], readable: int) -> None:
        """Raise for or count the unreadable images {index: reason} of a batch with `readable` good ones."""
        for index, reason in reasons.items():
            message = f"{self.files.name(index)} {reason}."
            if not self.skip_bad:
                raise DataError(f"data: {message} Set data.bad_images=skip to leave such files out.")
            if not readable:
                raise DataError(f"data: no image of a batch can be read; the first: {message}")
            if not self._bad:
                message += " This and further unreadable images are left out of their batches and counted."
                warnings.warn(message, BnnfreeWarning, stacklevel=2)
            self._bad.add(index)


def one_ahead(batches: Iterable[tuple[Tensor, ...]], device: str | torch.device) -> Iterator[tuple[Tensor, ...]]:
    """The batches on `device`; a batch comes when the next one is on its way there.

    On a GPU they are copied by a stream of their own, beside what is computed on the batch before.
    """
    stream = torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None
    waiting: tuple[tuple[Tensor, ...], torch.cuda.Event | None] | None = None
    for batch in batches:
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            moved = tuple(tensor.to(device, non_blocking=True) for tensor in batch)
            copied = None if stream is None else stream.record_event()
        if waiting is not None:
            yield _arrived(*waiting)
        waiting = moved, copied
    if waiting is not None:
        yield _arrived(*waiting)


def _arrived(tensors: tuple[Tensor, ...], copied: torch.cuda.Event | None) -> tuple[Tensor, ...]:
    """The tensors, for use on the current stream once they are `copied`."""
    if copied is not None:
        current = torch.cuda.current_stream(tensors[0].device)
        current.wait_event(copied)
        for tensor in tensors:
            tensor.record_stream(current)  # Why: else the copying stream may reuse the memory too early
    return tensors


def collate(images: Sequence[Tensor]) -> Tensor:
    """Images [C,H,W] as one batch [B,H,W,C]; none: [0,1,1,3]."""
    if not images:
        return torch.empty(0, 1, 1, 3, dtype=torch.uint8)
    return torch.stack([image.permute(1, 2, 0) for image in images])


def room_for_processes(count: int) -> bool:
    """True where there is room for the locks of so many reading processes. They lie in shared memory."""
    try:
        _ = [torch.multiprocessing.Semaphore() for _ in range(4 * count + 8)]  # three a queue, some for events
    except OSError:
        return False
    return True


def shared(pixels: Tensor) -> Tensor | np.ndarray:
    """In a worker process: the tensor in shared memory, or as an array where that is full.

    Why here: the loader would share it in a thread of its own, whose error nobody sees, and wait for ever.
    """
    if torch.utils.data.get_worker_info() is None:
        return pixels
    try:
        return pixels.share_memory_()
    except RuntimeError:
        return pixels.numpy()


class _Tasks:
    """Tasks of a loader: one list of (image, seed or -1) per batch; set anew for each pass."""

    order: Tensor
    seeds: Tensor
    parts: Sequence[Part]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for part in self.parts:
            index = self.order[part]
            yield list(zip(index.tolist(), self.seeds[part].tolist(), strict=True))


class Reader(torch.utils.data.Dataset):
    """Data set of a worker process: reads, decodes and augments the images of `files` that a batch asks for."""

    def __init__(self, files: Files, size: Size, augment: tuple[str, ...], fill: tuple[int, ...] = (0, 0, 0)):
        self.files, self.size, self.augment, self.fill = files, size, augment, fill

    def __getitems__(
        self, tasks: list[tuple[int, int]]
    ) -> tuple[Tensor | np.ndarray, list[int], dict[int, str]] | DataError:
        """(pixels uint8 [B,H,W,C], images [B], what is wrong by image) of the (image, seed or -1) of one batch.

        In a process of its own the pixels are in shared memory; an array, to be copied, where there is too little.
        """
        images: list[Tensor] = []
        good: list[int] = []
        reasons: dict[int, str] = {}
        for index, seed in tasks:
            try:
                image = self.sample(index, seed)
            except DataError as error:
                return error  # Why not raised: a worker's exceptions arrive with a traceback in their message
            if isinstance(image, str):
                reasons[index] = image
                continue
            images.append(image)
            good.append(index)
        return shared(collate(images)), good, reasons

    def sample(self, index: int, seed: int) -> Tensor | str:
        """An image as uint8 [C,H,W], augmented as `seed` says (-1: not at all), or what is wrong with it."""
        try:
            with Image.open(io.BytesIO(self.files.read(index)), formats=("JPEG",)) as image:
                if image.mode in JPEG_MODES and self.files.reading.limits is None:
                    return self.change(turned(image, self.files.reading.turn(image)), seed)
        except DataError:
            raise
        except Exception:  # Why: on damaged bytes the decoder raises errors of many types; what follows names them
            pass
        checked = self.files.checked(index)
        return checked if isinstance(checked, str) else self.change(checked, seed)

    def change(self, image: Image.Image, seed: int) -> Tensor:
        """The image, decoded or not yet, as uint8 [C,H,W], augmented as `seed` says."""
        names = self.augment if seed >= 0 else ()
        with seeded() as start:
            start(max(seed, 0))
            frame = next((FRAMES[name] for name in names if name in FRAMES), middle)
            pixels = frame(image, self.size, self.files.reading)
            for name in names:
                if name in CHANGES:
                    pixels = CHANGES[name](pixels)
                elif name in POLICIES:
                    pixels = policy(name, self.fill)(pixels)
        return pixels


def _as_it_is(batch):
    return batch


def sample_pixels(files: Files, size: Size, where: str) -> np.ndarray:
    """uint8 [N,H,W,C] of at most SAMPLE images at equal distances, as evaluation sees them; bad ones are left out."""
    reader = Reader(files, size, ())
    count = min(SAMPLE, len(files))
    samples = [reader.sample(number * len(files) // count, -1) for number in range(count)]
    images = [sample for sample in samples if not isinstance(sample, str)]
    if not images:
        raise DataError(
            f"{where}: {files.name(0)} {samples[0]}, and none of {count} images that were tried can be read."
        )
    return collate(images).numpy()
