"""Data sets: what is read is what the files hold, the cache never lies, and bad input is named.

Images are made with Pillow in a temporary folder; nothing is fetched. Must not import models or recipes.
"""

from __future__ import annotations

import os
import pickle
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from bnnfree.data import datasets, folder
from bnnfree.data.datasets import carve, describe, load_data, thin
from bnnfree.errors import BnnfreeWarning, DataError, UnknownNameError

SEED = 7


@pytest.fixture(autouse=True)
def one_thread():
    """Keep the tests from competing with each other for cores."""
    torch.set_num_threads(1)


def options(**changes):
    """The options of a recipe, for a fake data set unless `changes` say otherwise."""
    values = dict(
        name="fake",
        root=None,
        test_root=None,
        val_root=None,
        image_size=None,
        train_limit=None,
        test_limit=None,
        val_fraction=0.0,
        burst=1,
        augment=["crop", "flip"],
        mix_alpha=1.0,
        bad_images="error",
        workers=0,
        download=False,
        cache=None,
        cache_gb=None,
        samples=300,
        classes=3,
        channels=3,
        orientation="exif",
        range=None,
        test_fraction=None,
    )
    return SimpleNamespace(**(values | changes))


def write_tree(root, parts=("train", "test"), classes=("ant", "bee"), count=3, size=(9, 9), ending="png"):
    """Random images root/<part>/<class>/<number>.<ending>; `size` is (width, height)."""
    random = np.random.RandomState(SEED)
    for part in parts:
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.randint(0, 256, (size[1], size[0], 3), np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.{ending}")
    return root


@pytest.fixture
def tree(tmp_path):
    """Options for a tree of 3 images of 9x9 in each of 2 classes; its folders are `root` and `cache`."""
    root = write_tree(tmp_path / "root")
    return options(name="image_folder", root=str(root), cache=str(tmp_path / "cache"), augment=[])


# ---- data sets


def test_digits_are_1797_grey_images_of_ten_classes():
    loaded = load_data(options(name="digits", augment=["shift"], val_fraction=0.1))
    assert (loaded.channels, loaded.image_size, loaded.classes) == (1, (16, 16), [str(d) for d in range(10)])
    assert len(loaded.train) + len(loaded.val) + len(loaded.test) == 1797
    assert abs(len(loaded.test) - 0.2 * 1797) < 10
    for part in (loaded.train, loaded.val, loaded.test):
        assert part.pixels.shape[1:] == (16, 16, 1) and part.labels.unique().tolist() == list(range(10))
    assert load_data(options(name="digits", image_size=9, augment=[])).train.pixels.shape[1:] == (9, 9, 1)


@pytest.mark.parametrize("channels, classes, size", [(1, 1, 1), (3, 5, 7), (4, 10, 32)])
def test_fake_is_repeatable_and_learnable(channels, classes, size):
    asked = options(channels=channels, classes=classes, image_size=size, samples=60)
    loaded, again = load_data(asked), load_data(asked)
    assert torch.equal(loaded.train.pixels, again.train.pixels)
    assert loaded.train.pixels.shape == (60, size, size, channels) and len(loaded.classes) == classes
    if size > 1:
        centres = torch.stack([loaded.train.pixels[loaded.train.labels == c].float().mean(0) for c in range(classes)])
        distances = torch.cdist(loaded.test.pixels.float().flatten(1), centres.flatten(1))
        assert (distances.argmin(1) == loaded.test.labels).float().mean() > 0.95


def test_validation_is_a_fixed_stratified_part_of_train():
    labels = np.repeat(np.arange(4), [1, 2, 10, 101])
    (kept, kept_labels), (held, held_labels) = carve(np.arange(len(labels)), labels, 0.1)
    assert np.bincount(held_labels, minlength=4).tolist() == [0, 1, 1, 10]
    assert sorted([*kept, *held]) == list(range(len(labels)))
    assert np.array_equal(labels[kept], kept_labels) and np.array_equal(labels[held], held_labels)
    assert np.array_equal(held, carve(np.arange(len(labels)), labels, 0.1)[1][0])
    assert load_data(options(val_fraction=0.0)).val is None


def test_a_limit_keeps_the_share_of_each_class_and_what_a_smaller_one_keeps():
    labels = np.random.RandomState(SEED).permutation(np.repeat(np.arange(3), [10, 40, 151]))
    before: set[int] = set()
    for limit in (21, 67, 200, 201, 500):
        kept, kept_labels = thin(np.arange(len(labels)), labels, limit, "data: train_limit")
        assert len(kept) == min(limit, len(labels)) and np.array_equal(labels[kept], kept_labels)
        assert (np.diff(kept) > 0).all(), "in the old order"
        shares = np.bincount(kept_labels) / np.bincount(labels)
        assert np.ptp(shares * np.bincount(labels) - len(kept) * np.bincount(labels) / len(labels)) < 1.5
        assert before <= set(kept)
        before = set(kept)
    with pytest.raises(DataError, match=r"data: train_limit: got 3, .*no image of class 0"):
        thin(np.arange(len(labels)), labels, 3, "data: train_limit")


def test_limits_come_before_validation_and_leave_the_rest_alone():
    whole, less = load_data(options()), load_data(options(train_limit=97, test_limit=19, val_fraction=0.2))
    assert len(less.train) + len(less.val) == 97 and len(less.test) == 19
    assert len(whole.train) == 300 and len(load_data(options(train_limit=97)).test) == len(whole.test)
    assert describe(options(train_limit=97))["samples"] == 97
    assert describe(options(train_limit=3000))["samples"] == 300


def test_val_folder_tests_when_alone_and_validates_beside_test(tmp_path):
    two = write_tree(tmp_path / "two", parts=("train", "val"))
    three = write_tree(tmp_path / "three", parts=("train", "val", "test"), count=4)
    common = dict(name="image_folder", cache=str(tmp_path / "cache"), val_fraction=0.3, augment=[])
    alone, beside = (load_data(options(root=str(root), **common)) for root in (two, three))
    assert (len(alone.train), len(alone.val), len(alone.test)) == (4, 2, 6)
    assert (len(beside.train), len(beside.val), len(beside.test)) == (8, 8, 8)


@pytest.mark.parametrize("size", [None, 16])
def test_cifar_is_read_from_its_archive(tmp_path, monkeypatch, size):
    random = np.random.RandomState(SEED)
    place = tmp_path / "cifar-10-batches-py"
    place.mkdir()
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    rows = {name: random.randint(0, 256, (10, 3072)).astype(np.uint8) for name in names}
    for name, pixels in rows.items():
        (place / name).write_bytes(pickle.dumps({"data": pixels, "labels": list(range(10))}))
    (place / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *given: True)
    loaded = load_data(options(name="cifar10", root=str(tmp_path), image_size=size, val_fraction=0.2))
    assert (len(loaded.train), len(loaded.val), len(loaded.test)) == (40, 10, 10)
    assert loaded.classes == list("abcdefghij") and tuple(loaded.mean) == datasets.CIFAR10[0]
    expected = torch.from_numpy(rows["test_batch"].reshape(10, 3, 32, 32)).permute(0, 2, 3, 1)
    assert loaded.test.pixels.shape[1:] == (size or 32, size or 32, 3)
    assert size or torch.equal(loaded.test.pixels, expected)


def test_imagenet_is_a_folder_with_known_statistics(tmp_path):
    root = write_tree(tmp_path / "root", parts=("train", "val"), count=2)
    loaded = load_data(options(name="imagenet", root=str(root)))
    assert loaded.image_size == (224, 224) and tuple(loaded.mean) == datasets.IMAGENET[0]
    assert next(loaded.test.batches(4))[0].shape == (4, 3, 224, 224)


def test_files_in_folders_of_a_class_are_listed_at_any_depth(tree):
    place = os.path.join(tree.root, "train", "bee")
    os.makedirs(os.path.join(place, "deep", "er"))
    os.rename(os.path.join(place, "2.png"), os.path.join(place, "deep", "er", "2.png"))
    listed = folder.list_tree(tree.root + os.sep, "data").parts["train"]
    assert listed[0][3:] == [
        os.path.join(place, name) for name in ("0.png", "1.png", os.path.join("deep", "er", "2.png"))
    ]
    assert listed[1] == [0, 0, 0, 1, 1, 1] and len(load_data(tree).train) == 6


def test_folder_images_are_those_of_the_files_in_class_order(tree):
    loaded = load_data(tree)
    assert loaded.classes == ["ant", "bee"] and loaded.image_size == (9, 9) and loaded.channels == 3
    for index, (name, number) in enumerate((n, i) for n in ("ant", "bee") for i in range(3)):
        with Image.open(os.path.join(tree.root, "test", name, f"{number}.png")) as image:
            assert np.array_equal(np.asarray(image), loaded.test.pixels[index].numpy())
        assert loaded.test.labels[index] == index // 3


def test_every_pixel_format_becomes_rgb(tree):
    ramp = np.arange(81, dtype=np.uint8).reshape(9, 9) * 3
    colour = np.stack([ramp, 255 - ramp, ramp // 2], 2)
    place = os.path.join(tree.root, "test", "ant")
    grey = np.repeat(ramp[..., None], 3, 2)
    palette = Image.fromarray(colour).quantize(256)
    cases = {
        "a-grey.png": (Image.fromarray(ramp), grey),
        "b-grey16.png": (Image.fromarray(ramp.astype(np.uint16) * 256 + 77), grey),
        "c-rgba.png": (Image.fromarray(np.dstack([colour, ramp])), colour),
        "d-palette.png": (palette, np.asarray(palette.convert("RGB"))),
        "e-clear.gif": (palette, np.asarray(palette.convert("RGB"))),
        "f-LA.png": (Image.fromarray(ramp).convert("LA"), grey),
    }
    for number in range(3):
        os.unlink(os.path.join(place, f"{number}.png"))
    for name, (image, _) in cases.items():
        image.save(os.path.join(place, name), **({"transparency": 0} if "clear" in name else {}))
    loaded = load_data(tree)
    for index, (name, (_, expected)) in enumerate(cases.items()):
        assert np.array_equal(loaded.test.pixels[index].numpy(), expected), name


@pytest.mark.parametrize("size", [(40, 12), (12, 40), (13, 12), (5, 7)])
def test_other_sizes_are_scaled_and_cropped_to_the_centre(tree, size):
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    pixels[top : top + side, left : left + side] = 200
    Image.fromarray(pixels).save(os.path.join(tree.root, "train", "bee", "other.png"))
    tree.image_size = 9
    centre = load_data(tree).train.pixels[-1]
    assert centre.shape == (9, 9, 3) and (centre[2:-2, 2:-2] == 200).all()


# ---- the cache of decoded images


def counting_decodes(monkeypatch):
    calls = []
    original = folder.decode
    monkeypatch.setattr(folder, "decode", lambda *given: calls.append(1) or original(*given))
    return calls


def test_cache_is_used_the_second_time_and_follows_the_files(tree, monkeypatch):
    calls = counting_decodes(monkeypatch)
    before = sorted(os.walk(tree.root))
    first = load_data(tree).train.pixels
    assert torch.equal(first, load_data(tree).train.pixels) and len(calls) == 1
    assert sorted(os.walk(tree.root)) == before and len(os.listdir(tree.cache)) == 1
    changed = os.path.join(tree.root, "train", "ant", "0.png")
    Image.fromarray(np.full((9, 9, 3), 200, np.uint8)).save(changed)
    assert (load_data(tree).train.pixels[0] == 200).all() and len(calls) == 2
    os.utime(changed, ns=(1, 1))
    load_data(tree)
    tree.image_size = 8
    load_data(tree)
    assert len(calls) == 4


@pytest.mark.parametrize("damage", [b"", b"no archive", 400])
def test_damaged_cache_is_rebuilt_with_a_warning(tree, damage, monkeypatch):
    expected = load_data(tree).train.pixels
    calls = counting_decodes(monkeypatch)
    (name,) = os.listdir(tree.cache)
    path = os.path.join(tree.cache, name)
    with open(path, "rb") as file:
        whole = file.read()
    with open(path, "wb") as file:
        file.write(whole[:damage] if isinstance(damage, int) else damage)
    with pytest.warns(BnnfreeWarning, match="decoding the images again"):
        assert torch.equal(load_data(tree).train.pixels, expected)
    assert torch.equal(load_data(tree).train.pixels, expected) and len(calls) == 1


def test_unwritable_cache_folder_is_a_warning(tree, tmp_path):
    (tmp_path / "file").write_text("in the way")
    tree.cache = str(tmp_path / "file")
    with pytest.warns(BnnfreeWarning, match="cannot be written"):
        assert len(load_data(tree).train) == 6


def test_cache_folder_is_the_users_unless_named(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    tree.cache = None
    load_data(tree)
    assert len(os.listdir(tmp_path / "xdg" / "bnnfree")) == 1


# ---- bad input


def spoil(path, how):
    """Damage one image file."""
    with open(path, "rb") as file:
        whole = file.read()
    with open(path, "wb") as file:
        file.write({"zero": b"", "text": b"hello", "cut": whole[: len(whole) // 2]}[how])


@pytest.mark.parametrize(
    "how, said", [("zero", "has zero bytes"), ("text", "is not an image"), ("cut", "is truncated or damaged")]
)
def test_bad_images_are_named_or_skipped_and_counted(tree, how, said, monkeypatch):
    spoil(os.path.join(tree.root, "train", "bee", "1.png"), how)
    with pytest.raises(DataError, match=rf"1\.png {said}.*data\.bad_images=skip"):
        load_data(tree)
    tree.bad_images = "skip"
    for _ in ("decoded", "from the cache"):
        with pytest.warns(BnnfreeWarning, match=r"1 bad images skipped: .*1\.png$"):
            loaded = load_data(tree)
        assert loaded.skipped == 1 and loaded.train.labels.tolist() == [0, 0, 0, 1, 1]
    tree.bad_images = "error"
    with pytest.raises(DataError, match=said):
        load_data(tree)


def test_other_files_are_bad_images_unless_hidden_or_sidecars(tree):
    place = os.path.join(tree.root, "train", "ant")
    for name in (".DS_Store", "Thumbs.db", ".hidden.png"):
        open(os.path.join(place, name), "w").close()
    os.mkdir(os.path.join(tree.root, "train", ".git"))
    assert len(load_data(tree).train) == 6
    open(os.path.join(place, "notes.txt"), "w").close()
    with pytest.raises(DataError, match=r"notes\.txt is not an image file"):
        load_data(tree)
    os.rename(os.path.join(place, "notes.txt"), os.path.join(tree.root, "train", "stray.png"))
    with pytest.raises(DataError, match=r"stray\.png lies outside the class folders"):
        load_data(tree)


def test_link_to_nowhere_is_a_bad_image(tree):
    os.symlink("nowhere.png", os.path.join(tree.root, "test", "ant", "link.png"))
    with pytest.raises(DataError, match=r"link\.png cannot be read \(No such file"):
        load_data(tree)


def test_skipping_reports_three_names_of_many(tree):
    for number in range(5):
        open(os.path.join(tree.root, "train", "ant", f"x{number}.txt"), "w").close()
    tree.bad_images = "skip"
    with pytest.warns(BnnfreeWarning, match=r"5 bad images skipped: .*x0.*x1.*x2\.txt, \.\.\.$"):
        assert load_data(tree).skipped == 5


def test_class_of_which_nothing_can_be_read_is_an_error(tree):
    for number in range(3):
        spoil(os.path.join(tree.root, "train", "bee", f"{number}.png"), "zero")
    tree.bad_images = "skip"
    with pytest.warns(BnnfreeWarning), pytest.raises(DataError, match="class 'bee' of the train split"):
        load_data(tree)


def rename(old, new):
    return lambda root: os.rename(root / old, root / new)


def empty_class(root):
    (root / "train" / "cow").mkdir()
    (root / "test" / "cow").mkdir()


def only_loose_images(root):
    for name in ("ant", "bee"):
        for number in range(3):
            os.rename(root / "train" / name / f"{number}.png", root / "train" / f"{name}{number}.png")
        os.rmdir(root / "train" / name)


@pytest.mark.parametrize(
    "change, said",
    [
        (rename("", "../rot"), r"root: got '.*root', which does not exist.*Did you mean '.*/rot'\?"),
        (rename("train", "trian"), r"no folder 'train' in .*got 'test', 'trian'.*Did you mean '.*/trian'\?"),
        (rename("test", "tset"), r"no folder 'test' .*expected train/ and test/ \(or val/\).*mean '.*/tset'\?"),
        (rename("test/bee", "test/bees"), r"'bee' missing, 'bees' only here.*Did you mean 'bee'\?"),
        (empty_class, r"class folder .*cow has no images: got 0 other files"),
        (only_loose_images, r"train has no class folders"),
    ],
)
def test_wrong_folders_are_named_with_what_was_expected(tree, tmp_path, change, said):
    change(tmp_path / "root")
    with pytest.raises(DataError, match=f"^data in x.yaml: .*{said}"):
        load_data(tree, where="data in x.yaml")


def test_root_must_be_a_folder(tree, tmp_path):
    tree.root = None
    with pytest.raises(DataError, match="root: got None, expected the folder"):
        load_data(tree)
    tree.root = str(tmp_path / "root" / "train" / "ant" / "0.png")
    with pytest.raises(DataError, match="which is a file, expected a folder"):
        load_data(tree)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_cifar_says_what_was_looked_for(tmp_path, name):
    with pytest.raises(DataError, match=r"no undamaged folder 'cifar-10.*data\.download=true.*image_folder"):
        load_data(options(name=name, root=str(tmp_path)))
    with pytest.raises(DataError, match="root: got None"):
        load_data(options(name=name, download=True))


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(UnknownNameError, match=r"name: got 'cifar', expected one of digits.*mean 'cifar"):
        load_data(options(name="cifar"))
    with pytest.raises(UnknownNameError, match=r"augment: got 'flop'.*Did you mean 'flip'"):
        load_data(options(augment=["flop"]))


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5])
def test_val_fraction_must_leave_something_on_both_sides(fraction):
    with pytest.raises(DataError, match="expected 0 <= val_fraction < 1"):
        load_data(options(val_fraction=fraction))
    with pytest.raises(DataError, match="leaves no image to validate on"):
        load_data(options(val_fraction=0.5, samples=3, classes=3))


def test_fake_needs_a_sample_per_class():
    with pytest.raises(DataError, match="got 2 samples of 3 classes"):
        load_data(options(samples=2))


def test_unreadable_training_images_leave_no_size_to_choose(tree):
    tree.bad_images = "skip"
    for name in ("ant", "bee"):
        for number in range(3):
            spoil(os.path.join(tree.root, "train", name, f"{number}.png"), "text")
    with pytest.raises(DataError, match="none of the 6 training images can be read"):
        load_data(tree)


def test_loading_is_silent_where_nothing_is_wrong(tree):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_data(tree)
