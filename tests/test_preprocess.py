"""From an image file to the pixels of a network: the same bits as torchvision, and every bad file named."""

import random

import numpy as np
import pytest
from PIL import Image

from bnnfree.errors import DataError, UnknownNameError
from bnnfree.preprocess import DECODED_SIZE, RESIZES, centre, load_image, read_image, resize_rule, square

SEED = 7


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A random image; the same for the same arguments."""
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.RandomState(width * 1009 + height).randint(0, 256, shape, np.uint8))


def shapes(count: int, largest: int):
    """Widths and heights: equal, nearly equal, tall, wide and tiny ones, and any."""
    draw = random.Random(SEED)
    for _ in range(count):
        width, height = draw.randint(1, largest), draw.randint(1, largest)
        yield from [(width, height), (width, width), (width, width + 1), (width + 1, width)]
        yield from [(draw.randint(1, 5), height), (width, draw.randint(1, 5))]


def test_centre_is_torchvisions_resize_and_crop_to_the_bit():
    from torchvision.transforms.v2 import functional

    draw = random.Random(SEED)
    upscaled = cropped_by_half = 0
    for width, height in shapes(60, 150):
        size = draw.choice([1, 2, 3, 4, 7, 16, 31, 32, 65, 77, 96])
        image = noise(width, height, draw.choice(["L", "RGB"]))
        resized = functional.resize(image, [round(size / 0.875)])
        expected = functional.center_crop(resized, [size, size])
        result = centre(image, (size, size))
        assert result.mode == image.mode
        assert np.array_equal(np.asarray(result), np.asarray(expected)), (width, height, size)
        upscaled += min(width, height) < size
        cropped_by_half += (max(resized.size) - size) % 2
    assert upscaled > 50 and cropped_by_half > 50


@pytest.mark.parametrize("shape", [(256, 256), (500, 375), (375, 500), (640, 427), (91, 2000), (5, 3)])
def test_centre_is_torchvisions_at_224(shape):
    from torchvision.transforms import v2

    expected = v2.CenterCrop(224)(v2.Resize(256)(noise(*shape)))
    assert np.array_equal(np.asarray(centre(noise(*shape), (224, 224))), np.asarray(expected))


def test_square_is_the_centre_square_scaled():
    for width, height in shapes(30, 90):
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        image = noise(width, height, "L")
        for size in (1, 9, 32):
            expected = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
            expected = image if image.size == (size, size) else expected
            assert np.array_equal(np.asarray(square(image, (size, size))), np.asarray(expected)), (width, height)


@pytest.mark.parametrize("name", list(RESIZES))
def test_any_shape_becomes_any_size(name):
    draw = random.Random(SEED)
    for width, height in shapes(30, 60):
        size = (draw.randint(1, 40), draw.randint(1, 40))
        result = RESIZES[name](noise(width, height), size)
        assert np.asarray(result).shape == (*size, 3)


@pytest.mark.parametrize("name", list(RESIZES))
@pytest.mark.parametrize("size", [(9, 21), (21, 9), (16, 17)])
def test_a_target_that_is_no_square_gets_the_middle_undistorted(name, size):
    """A ramp in x and y: what is left of it has its slope times the zoom and the same middle."""
    height, width = 90, 120
    ramp = 20 + np.arange(width)[None, :] + np.arange(height)[:, None]
    pixels = np.asarray(RESIZES[name](Image.fromarray(ramp.astype(np.uint8)), size)).astype(float)
    kept = (1, 1) if name == "square" else (round(size[0] / 0.875) / size[0], round(size[1] / 0.875) / size[1])
    step = min(height / (size[0] * kept[0]), width / (size[1] * kept[1]))  # pixels of the ramp to one of the result
    inside = pixels[2:-2, 2:-2]
    assert np.diff(inside, axis=0).mean() == pytest.approx(step, rel=0.1)
    assert np.diff(inside, axis=1).mean() == pytest.approx(step, rel=0.1)
    assert pixels.mean() == pytest.approx(ramp.mean(), abs=step)


def test_an_image_of_the_right_size_is_not_changed_by_square():
    image = noise(13, 7)
    assert square(image, (7, 13)) is image


@pytest.mark.parametrize("size", [4, 32, 64, 65, 224])
def test_the_rule_is_what_training_does(tmp_path, size):
    from test_data import options, write_tree

    from bnnfree.data.datasets import load_data

    root = write_tree(tmp_path / "root", count=1, size=(90, 71))
    given = options(name="image_folder", root=str(root), image_size=size, cache=str(tmp_path / "c"), augment=[])
    loaded = load_data(given)
    images, _ = next(loaded.test.batches(1))
    pixels = load_image(root / "test" / "ant" / "0.png", (size, size), 3, resize_rule(size))
    expected = (pixels / 255 - loaded.mean) / loaded.std
    assert np.allclose(images[0].permute(1, 2, 0).numpy(), expected, atol=1e-5)
    assert resize_rule(size) == ("square" if size <= DECODED_SIZE else "centre")


def test_grey_files_give_their_own_values_and_colours_their_luma(tmp_path):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "grey.png")
    one = load_image(tmp_path / "grey.png", (16, 16), 1, "square")
    assert one.dtype == np.uint8 and np.array_equal(one, values[..., None])
    assert np.array_equal(load_image(str(tmp_path / "grey.png"), (16, 16), 3, "square"), np.dstack([values] * 3))
    noise(9, 5).save(tmp_path / "colour.png")
    luma = load_image(tmp_path / "colour.png", (5, 9), 1, "square")[..., 0]
    assert np.abs(luma - np.asarray(noise(9, 5)) @ [0.299, 0.587, 0.114]).max() <= 1


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "has zero bytes"), (b"hello", "is not an image"), (None, r"cannot be read \(No such file"),
     ("cut", "is truncated or damaged")],
)  # fmt: skip
def test_an_unreadable_file_is_an_error_that_names_it(tmp_path, content, said):
    path = tmp_path / "x.png"
    if content == "cut":
        noise(40, 30).save(path)
        content = path.read_bytes()[:900]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"x\.png {said}"):
        load_image(path, (8, 8), 3, "centre")
    assert isinstance(read_image(str(path)), str)


def test_other_channels_and_other_names_are_refused(tmp_path):
    noise(5, 5).save(tmp_path / "x.png")
    for channels in (0, 2, 5):
        with pytest.raises(DataError, match=rf"x\.png: takes {channels} channels, expected 1 .* 3 .* or 4"):
            load_image(tmp_path / "x.png", (5, 5), channels, "square")
    with pytest.raises(UnknownNameError, match="resize: got 'center', expected one of square, centre.*'centre'"):
        load_image(tmp_path / "x.png", (5, 5), 3, "center")
