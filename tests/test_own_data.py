"""Data that people have: phone pictures, 12-bit files, rectangles, other channels, arrays, folders of any kind."""

import os
import subprocess
import sys
import unicodedata
import warnings

import numpy as np
import pytest
import torch
from helpers import ROOT, train
from PIL import Image
from test_data import options, spoil, write_tree

from bnnfree.data.datasets import check_files, describe
from bnnfree.data.tar_index import write as write_shards
from bnnfree.engine import load
from bnnfree.errors import BnnfreeError, BnnfreeWarning, DataError
from bnnfree.export import pack_network
from bnnfree.format import read, write
from bnnfree.models import MODELS
from bnnfree.preprocess import TURNS, Reading, load_image, read_image, reading_of
from bnnfree.train import load_data, open_source
from bnnfree.train.networks import parse_recipe

BACK = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}  # the others undo themselves


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def noise(*shape, seed=0):
    return np.random.RandomState(seed).randint(0, 256, shape, np.uint8)


def pictures(folder, save, size, turns=(None,)):
    """Trees of train/ and test/, classes a and b; the image number i is stored as a camera turned by `turns[i]`."""
    for part in ("train", "test"):
        for label, name in enumerate("ab"):
            (folder / part / name).mkdir(parents=True)
            for number, turn in enumerate(turns):
                image = Image.fromarray(noise(*size, 3, seed=100 * label + number))
                save(image, folder / part / name / f"{number}", turn)


def camera(image, path, turn):
    exif = Image.Exif()
    if turn is not None:
        exif[0x0112] = turn
        image = image.transpose(BACK.get(turn, TURNS[turn]))
    image.save(f"{path}.png", exif=exif)


def upright(image, path, turn):
    image.save(f"{path}.png")


def pixels_of(loaded, part="test"):
    return torch.cat([images for images, _ in getattr(loaded, part).batches(4)])


# ---- orientation


@pytest.mark.parametrize("size", [None, 12, 65, [66, 80]])
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_cameras_turn_is_undone_alike_wherever_images_are_read(tmp_path, size, kind):
    if kind == "shards" and (size is None or size == 12):
        pytest.skip("shards are for large images")
    for name, save in (("turned", camera), ("upright", upright)):
        pictures(tmp_path / name, save, (21, 34), turns=(None, *TURNS))
        if kind == "shards":
            write_shards(str(tmp_path / name), tmp_path / f"{name}-shards")
    given = [
        options(
            name="image_folder" if kind == "folder" else "shards",
            root=str(tmp_path / (name if kind == "folder" else f"{name}-shards")),
            image_size=size,
            augment=[],
            cache=str(tmp_path / "cache"),
        )
        for name in ("turned", "upright")
    ]
    turned, plain = (pixels_of(load_data(each)) for each in given)
    assert torch.equal(turned, plain)
    given[0].orientation = "stored"
    assert not torch.equal(pixels_of(load_data(given[0])), plain)  # the cache keeps them apart


