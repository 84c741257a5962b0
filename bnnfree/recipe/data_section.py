"""The `data` section of a recipe's schema, and what all sections are made of.

Imports pydantic, bnnfree.errors and names.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from bnnfree import errors
from bnnfree.names import AUGMENTS, CHANNELS, DATASETS, FILE_DATASETS

MOST = 1_000_000_000  # of what is counted: images, steps
MOST_PIXELS = 2**33  # values of the fake images, which are all in memory


def one_of(table, kind: type = str):
    """A string (or another `kind`) that is a key of `table`."""

    def check(value):
        if value not in table:
            names = [str(name) for name in table]
            message = f"got {value!r}, expected one of {', '.join(names)}.{errors.nearest(value, names)}"
            raise PydanticCustomError("unknown_name", "{message}", {"message": message})
        return value

    return Annotated[kind, AfterValidator(check)]


def contradiction(message: str) -> PydanticCustomError:
    return PydanticCustomError("contradiction", "{message}", {"message": message})


def _image_size(value: Any) -> Any:
    """A side, or [height, width]."""
    sides = value if isinstance(value, list) and len(value) == 2 else [value]
    if not all(type(side) is int and 4 <= side <= 8192 for side in sides):
        message = f"got {value!r}, expected a side of 4 to 8192 pixels, or [height, width]."
        raise PydanticCustomError("image_size", "{message}", {"message": message})
    return value


ImageSize = Annotated[int | list[int], BeforeValidator(_image_size)]


class Part(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


class DataRecipe(Part):
    """The data to train on."""

    name: one_of(DATASETS)  # type: ignore[valid-type]
    """data set: digits | cifar10 | cifar100 | imagenet | image_folder | shards | arrays | fake"""
    root: str | None = None
    """folder of the files; arrays: or a .npz; shards: folder or URL with an index, or FOLDER/train-{000..127}.tar"""
    test_root: str | None = None
    """shards, where root is a pattern: the pattern of the test images"""
    val_root: str | None = None
    """shards, where root is a pattern: the pattern of the validation images; null: val_fraction"""
    batch_size: int = Field(default=128, ge=1, le=MOST)
    """samples per forward pass, over all processes together"""
    image_size: ImageSize | None = None
    """side of the images, or [height, width], pixels; null: the data set's own (files: median up to 64, or 224)"""
    augment: list[one_of(AUGMENTS)] = Field(default=[], max_length=100)  # type: ignore[valid-type]
    """in order: flip | crop | shift | color_jitter | randaugment | trivialaugment | random_erasing; mixup | cutmix"""
    mix_alpha: float = Field(default=1.0, gt=0, le=100)
    """mixup, cutmix: the share of an image, beside its neighbour's, is drawn from Beta(mix_alpha, mix_alpha)"""
    burst: int = Field(default=1, ge=1, le=MOST)
    """training images of one class that come in a row, as from a camera; 1: shuffled"""
    train_limit: int | None = Field(default=None, ge=1, le=MOST)
    """training images to use, the same share of each class, validation included; null: all"""
    test_limit: int | None = Field(default=None, ge=1, le=MOST)
    """test images to use, likewise; null: all"""
    val_fraction: float = Field(default=0.1, ge=0, lt=1)
    """share of the training images held out to choose the best epoch"""
    download: bool = False
    """fetch cifar10 / cifar100 into root when it is not there"""
    bad_images: Literal["error", "skip"] = "error"
    """what to do with files that are no whole images: stop, or skip and count them"""
    workers: int = Field(default=2, ge=0, le=1024)
    """processes that read large images"""
    cache: str | None = None
    """folder for decoded small images and fetched shards; null: bnnfree in the user's cache folder"""
    cache_gb: float | None = Field(default=None, gt=0, le=1e9)
    """shards at a URL: about so many GB of fetched ones are kept, the last used; null: all"""
    samples: int = Field(default=512, ge=8, le=MOST)
    """size of the fake data set"""
    classes: int = Field(default=10, ge=2, le=1_000_000)
    """classes of the fake data set, and of shards without an index"""
    channels: int = Field(default=3, ge=1, le=1024)
    """channels of the fake data set; what image files become: 1 (grey) | 3 (RGB) | 4 (RGBA)"""
    orientation: Literal["exif", "stored"] = "exif"
    """image files: upright as the camera noted (exif), or as their rows lie (stored)"""
    range: list[float] | None = None
    """[low, high]: values of arrays, and of files of more than 8 bits, that become 0 and 255; null: 16 bits' own"""
    test_fraction: float | None = Field(default=None, gt=0, lt=1)
    """image_folder, arrays: share of each class to test on, where there are no test images; null: there are"""

    @model_validator(mode="before")
    @classmethod
    def _of_before_orientation(cls, values: Any) -> Any:
        """Stored recipes hold every key; those of before `orientation` read files as their rows lie."""
        if isinstance(values, dict) and values.get("name") in FILE_DATASETS and "orientation" not in values:
            if {"samples", "classes", "channels", "bad_images", "val_fraction"} <= set(values):
                return {**values, "orientation": "stored"}
        return values

    @model_validator(mode="after")
    def _sizes_and_ranges(self) -> DataRecipe:
        if self.range is not None and not (len(self.range) == 2 and self.range[0] < self.range[1]):
            raise contradiction(f"data.range: got {self.range}, expected [low, high], low below high")
        if self.name in FILE_DATASETS and self.channels not in CHANNELS:
            modes = "1 (grey), 3 (RGB) or 4 (RGBA); other bands come as data.name=arrays"
            raise contradiction(f"data.channels: got {self.channels} of image files, expected {modes}")
        return self
