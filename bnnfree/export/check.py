"""The last step of an export: does the packed model compute what the network does? Imports numpy and its own room.

Three images of the statistics that the file names go through the network with its 8-bit ends and through every
engine backend, layer by layer (`bnnfree.export.verify`). Ties count as equal: bits whose value lies so near its
threshold that rounding decides, of which an untrained network has many.
"""

from __future__ import annotations

import numpy as np

from bnnfree.export.errors import ExportError
from bnnfree.export.packed import Packed
from bnnfree.export.verify import verify
from bnnfree.format import from_bytes, to_bytes
from bnnfree.format.text import split_numbers

IMAGES = 3


def check_packed(packed: Packed) -> None:
    """Errors: ExportError that names the first activation which is not the network's."""
    model = from_bytes(to_bytes(packed.model))
    report = verify(packed, model, likely_images(packed), agreement=0.0, layer_images=IMAGES)
    if report.first_difference is not None:
        raise ExportError(
            f"export: the packed model differs from the network at {report.first_difference}, beyond what rounding "
            "explains, so nothing was written. This is a fault of the exporter: please report the network. "
            "check=False (--no-check) writes the file all the same."
        )


def likely_images(packed: Packed) -> np.ndarray:
    """Random pixels of the mean and deviation that the network was trained for. Shapes: uint8 [IMAGES, H, W, C]."""
    random, metadata = np.random.RandomState(0), packed.model.metadata  # Why: its stream is frozen for ever
    mean, std = (np.array(split_numbers(metadata[key], key)) for key in ("mean", "std"))
    pixels = random.standard_normal((IMAGES, *packed.model.image_shape)) * std + mean
    return np.rint(255 * pixels.clip(0, 1)).astype(np.uint8)