def test_a_turned_jpeg_is_turned_before_it_is_cropped(tmp_path):
    rows = np.linspace(0, 255, 400).astype(np.uint8)
    image = Image.fromarray(np.repeat(np.repeat(rows[:, None, None], 300, 1), 3, 2))  # dark above, light below
    exif = Image.Exif()
    exif[0x0112] = 6
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
        image.transpose(BACK[6]).save(tmp_path / part / "a" / "0.jpg", exif=exif, quality=95)
    loaded = load_data(options(name="image_folder", root=str(tmp_path), image_size=72, augment=["crop"]))
    for epoch in range(5):
        images, _ = next(loaded.train.train_batches(1, seed=0, epoch=epoch))
        assert (images[0, 0, -1] > images[0, 0, 0]).all() and images[0, 0].std(1).max() < 0.1


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_load_image_undoes_the_turn_and_damaged_exif_is_none(tmp_path):
    image = Image.fromarray(noise(20, 30, 3))
    for turn in TURNS:
        camera(image, tmp_path / str(turn), turn)
        assert np.array_equal(load_image(tmp_path / f"{turn}.png", (20, 30), 3, "square"), np.asarray(image))
        stored = load_image(tmp_path / f"{turn}.png", (20, 30), 3, "square", orientation="stored")
        assert not np.array_equal(stored, np.asarray(image))
    image.save(tmp_path / "bad.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert np.array_equal(np.asarray(read_image(tmp_path / "bad.png")), np.asarray(image))


def test_recipes_and_packed_files_of_before_read_as_they_did(tmp_path):
    tree = {"model": {"name": "reactnet20"}, "data": {"name": "image_folder", "root": "x"}, "stages": [{"epochs": 1}]}
    assert parse_recipe(tree, "new", MODELS).data.orientation == "exif"
    stored = parse_recipe(tree, "new", MODELS).model_dump()
    assert parse_recipe(stored, "stored", MODELS).data.orientation == "exif"
    for key in ("orientation", "range", "test_fraction"):
        del stored["data"][key]
    assert parse_recipe(stored, "of before", MODELS).data.orientation == "stored"
    assert reading_of({}, 3, "x") == Reading(3, "stored")
    for metadata, said in (
        ({"orientation": "up"}, "orientation: got 'up'"),
        ({"orientation": []}, "orientation: got"),
        ({"range": [3, 3]}, "range: got"),
        ({"range": "ab"}, "range: got"),
        ({"range": [0, float("inf")]}, "range: got"),
    ):
        with pytest.raises(DataError, match=said):
            reading_of(metadata, 3, "x.bnnf")


# ---- ranges


def deep(dtype, top, path, seed=0, size=(20, 20)):
    """A file whose values fill 0..top, and its pixels if top were 255."""
    values = np.random.RandomState(seed).randint(0, 256, size)
    Image.fromarray((values * (top / 255)).round().astype(dtype)).save(path)
    return values.astype(np.uint8)


@pytest.mark.parametrize(
    "dtype, top, ending", [(np.uint16, 4095, "png"), (np.uint16, 1023, "tif"), (np.int32, 70000, "tif")]
)
def test_a_stated_range_gives_the_picture_of_8_bits(tmp_path, dtype, top, ending):
    expected = deep(dtype, top, tmp_path / f"a.{ending}")
    found = load_image(tmp_path / f"a.{ending}", (20, 20), 1, "square", limits=(0, top))[..., 0]
    assert np.array_equal(found, expected)


def test_float_files_take_a_range_and_finite_values(tmp_path):
    values = np.linspace(-1, 1, 400, dtype=np.float32).reshape(20, 20)
    Image.fromarray(values).save(tmp_path / "a.tif")
    found = load_image(tmp_path / "a.tif", (20, 20), 1, "square", limits=(-1, 1))[..., 0]
    assert np.array_equal(found, np.rint((values.astype(float) + 1) / 2 * 255))
    with pytest.raises(DataError, match=r"32-bit pixels .*data\.range"):
        load_image(tmp_path / "a.tif", (20, 20), 1, "square")
    values[3, 3] = np.nan
    Image.fromarray(values).save(tmp_path / "nan.tif")
    with pytest.raises(DataError, match="not finite"):
        load_image(tmp_path / "nan.tif", (20, 20), 1, "square", limits=(-1, 1))
    upright(Image.fromarray(noise(9, 9, 3)), tmp_path / "eight", None)
    with pytest.raises(DataError, match="has 8 bits a value"):
        load_image(tmp_path / "eight.png", (20, 20), 1, "square", limits=(0, 4095))


def deep_tree(root, size=(20, 20), top=4095):
    for part in ("train", "test"):
        for label, name in enumerate("ab"):
            (root / part / name).mkdir(parents=True)
            for number in range(4):
                deep(np.uint16, top, root / part / name / f"{number}.png", seed=10 * label + number, size=size)
    return str(root)


@pytest.mark.parametrize("size", [None, 65])
def test_values_that_fill_a_small_part_of_16_bits_are_a_warning_and_a_range_mends_it(tmp_path, size):
    given = options(name="image_folder", root=deep_tree(tmp_path / "x"), image_size=size, cache=str(tmp_path / "c"))
    given.channels, given.augment = 1, []
    with pytest.warns(BnnfreeWarning, match=r"lie between 0 and 15 of 0\.\.255.*data\.range"):
        load_data(given)
    given.range = [0, 4095]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_data(given)
    assert 0.45 < loaded.mean[0] < 0.55 and len(loaded.std) == 1
    with pytest.warns(BnnfreeWarning, match="16 bits is nearly black"):
        load_image(tmp_path / "x" / "train" / "a" / "0.png", (20, 20), 1, "square")


def test_range_size_and_channels_go_from_training_to_predict(tmp_path, monkeypatch):
    """A rectangular grey network of 12-bit files sees in predict the pixels that it was trained on."""
    root = deep_tree(tmp_path / "x", size=(20, 28))
    data = ["name=image_folder", f"root={root}", "image_size=[20, 28]", "channels=1", "range=[0, 4095]"]
    data += ["val_fraction=0.25", "augment=[]", f"cache={tmp_path / 'c'}"]
    train(tmp_path / "run", *(f"data.{each}" for each in data))
    network = open_source(tmp_path / "run", MODELS)
    assert network.data["image_size"] == [20, 28] and network.data["channels"] == 1
    write(pack_network(network).model, tmp_path / "x.bnnf")
    engine = load(tmp_path / "x.bnnf")
    assert engine.model.metadata["range"] == "0.0 4095.0" and engine.model.metadata["orientation"] == "exif"
    from bnnfree.commands import predict

    seen = predict.reader(engine.model, "x.bnnf")(os.path.join(root, "test", "a", "0.png"))
    assert np.array_equal(seen, load_data(network.recipe.data).test.pixels[0].numpy())


# ---- sizes and channels


@pytest.mark.parametrize("size", [[9, 24], [70, 90], [96, 40]])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_rectangles_of_any_channels_are_read_as_predict_reads_them(tmp_path, size, channels):
    root = tmp_path / "x"
    for part in ("train", "test"):
        for label, name in enumerate("ab"):
            (root / part / name).mkdir(parents=True)
            Image.fromarray(noise(100, 120, 4, seed=label)).save(root / part / name / "0.png")
    given = options(name="image_folder", root=str(root), image_size=size, channels=channels, augment=["flip"])
    given.cache = str(tmp_path / "c")
    assert describe(given)["image_size"] == size and describe(given)["channels"] == channels
    loaded = load_data(given)
    assert loaded.image_size == tuple(size) and len(loaded.mean) == channels
    assert next(loaded.train.train_batches(2, seed=0, epoch=0))[0].shape == (2, channels, *size)
    resize = "square" if max(size) <= 64 else "centre"
    expected = load_image(root / "test" / "a" / "0.png", tuple(size), channels, resize) / 255
    found = pixels_of(loaded)[0].permute(1, 2, 0).numpy() * loaded.std + loaded.mean
    assert np.allclose(found, expected, atol=1e-5)
    half = [side // 2 for side in size]
    assert next(loaded.resized(half).train.batches(2))[0].shape == (2, channels, *half)


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["data.image_size=40x56"], "data.image_size: got '40x56', expected a side of 4 to 8192 pixels, or"),
        (["data.image_size=[40]"], r"data.image_size: got \[40\]"),
        (["data.image_size=[40, 2]"], r"data.image_size: got \[40, 2\]"),
        (["data.name=cifar10", "data.channels=1"], "data.channels"),
        (["data.name=image_folder", "data.channels=5"], "data.channels: got 5 of image files"),
        (["data.name=image_folder", "data.range=[2, 1]"], r"data.range: got \[2.0, 1.0\]"),
        (["data.range=[0, 1]"], "data.range"),
        (["data.test_fraction=0.2"], "data.test_fraction"),
        (["data.orientation=stored"], "data.orientation"),
    ],
)
def test_keys_that_cannot_be_meant_are_refused(overrides, said):
    tree = {"model": {"name": "reactnet20"}, "data": {"name": "digits"}, "stages": [{"epochs": 1}]}
    with pytest.raises(BnnfreeError, match=said):
        parse_recipe(tree, "recipe", MODELS, overrides)


