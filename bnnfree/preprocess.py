"""Decode an image file to the uint8 pixels that a network takes; training and prediction both use it.

Images become 8-bit RGB, grey or RGBA: grey is repeated, palettes are looked up, transparency is dropped (but for
RGBA), the first frame of an animation counts. `Reading` says the rest: the turn that a camera noted, and which
values of files of more than 8 bits are black and white.

To add a way of resizing: one function (image, (height, width)) -> image of that size and one line of RESIZES.

Imports numpy, PIL and bnnfree.errors; no torch, so that a packed network can be used without it.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from bnnfree.errors import BnnfreeWarning, DataError, lacking, pick

try:
    from PIL import Image, UnidentifiedImageError
except ModuleNotFoundError as _error:
    raise lacking(_error, "bnnfree.preprocess") from None

DECODED_SIZE = 64  # training decodes images up to this size once, by "square"; larger ones are streamed
CENTRE_SHARE = 0.875  # of the resized image, per side, is what "centre" keeps: 224 of 256 pixels

NARROW = 64  # of 256 values: images that keep within so few use a small part of their type's range

Size = tuple[int, int]  # height, width
Limits = tuple[float, float]  # the values that become 0 and 255
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> Pillow's name of such pixels
ORIENTATIONS = ("exif", "stored")
TURN = Image.Transpose
TURNS = {  # value of EXIF's tag 0x0112 -> what sets the image upright
    2: TURN.FLIP_LEFT_RIGHT,
    3: TURN.ROTATE_180,
    4: TURN.FLIP_TOP_BOTTOM,
    5: TURN.TRANSPOSE,
    6: TURN.ROTATE_270,
    7: TURN.TRANSVERSE,
    8: TURN.ROTATE_90,
}


@dataclass(frozen=True)
class Reading:
    """The choices by which an image file becomes pixels; the same in training and prediction.

    channels: a key of MODES. orientation: "exif" (upright, as the camera noted) or "stored" (as the rows lie in the
    file). limits: the values of a file of more than 8 bits that become 0 and 255; None: 0 and 65535 of 16 bits.
    """

    channels: int = 3
    orientation: str = "exif"
    limits: Limits | None = None

    def turn(self, image: Image.Image) -> Image.Transpose | None:
        """The turn that sets an opened file upright, where `orientation` asks for it."""
        if self.orientation != "exif":
            return None
        try:
            return TURNS.get(image.getexif().get(0x0112, 1))
        except Exception:  # Why: damaged EXIF fails in many ways, and says nothing of the pixels
            return None

    def colours(self, image: Image.Image) -> Image.Image:
        """The 8-bit image in the mode of `channels`. Grey is Pillow's 0.299 R + 0.587 G + 0.114 B."""
        # Why by RGBA: Pillow warns about a direct way from transparent palettes; the colours are equal
        if self.channels == 4 or "transparency" in image.info:
            image = image.convert("RGBA")
        if self.channels == 4:
            return image
        image = image.convert("RGB")
        return image.convert("L") if self.channels == 1 else image


def turned(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    """The image, turned; None: as it is."""
    return image if turn is None else image.transpose(turn)


def reading_of(metadata: Mapping[str, Any], channels: int, where: str) -> Reading:
    """The reading of image files for a packed model; one without `orientation` is of before EXIF was looked at.

    Errors: DataError for what no model's metadata says, and for channels that image files do not have.
    """
    if channels not in MODES:
        raise DataError(
            f"{where}: takes {channels} channels, expected 1 (grey), 3 (RGB) or 4 (RGBA), which image files have."
        )
    orientation, limits = metadata.get("orientation", "stored"), metadata.get("range")
    if isinstance(limits, str):
        limits = _numbers(limits)
    if orientation not in ORIENTATIONS:
        raise DataError(f"{where}: metadata: orientation: got {orientation!r}, expected one of exif, stored.")
    if limits is None:
        return Reading(channels, orientation)
    return Reading(channels, orientation, check_limits(limits, f"{where}: metadata: range"))


def _numbers(text: str) -> list[float] | str:
    """Numbers with spaces between; the text itself where they are not."""
    try:
        return [float(part) for part in text.split(" ")]
    except ValueError:
        return text


def check_limits(limits: Any, what: str) -> Limits:
    """The pair (low, high). Errors: DataError for anything but two finite numbers, the first below the second."""
    if isinstance(limits, (list, tuple)) and len(limits) == 2 and all(type(v) in (int, float) for v in limits):
        low, high = map(float, limits)
        if low < high and math.isfinite(high - low):
            return low, high
    raise DataError(f"{what}: got {limits!r:.80}, expected [low, high], two numbers, low below high.")


def square(image: Image.Image, size: Size) -> Image.Image:
    """The largest centred box of the shape of `size`, scaled to it (bilinear, antialiased)."""
    height, width = size
    if image.size == (width, height):
        return image
    box_width, box_height = float(image.width), float(image.height)
    if image.width * height <= image.height * width:
        box_height = image.width * height / width
    else:
        box_width = image.height * width / height
    left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
    box = (left, top, left + box_width, top + box_height)
    return image.resize((width, height), Image.Resampling.BILINEAR, box=box)


def centre(image: Image.Image, size: Size) -> Image.Image:
    """Resize, keeping the shape, until the image just covers size/0.875 (bilinear, antialiased); crop the centre.

    For a square `size`, bit for bit torchvision's resize of the short side followed by its center_crop.
    """
    height, width = size
    cover_height, cover_width = round(height / CENTRE_SHARE), round(width / CENTRE_SHARE)
    # Why the product first: so the long side rounds down to the pixel that torchvision's does
    if image.width * cover_height <= image.height * cover_width:
        resized = (cover_width, int(cover_width * image.height / image.width))
    else:
        resized = (int(cover_height * image.width / image.height), cover_height)
    if image.size != resized:
        image = image.resize(resized, Image.Resampling.BILINEAR)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)  # halves go to the even
    return image.crop((left, top, left + width, top + height))


