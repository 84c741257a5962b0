"""How an image file becomes the uint8 pixels that a network takes; training and prediction both use it.

Images become 8-bit RGB: grey is repeated, palettes are looked up, transparency is dropped, 16-bit grey keeps
its high byte, the first frame of an animation counts and EXIF orientation is ignored.

To add a way of resizing: one function (image, (height, width)) -> image of that size and one line of RESIZES.

Imports numpy, PIL and bnnfree.errors; no torch, so that a packed network can be used without it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache

import numpy as np

from bnnfree.errors import DataError, lacking, pick

try:
    from PIL import Image, UnidentifiedImageError
except ModuleNotFoundError as _error:
    raise lacking(_error, "bnnfree.preprocess") from None

DECODED_SIZE = 64  # training decodes images up to this size once, by "square"; larger ones are streamed
CENTRE_SHARE = 0.875  # of the resized image, per side, is what "centre" keeps: 224 of 256 pixels

Size = tuple[int, int]  # height, width


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
    """The key of RESIZES by which training brings image files to `size` pixels a side."""
    return "square" if size <= DECODED_SIZE else "centre"


def read_image(path: str | os.PathLike[str]) -> Image.Image | str:
    """The file as an RGB image, or what is wrong with it as the end of the sentence `<path> ...`."""
    try:
        if os.path.getsize(path) == 0:
            return "has zero bytes"
        with Image.open(path) as image:
            image.load()
            if image.mode in ("I", "F"):
                return f"has 32-bit pixels (mode {image.mode}), expected 8 or 16 bits"
            if image.mode.startswith("I;16"):  # Why: convert() may clip 16-bit values at 255 instead of scaling
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            if "transparency" in image.info:  # Why: Pillow warns about a direct conversion; the colours are equal
                return image.convert("RGBA").convert("RGB")
            return image.convert("RGB")
    except UnidentifiedImageError:
        return "is not an image that can be recognised"
    except Exception as error:  # Why: on damaged bytes the decoders raise errors of many types
        if isinstance(error, OSError) and error.strerror:
            return f"cannot be read ({error.strerror})"
        return f"is truncated or damaged ({error})"


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


def load_image(path: str | os.PathLike[str], image_size: Size, channels: int, resize: str) -> np.ndarray:
    """The pixels of an image file as a network takes them: uint8 [H, W, C], C = 1 (grey) or 3 (RGB).

    `image_size`: (height, width). `resize`: a key of RESIZES. Grey is Pillow's 0.299 R + 0.587 G + 0.114 B.
    Errors: DataError for a file that is no whole image and for other numbers of channels, UnknownNameError
    for a resize in no table.
    """
    scale = pick(RESIZES, resize, "resize")
    if channels not in (1, 3):
        raise DataError(
            f"image {path}: got a network of {channels} channels, expected 1 (grey) or 3 (RGB): only those can"
            " come from image files."
        )
    image = read_image(path)
    if isinstance(image, str):
        raise DataError(f"image {path} {image}.")
    pixels = np.asarray(scale(image.convert("L") if channels == 1 else image, image_size))
    return pixels.reshape(*image_size, channels)