def test_the_size_does_not_hang_on_one_file(tmp_path):
    root = write_tree(tmp_path / "x", count=5, size=(90, 80))
    for name in ("!first.png", "zlast.png"):
        Image.fromarray(noise(60, 128, 3)).save(root / "train" / "ant" / name)
    assert describe(options(name="image_folder", root=str(root)))["image_size"] == [224, 224]
    root = write_tree(tmp_path / "y", count=5, size=(40, 33))
    Image.fromarray(noise(600, 700, 3)).save(root / "train" / "ant" / "!first.png")
    given = options(name="image_folder", root=str(root), cache=str(tmp_path / "c"))
    assert describe(given)["image_size"] == [33, 33] and load_data(given).image_size == (33, 33)


# ---- arrays


def saved(folder, form, images, labels, test=True, **more):
    """Arrays with as many test images as given ones, as a folder or an archive; returns data.root."""
    named = {"train_images": images, "train_labels": labels}
    named |= {"test_images": images[::-1].copy(), "test_labels": labels[::-1].copy()} if test else {}
    named |= more
    folder.mkdir(exist_ok=True)
    if form == "npz":
        np.savez(folder / "all.npz", **named)
        return str(folder / "all.npz")
    for name, values in named.items():
        np.save(folder / f"{name}.npy", values)
    return str(folder)


