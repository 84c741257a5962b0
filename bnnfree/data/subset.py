"""Choice of the images that are held out or left out: the same ones for every seed.

Must not import torch, bnnfree.nn, models, export or engine.
"""

from __future__ import annotations

import numpy as np

from bnnfree.errors import DataError

SPLIT_SEED = 20  # carves validation (and digits' test) images; no recipe changes it


def carve(images: np.ndarray, labels: np.ndarray, fraction: float):
    """Split into ((images, labels) kept, (images, labels) held out), both in the old order.

    Of the n images of a class round(n * fraction) are held out, but at least one and at most n - 1.
    """
    counts = np.bincount(labels)
    held = np.minimum(np.maximum(np.rint(counts * fraction), 1), counts - 1)
    out = _places(labels) < held[labels]
    return (images[~out], labels[~out]), (images[out], labels[out])


def thin(images: np.ndarray, labels: np.ndarray, limit: int | None, where: str):
    """(images, labels) of `limit` images in the old order, each class by its share; all where there are no more.

    Which ones is the same for every seed, and a smaller limit's are among a larger one's. Errors: DataError where a
    class is left without an image.
    """
    if limit is None or limit >= len(labels):
        return images, labels
    counts = np.bincount(labels)
    share = (_places(labels) + 0.5) / counts[labels]  # of its class that comes before an image
    kept = np.sort(np.argsort(share, kind="stable")[:limit])
    lost = np.flatnonzero((np.bincount(labels[kept], minlength=len(counts)) == 0) & (counts > 0))
    if len(lost):
        raise DataError(f"{where}: got {limit}, which leaves no image of class {lost[0]}, expected some of each class.")
    return images[kept], labels[kept]


def _places(labels: np.ndarray) -> np.ndarray:
    """The number of each image within its class, from 0, in an order drawn at random, the same every time."""
    counts = np.bincount(labels)
    keys = np.random.RandomState(SPLIT_SEED).random_sample(len(labels))  # Why: its stream is frozen for ever
    order = np.lexsort((keys, labels))
    places = np.empty(len(labels), np.int64)
    places[order] = np.arange(len(labels)) - (np.cumsum(counts) - counts)[labels[order]]
    return places
