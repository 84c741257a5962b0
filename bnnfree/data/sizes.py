"""Sizes of images as recipes give them. Imports nothing, so that reading a recipe is quick."""

from __future__ import annotations

from collections.abc import Sequence

Size = tuple[int, int]  # height, width


def size_of(image_size: int | Sequence[int] | None) -> Size | None:
    """(height, width) of a recipe's `image_size`, where an int is a square's side."""
    if image_size is None:
        return None
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return height, width