LABELS = np.arange(12) % 3


@pytest.mark.parametrize("form", ["npy", "npz"])
@pytest.mark.parametrize("shape", [(12, 7, 5, 6), (12, 1, 40, 1), (12, 9, 11)])
def test_arrays_of_any_shape_and_type_become_the_engines_bytes(tmp_path, form, shape):
    pixels = noise(*shape)
    for number, (values, limits) in enumerate(
        (
            (pixels, None),
            (pixels.astype(np.uint16) * 257, None),
            (pixels.astype(np.int16) - 100, [-100, 155]),
            ((pixels / 255 * 3 - 1).astype(np.float32), [-1, 2]),
            (pixels.astype(">f8"), [0, 255]),
        )
    ):
        given = options(name="arrays", augment=[], range=limits)
        given.root = saved(tmp_path / str(number), form, values, LABELS.astype(np.int8))
        loaded = load_data(given)
        whole = pixels.reshape(*shape, 1) if len(shape) == 3 else pixels
        assert np.array_equal(loaded.train.pixels.numpy(), whole) and loaded.image_size == shape[1:3]
        assert np.array_equal(loaded.test.labels.numpy(), LABELS[::-1]) and loaded.classes[2] == "class2"
        assert np.allclose(loaded.mean, whole.mean((0, 1, 2)) / 255) and loaded.channels == whole.shape[3]
        told = describe(given)
        assert told["image_size"] == list(shape[1:3]) and told["samples"] == 12 and told["channels"] == loaded.channels