RESIZES: dict[str, Callable[[Image.Image, Size], Image.Image]] = {"square": square, "centre": centre}


def resize_rule(size: int) -> str:
    """The key of RESIZES by which training brings image files to a longer side of `size` pixels."""
    return "square" if size <= DECODED_SIZE else "centre"


def to_bytes(values: np.ndarray, limits: Limits | None) -> np.ndarray:
    """Numbers as uint8: `limits` become 0 and 255, in between rounded to nearest, beyond clipped; NaN is not allowed.

    Without limits, unsigned 16 bits keep their high byte, which is what 0 and 65535 come to.
    """
    if limits is None:
        return (values >> 8).astype(np.uint8)
    low, high = limits
    share = (values.astype(np.float64) - low) / (high - low)
    return np.rint(share.clip(0, 1) * 255).astype(np.uint8)


def read_image(path: str | os.PathLike[str], reading: Reading = Reading()) -> Image.Image | str:  # noqa: B008
    """The file as `reading` says, in the mode of its channels, or what is wrong with it: the end of `<path> ...`."""
    try:
        if os.path.getsize(path) == 0:
            return "has zero bytes"
        with Image.open(path) as image:
            image.load()
            turn = reading.turn(image)
            found = _eight_bits(image, reading.limits)
            return found if isinstance(found, str) else turned(reading.colours(found), turn)
    except UnidentifiedImageError:
        return "is not an image that can be recognised"
    except Image.DecompressionBombError:
        return f"is too large: more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels. Scale it down first"
    except MemoryError:
        return "is too large for the memory there is"
    except Exception as error:  # Why: on damaged bytes the decoders raise errors of many types
        if isinstance(error, OSError) and error.strerror:
            return f"cannot be read ({error.strerror})"
        return f"is truncated or damaged ({error})"


def _eight_bits(image: Image.Image, limits: Limits | None) -> Image.Image | str:
    """A decoded image with 8 bits a value, or what is wrong with it."""
    deep = image.mode.startswith("I;16")  # Why not convert(): it may clip 16-bit values at 255 instead of scaling
    if not deep and image.mode not in ("I", "F"):
        if limits is None:
            return image
        return f"has 8 bits a value (mode {image.mode}), where data.range is for files of 16, 32 bits or floats"
    if limits is None and not deep:
        return f"has 32-bit pixels (mode {image.mode}), expected 8 or 16 bits, or a stated data.range"
    values = np.asarray(image)
    if not np.isfinite(values).all():
        return "holds values that are not finite"
    return Image.fromarray(to_bytes(values, limits))


@cache
def image_endings() -> frozenset[str]:
    """File name endings that some Pillow decoder claims, such as `.jpg`."""
    endings = Image.registered_extensions()
    return frozenset(ending for ending, kind in endings.items() if kind in Image.OPEN)


def find_images(folder: str | os.PathLike[str]) -> list[str]:
    """The image files in a folder and below it, by their endings, in a fixed order; hidden ones do not count.

    Errors: DataError where there is no such folder, or no image in it.
    """
    if not os.path.isdir(folder):
        raise DataError(f"images: got {folder}, expected a folder of image files.")
    endings, found = image_endings(), []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = sorted(name for name in files if not name.startswith("."))
        found += [os.path.join(place, name) for name in names if os.path.splitext(name)[1].lower() in endings]
    if not found:
        raise DataError(f"images: the folder {folder} holds no image file.")
    return found


def load_image(
    path: str | os.PathLike[str],
    image_size: Size,
    channels: int,
    resize: str,
    *,
    orientation: str = "exif",
    limits: Limits | None = None,
) -> np.ndarray:
    """The pixels of an image file as a network takes them: uint8 [H, W, C], C = 1 (grey), 3 (RGB) or 4 (RGBA).

    `image_size`: (height, width). `resize`: a key of RESIZES. The rest as in `Reading`; of a packed model all of it
    follows from its metadata (`reading_of`). A BnnfreeWarning says that a file of 16 bits is nearly black.
    Errors: DataError for a file that is no whole image and for other numbers of channels, UnknownNameError
    for a resize in no table.
    """
    scale = pick(RESIZES, resize, "resize")
    stated = {"orientation": orientation} | ({} if limits is None else {"range": limits})
    reading = reading_of(stated, channels, f"image {path}")
    image = read_image(path, reading)
    if isinstance(image, str):
        raise DataError(f"image {path} {image}.")
    pixels = np.asarray(scale(image, image_size)).reshape(*image_size, channels)
    if limits is None and pixels.max() < NARROW // 4 and _is_deep(path):
        message = (
            f"an image of 16 bits is nearly black: its values are below {NARROW // 4 * 256} of 65535."
            " With a stated range (data.range in training, limits here) they fill the scale."
        )
        warnings.warn(message, BnnfreeWarning, stacklevel=2)
    return pixels


def _is_deep(path: str | os.PathLike[str]) -> bool:
    with Image.open(path) as image:
        return image.mode.startswith("I;16")