def test_arrays_have_names_and_are_split_by_the_same_images_every_time(tmp_path):
    pixels = noise(12, 6, 6, 2)
    given = options(name="arrays", root=saved(tmp_path / "x", "npy", pixels, LABELS, test=False), augment=[])
    (tmp_path / "x" / "classes.txt").write_text("yes\nno\nséance\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"test_images, test_labels missing.*data\.test_fraction"):
        load_data(given)
    given.test_fraction = 0.25
    first, second = load_data(given), load_data(given)
    assert first.classes == ["yes", "no", "séance"] and sorted(first.test.labels.tolist()) == [0, 1, 2]
    assert torch.equal(first.test.pixels, second.test.pixels) and len(first.train) == 9 == describe(given)["samples"]


def test_values_beyond_the_range_are_clipped_and_many_are_a_warning(tmp_path):
    values = np.linspace(-1, 2, 12 * 25).astype(np.float32).reshape(12, 5, 5, 1)
    given = options(name="arrays", root=saved(tmp_path / "x", "npy", values, LABELS), range=[0, 1], augment=[])
    with pytest.warns(BnnfreeWarning, match="67% of the values lie beyond data.range"):
        pixels = load_data(given).train.pixels
    assert pixels[0].max() == 0 and pixels[-1].min() == 255


GOOD = noise(12, 6, 6, 2)
NAN = np.where(np.arange(12)[:, None, None, None] == 7, np.nan, GOOD).astype(np.float32)


@pytest.mark.parametrize("form", ["npy", "npz"])
@pytest.mark.parametrize(
    "change, said",
    [
        ({"train_images": GOOD[:, 0, 0]}, r"got the shape \[12, 2\], expected \[N,H,W,C\]"),
        ({"train_images": GOOD[:0]}, "without a 0"),
        (
            {"train_images": GOOD.astype(float), "test_images": GOOD.astype(float)},
            r"range: got null for images of float64",
        ),
        ({"train_images": GOOD.astype(bool)}, "type bool, expected numbers"),
        ({"train_images": GOOD[:, :5]}, r"test_images: got uint8 \[6, 6, 2\]"),
        ({"train_images": np.array([None] * 12)}, "without pickle"),
        ({"train_labels": LABELS[:5]}, r"train_labels: got int64 \[5\], expected whole numbers \[12\]"),
        ({"train_labels": LABELS - 1}, "got -1 to 1, expected 0"),
        ({"train_labels": LABELS * 2.5}, "train_labels: got float64"),
        ({"train_labels": LABELS * 2}, "no image of class 1"),
        ({"train_labels": np.full(12, 2**40)}, "expected 0 to 999999"),
        ({"test_labels": LABELS + 1}, "test_labels: got class 3, expected 0 to 2"),
        ({"classes": np.array(["a", "b"])}, "got class 2, expected 0 to 1"),
        ({"classes": np.array(["a", "b\n", "c"])}, "class name: got"),
        ({"train_images": NAN, "test_images": NAN, "range": [0, 255]}, "train_images: image 7 holds values that are"),
    ],
)
def test_arrays_that_do_not_fit_are_one_line(tmp_path, form, change, said):
    limits = change.get("range")
    named = {"test_images": GOOD, "test_labels": LABELS} | {k: v for k, v in change.items() if k != "range"}
    first = {key: named.pop(key, good) for key, good in (("train_images", GOOD), ("train_labels", LABELS))}
    if form == "npz":
        root = tmp_path / "x.npz"
        np.savez(root, **first, **named)
    else:
        root = tmp_path
        for name, values in (first | named).items():
            np.save(tmp_path / f"{name}.npy", values)
    with pytest.raises(DataError, match=said) as caught:
        load_data(options(name="arrays", root=str(root), range=limits))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 5, 70, 300])
def test_torn_arrays_are_one_line(tmp_path, length):
    for name, root in (("train_images.npy", ""), ("all.npz", "all.npz")):
        folder = tmp_path / name
        saved(folder, "npz" if root else "npy", GOOD, LABELS)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:length])
        with pytest.raises(DataError, match=f"{name}: cannot be read as arrays"):
            load_data(options(name="arrays", root=str(folder / root)))


# ---- folders


def test_a_folder_of_classes_is_split_by_a_key(tmp_path):
    root = write_tree(tmp_path / "x", parts=("train",), count=10)
    given = options(name="image_folder", root=str(root), cache=str(tmp_path / "c"), augment=[])
    with pytest.raises(DataError, match=r"no folder 'test'.*data\.test_fraction=0\.2"):
        load_data(given)
    given.test_fraction = 0.2
    nested = load_data(given)
    given.root = str(root / "train")
    flat = load_data(given)
    assert (len(flat.train), len(flat.test)) == (16, 4) and flat.test.labels.tolist() == [0, 0, 1, 1]
    assert torch.equal(flat.test.pixels, nested.test.pixels) and describe(given)["samples"] == 16
    for name in ("test", "tset"):
        os.rename(root / "train" / "bee", root / name)
        given.root = str(root)
        with pytest.raises(DataError, match=f"test_fraction: got 0.2, where .* has .*'{name}'"):
            load_data(given)
        os.rename(root / name, root / "train" / "bee")


def test_a_test_folder_may_lack_a_class(tmp_path):
    root = write_tree(tmp_path / "x", classes=("ant", "bee", "cat"))
    os.rename(root / "test" / "bee", tmp_path / "bee")
    for number in range(3):
        os.unlink(root / "test" / "cat" / f"{number}.png")
    with pytest.warns(BnnfreeWarning, match="the test split has no image of 2 of 3 classes: 'bee', 'cat'"):
        loaded = load_data(options(name="image_folder", root=str(root), cache=str(tmp_path / "c")))
    assert loaded.classes == ["ant", "bee", "cat"] and loaded.test.labels.tolist() == [0, 0, 0]


def test_names_in_nfc_and_nfd_are_one_class(tmp_path):
    composed, apart = (unicodedata.normalize(form, "gräser é") for form in ("NFC", "NFD"))
    root = write_tree(tmp_path / "x", classes=("ant",))
    for part, name in (("train", composed), ("train", apart), ("test", apart)):
        (root / part / name).mkdir()
        Image.fromarray(noise(9, 9, 3)).save(root / part / name / "0.png")
    loaded = load_data(options(name="image_folder", root=str(root), cache=str(tmp_path / "c")))
    assert loaded.classes == ["ant", composed] and loaded.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert loaded.test.labels.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("name", [b"a\xff", b"a\nb", b"a\x1b]0;x\x07", b"a\xc2\x85b"])
def test_class_names_that_no_packed_file_holds_are_refused_at_once(tmp_path, name):
    root = write_tree(tmp_path / "x")
    for part in ("train", "test"):
        os.rename(root / part / "bee", os.path.join(os.fsencode(root / part), name))
    given = options(name="image_folder", root=str(root), cache=str(tmp_path / "c"))
    for look in (load_data, describe):
        with pytest.raises(DataError, match="class name: got .*without control characters") as caught:
            look(given)
        assert str(caught.value).isprintable() and not os.path.exists(given.cache)


def test_links_in_a_circle_are_one_line(tmp_path):
    root = write_tree(tmp_path / "x")
    os.symlink(root / "train", root / "train" / "bee" / "up")
    with pytest.raises(DataError, match="bee/up.* is a link to one that it lies in"):
        load_data(options(name="image_folder", root=str(root)))
    os.unlink(root / "train" / "bee" / "up")
    os.symlink("self", root / "train" / "bee" / "self")
    with pytest.raises(DataError, match="bee/self is not an image"):
        load_data(options(name="image_folder", root=str(root), cache=str(tmp_path / "c")))


@pytest.mark.parametrize("size", [None, 65])
def test_all_bad_files_are_named_at_once_and_in_a_dry_run(tmp_path, size):
    root = write_tree(tmp_path / "x")
    spoil(root / "train" / "ant" / "1.png", "zero")
    spoil(root / "test" / "bee" / "2.png", "text")
    (root / "train" / "notes.txt").write_text("x")
    given = options(name="image_folder", root=str(root), image_size=size, cache=str(tmp_path / "c"))
    with pytest.raises(
        DataError, match=r"3 bad images: .*notes\.txt .*1\.png has zero bytes; .*2\.png is not an image"
    ):
        load_data(given)
    command = [sys.executable, "tools/train.py", "recipes/cifar10_reactnet20.yaml", "--dry-run", f"data.root={root}"]
    size = [] if size is None else [f"data.image_size={size}"]
    ran = subprocess.run([*command, "data.name=image_folder", *size], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 2 and "3 bad images" in ran.stderr and len(ran.stderr.strip().splitlines()) == 1


def test_pictures_of_too_many_pixels_are_said_to_be_large(tmp_path, monkeypatch):
    Image.fromarray(noise(90, 90)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    assert read_image(tmp_path / "a.png") == "is too large: more than 8,000 pixels. Scale it down first"


def test_a_training_says_what_it_trains_on_before_it_starts(tmp_path):
    loaded = load_data(options(samples=40, val_fraction=0.25, image_size=[8, 12]))
    said = f"images 8x12x3, 3 classes (class0, class1, class2): {len(loaded.train)} to train on, {len(loaded.val)} to"
    assert loaded.describe() == f"{said} validate, 10 to test"


def test_packed_files_without_the_key_are_read_as_stored(tmp_path):
    model = read(ROOT / "models" / "pretrained" / "cifar10_reactnet18_half.bnnf")
    assert reading_of({k: v for k, v in model.metadata.items() if k != "orientation"}, 3, "x").orientation == "stored"


def test_a_dry_run_says_which_files_it_looked_at(tmp_path):
    root = write_tree(tmp_path / "x")
    given = options(name="image_folder", root=str(root), cache=str(tmp_path / "c"))
    count = sum(1 for _ in root.rglob("*.png"))
    said = check_files(given)
    assert said == f"files: the names of {count} and the heads of {count} were looked at; a training decodes all"
    assert check_files(options(name="imagenet", root="none")) == "files: not looked at"
    assert check_files(options()) == ""
