"""Batches and augmentation: what a sample is must not depend on how it is batched.

Must not import models or recipes.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import options, spoil, write_tree

from bnnfree.data import datasets, file_split, pixel_split
from bnnfree.data.datasets import load_data, measure
from bnnfree.errors import BnnfreeWarning, DataError, UnknownNameError
from bnnfree.preprocess import Reading, read_image

SEED = 7


@pytest.fixture(autouse=True)
def one_thread():
    """Keep the tests from competing with each other for cores."""
    torch.set_num_threads(1)


@pytest.fixture
def large(tmp_path):
    """Options for a tree of streamed images: 5 of 90x70 in each of 2 classes, read at 65 pixels."""
    root = write_tree(tmp_path / "root", count=5, size=(90, 70), ending="jpg")
    return options(name="image_folder", root=str(root), image_size=65, cache=str(tmp_path / "cache"))


def joined(batches):
    """All images and all labels of an iterator of batches."""
    pixels, labels = zip(*batches, strict=True)
    return torch.cat(pixels), torch.cat(labels)


def same(left, right):
    """True if two (images, labels) are equal to the last bit."""
    return torch.equal(left[0], right[0]) and torch.equal(left[1], right[1])


def sorted_rows(batch):
    """The samples of a batch in an order that does not depend on how they came."""
    rows = torch.cat([batch[0].flatten(1), batch[1][:, None]], 1).tolist()
    return sorted(rows)


# ---- what a sample is does not depend on how it is batched


@pytest.fixture(params=["pixels", "files"])
def split(request):
    """The training split of each kind, augmented: 300 samples in memory or 10 files."""
    if request.param == "pixels":
        return load_data(options(samples=301, image_size=11)).train
    return load_data(request.getfixturevalue("large")).train


def test_small_batches_in_a_row_hold_the_samples_of_a_large_one(split):
    small = len(split) // 10
    assert same(
        joined(split.train_batches(small, seed=SEED, epoch=3)),
        joined(split.train_batches(4 * small, seed=SEED, epoch=3)),
    )


def test_resuming_at_any_batch_yields_the_tail(split):
    size = len(split) // 4
    whole = list(split.train_batches(size, seed=SEED, epoch=1))
    assert len(whole) == split.train_steps(size)
    for start in range(len(whole)):
        tail = list(split.train_batches(size, seed=SEED, epoch=1, start=start))
        assert len(tail) == len(whole) - start
        assert all(same(left, right) for left, right in zip(tail, whole[start:], strict=True)), start
    assert list(split.train_batches(size, seed=SEED, epoch=1, start=len(whole))) == []


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_train_on_the_one_process_batches(split, world):
    size = len(split) // 2 - 1
    alone = list(split.train_batches(size, seed=SEED, epoch=0))[: split.train_steps(size, world)]
    ranks = [split.train_batches(size, seed=SEED, epoch=0, rank=rank, world=world) for rank in range(world)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert sorted_rows(joined(parts)) == sorted_rows(whole)
        lengths = [len(labels) for _, labels in parts]
        assert min(lengths) > 0 and max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_covers_every_sample_once(split, world):
    ranks = [joined(split.batches(7, rank=rank, world=world)) for rank in range(world)]
    assert sorted_rows(joined(ranks)) == sorted_rows(joined(split.batches(len(split))))
    assert sum(len(labels) for _, labels in ranks) == len(split)


def test_evaluation_keeps_the_order(split):
    assert same(joined(split.batches(4)), joined(split.batches(5)))
    assert torch.equal(joined(split.batches(4))[1], split.labels)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_spread_takes_images_at_equal_distances(split, count):
    pixel_split, labels = (torch.cat(each) for each in zip(*split.batches(4), strict=True))
    places = torch.arange(count) * len(split) // count
    found = split.spread(count)
    assert torch.equal(found[0], pixel_split[places]) and torch.equal(found[1], labels[places])
    assert len(split.spread(len(split) + 1)[1]) == len(split)


@pytest.mark.parametrize("length", [1, 2, 7, 10**6])
def test_bursts_are_runs_of_one_class_and_every_image_comes_once(split, length):
    split.burst = length
    _, labels = joined(split.train_batches(5, seed=SEED, epoch=1))
    counts = torch.bincount(split.labels)
    assert torch.equal(torch.bincount(labels), counts)
    starts = torch.cat([torch.tensor([True]), labels[1:] != labels[:-1]]).cumsum(0).bincount()[1:]
    if length == 1:
        return
    whole = sum(-(-int(count) // length) for count in counts)
    assert len(starts) <= whole and (length < 10**6 or sorted(starts.tolist()) == sorted(counts.tolist()))
    assert (starts % length != 0).sum() <= len(counts)
    others = [joined(split.train_batches(5, seed=SEED, epoch=epoch))[1] for epoch in range(2, 9)]
    assert any(not torch.equal(labels, other) for other in others)


def test_statistics_are_settled_on_batches_of_128_or_more(split):
    wanted = min(len(split), 130)
    sizes = [len(part) for part in split.settling_batches(wanted, 2, seed=SEED, epoch=0)]
    assert sizes == ([128, 128] if wanted == 130 else [wanted])
    assert [len(part) for part in split.settling_batches(7, 2, seed=SEED, epoch=0)] == [7]


def test_a_resized_split_is_the_same_images_scaled(split):
    size = 8 if isinstance(split, pixel_split.PixelSplit) else 33
    small = split.resized((size, size))
    pairs = zip(small.train_batches(5, seed=SEED, epoch=1), split.train_batches(5, seed=SEED, epoch=1), strict=True)
    for (scaled, labels), (whole, their_labels) in pairs:
        assert scaled.shape == (len(whole), 3, size, size) and torch.equal(labels, their_labels)
        torch.testing.assert_close(scaled.mean((2, 3)), whole.mean((2, 3)), rtol=0, atol=0.5)


def test_order_differs_by_epoch_and_by_seed_only(split):
    def pixels(seed, epoch):
        return joined(split.train_batches(10, seed=seed, epoch=epoch))[0]

    assert torch.equal(pixels(1, 2), pixels(1, 2))
    for seed, epoch in ((1, 3), (2, 2), (2, 1)):
        assert not torch.equal(pixels(1, 2), pixels(seed, epoch)), (seed, epoch)


def test_every_sample_comes_once_an_epoch():
    split = load_data(options(augment=[], samples=100, image_size=5)).train
    trained = joined(split.train_batches(7, seed=SEED, epoch=0))
    assert sorted_rows(trained) == sorted_rows(joined(split.batches(100)))


def test_global_random_state_is_untouched_and_unread(split):
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    first = joined(split.train_batches(8, seed=SEED, epoch=0))
    joined(split.batches(8))
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    torch.manual_seed(99)
    assert same(first, joined(split.train_batches(8, seed=SEED, epoch=0)))


def test_batches_are_normalised_float32_in_channels_last_order(split):
    pixels, labels = next(split.train_batches(6, seed=SEED, epoch=0))
    assert pixels.dtype == torch.float32 and labels.dtype == torch.int64
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert pixels.shape[:2] == (6, 3) and labels.shape == (6,)


@pytest.mark.parametrize(
    "count, size, world, steps", [(10, 4, 1, 3), (10, 4, 2, 3), (9, 4, 2, 2), (8, 4, 2, 2), (3, 8, 3, 1)]
)
def test_last_batch_is_kept_unless_it_leaves_a_rank_empty(count, size, world, steps):
    split = load_data(options(samples=count, image_size=3, augment=[])).train
    assert split.train_steps(size, world) == steps
    for rank in range(world):
        lengths = [len(labels) for _, labels in split.train_batches(size, seed=0, epoch=0, rank=rank, world=world)]
        assert len(lengths) == steps and min(lengths) > 0


def test_batches_that_cannot_be_are_refused():
    split = load_data(options(samples=5)).train
    with pytest.raises(DataError, match="got batch_size 2 of 5 images for 3 ranks"):
        split.train_steps(2, world=3)
    with pytest.raises(DataError, match="0 <= rank < world"):
        next(split.batches(2, rank=2, world=2))
    with pytest.raises(DataError, match="batch_size 0"):
        next(split.batches(0))


def test_worker_count_does_not_change_a_pixel(large):
    trained = []
    for large.workers in (0, 1, 2):
        trained.append(joined(load_data(large).train.train_batches(4, seed=SEED, epoch=2)))
    assert same(trained[0], trained[1]) and same(trained[0], trained[2])


# ---- reading in processes of their own


def test_processes_are_kept_from_epoch_to_epoch(large):
    large.workers = 2
    split = load_data(large).train
    epochs, processes = [], []
    for epoch in (0, 1, 0):
        epochs.append(joined(split.train_batches(3, seed=SEED, epoch=epoch)))
        ((_, loader),) = split._idle.values()
        processes.append([worker.pid for worker in loader._iterator._workers])
    assert processes[0] == processes[1] == processes[2] and len(processes[0]) == 2
    assert same(epochs[0], epochs[2]) and not same(epochs[0], epochs[1])


def test_an_epoch_left_early_and_two_at_a_time_disturb_no_other(large):
    expected = joined(load_data(large).train.train_batches(3, seed=SEED, epoch=1))
    large.workers = 1
    split = load_data(large).train
    for _ in split.train_batches(3, seed=SEED, epoch=0):
        break
    assert same(joined(split.train_batches(3, seed=SEED, epoch=1)), expected)
    one, other = (split.train_batches(3, seed=SEED, epoch=1) for _ in range(2))
    pairs = list(zip(one, other, strict=True))
    assert len(pairs) == split.train_steps(3) and all(same(a, b) for a, b in pairs)
    assert same(joined(a for a, _ in pairs), expected)


@pytest.mark.slow  # 5 s: python -m pytest -m slow tests/test_images.py
def test_a_process_that_is_killed_is_one_error(large):
    large.workers = 1
    split = load_data(large).train
    joined(split.train_batches(3, seed=SEED, epoch=0))
    ((_, loader),) = split._idle.values()
    os.kill(loader._iterator._workers[0].pid, 9)
    loader._iterator._workers[0].join(10)
    with pytest.raises(DataError, match=r"^data: one of 1 processes that read images has ended .*data\.workers"):
        joined(split.train_batches(3, seed=SEED, epoch=1))
    assert len(joined(split.train_batches(3, seed=SEED, epoch=1))[1]) == len(split)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_one_ahead_yields_all_in_order_and_reads_one_more_than_it_gave(count):
    read = []

    def source():
        for number in range(count):
            read.append(number)
            yield torch.full((2, 3), number), torch.tensor([number])

    for number, (pixels, label) in enumerate(file_split.one_ahead(source(), "cpu")):
        assert label.tolist() == [number] and (pixels == number).all()
        assert len(read) == min(number + 2, count)
    assert read == list(range(count))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_on_a_gpu_are_those_of_the_cpu(large, workers):
    large.workers = workers
    split = load_data(large).train
    on_gpu = [
        (pixels.cpu(), labels.cpu()) for pixels, labels in split.train_batches(3, seed=SEED, epoch=1, device="cuda")
    ]
    assert same(joined(on_gpu), joined(split.train_batches(3, seed=SEED, epoch=1)))


def test_usual_jpegs_take_the_short_way_and_other_files_give_what_preprocess_gives(large, monkeypatch):
    asked = []
    original = file_split.Files.checked
    monkeypatch.setattr(file_split.Files, "checked", lambda self, index: asked.append(index) or original(self, index))
    place = os.path.join(large.root, "train", "ant")
    with Image.open(os.path.join(place, "0.jpg")) as image:
        image.convert("L").save(os.path.join(place, "1.jpg"))
        image.convert("CMYK").save(os.path.join(place, "2.jpg"))
        image.save(os.path.join(place, "3.jpg"), "PNG")
        image.convert("P").save(os.path.join(place, "4.jpg"), "GIF")
    large.augment = []
    split = load_data(large).train
    reader = file_split.Reader(split.files, (65, 65), ())
    for index in range(10):
        expected = file_split.middle(read_image(split.files.name(index)), (65, 65), Reading())
        assert torch.equal(reader.sample(index, -1), expected), index
    assert asked == [3, 4]


# ---- augmentation


@pytest.mark.parametrize("name, pad", [("crop", 2), ("shift", 1)])
def test_crop_moves_pixels_as_a_slow_loop_does(name, pad):
    random = torch.Generator().manual_seed(SEED)
    batch, draws = torch.rand(40, 11, 17, 3, generator=random), torch.rand(40, 2, generator=random)
    result = pixel_split.GEOMETRIES[name](batch, draws)
    offsets = set()
    for image, (first, second), moved in zip(batch, draws.tolist(), result, strict=True):
        down, right = int(first * (2 * pad + 1)) - pad, int(second * (2 * pad + 1)) - pad
        offsets.add((down, right))
        expected = torch.zeros_like(image)
        for y in range(11):
            for x in range(17):
                if 0 <= y + down < 11 and 0 <= x + right < 17:
                    expected[y, x] = image[y + down, x + right]
        assert torch.equal(moved, expected), (down, right)
    assert {down for down, _ in offsets} == {right for _, right in offsets} == set(range(-pad, pad + 1))


def test_flip_mirrors_half_of_the_images_and_leaves_the_rest():
    random = torch.Generator().manual_seed(SEED)
    batch, draws = torch.rand(50, 4, 5, 2, generator=random), torch.rand(50, 2, generator=random)
    mirrored = draws[:, 0] < 0.5
    result = pixel_split.flip(batch, draws)
    for index in range(50):
        expected = batch[index][:, [4, 3, 2, 1, 0]] if mirrored[index] else batch[index]
        assert torch.equal(result[index], expected)
    assert 10 < mirrored.sum() < 40


def test_training_batches_are_augmented_and_evaluation_is_not():
    loaded = load_data(options(augment=["flip"], val_fraction=0.2, image_size=6))
    plain = joined(loaded.train.batches(50))[0]
    order = joined(load_data(options(augment=[], val_fraction=0.2, image_size=6)).train.batches(50))[0]
    assert torch.equal(plain, order)
    both = torch.cat([plain, plain.flip(3)])
    seen = {tuple(row) for row in both.flatten(1).tolist()}
    trained = joined(loaded.train.train_batches(50, seed=SEED, epoch=0))[0]
    assert {tuple(row) for row in trained.flatten(1).tolist()} <= seen
    assert loaded.test.augment == () and loaded.val.augment == ()


def test_normalisation_is_by_the_statistics_of_the_training_images():
    loaded = load_data(options(augment=[], image_size=13, samples=50))
    pixels = loaded.train.pixels.double() / 255
    assert loaded.mean == pytest.approx(pixels.mean((0, 1, 2)).tolist(), abs=1e-12)
    assert loaded.std == pytest.approx(pixels.std((0, 1, 2), correction=0).tolist(), abs=1e-12)
    expected = (pixels.float() - torch.tensor(loaded.mean)) / torch.tensor(loaded.std)
    assert torch.allclose(joined(loaded.train.batches(9))[0], expected.permute(0, 3, 1, 2), atol=1e-6)
    assert measure(np.full((2, 3, 3, 1), 255, np.uint8)) == ([1.0], [1 / 255])


def test_streamed_evaluation_is_resize_and_centre_crop(large):
    pixels, _ = next(load_data(large).test.batches(1))
    from torchvision.transforms import v2

    with Image.open(os.path.join(large.root, "test", "ant", "0.jpg")) as image:
        expected = v2.CenterCrop(65)(v2.Resize(74)(image.convert("RGB")))
    mean, std = (torch.tensor(values) for values in datasets.IMAGENET)
    scaled = (torch.from_numpy(np.array(expected)) / 255 - mean) / std
    assert torch.allclose(pixels[0], scaled.permute(2, 0, 1), atol=1e-5)


@pytest.mark.parametrize("size", [(90, 65), (400, 300), (331, 700)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_streamed_crop_is_torchvisions(tmp_path, size, mode):
    from torchvision.transforms import RandomResizedCrop

    x, y = np.meshgrid(np.linspace(0, 9, size[0]), np.linspace(0, 7, size[1]))
    waves = 127 + 60 * np.stack([np.sin(x + y), np.cos(x - y), np.sin(2 * x)], 2)
    Image.fromarray(waves.astype(np.uint8)).convert(mode).save(tmp_path / "a.jpg", quality=95)
    reduced = 0
    for seed in range(30):
        torch.manual_seed(seed)
        with Image.open(tmp_path / "a.jpg") as image:
            result = file_split.crop(image, (33, 33), Reading())
            smaller = image.size != size
        torch.manual_seed(seed)
        with Image.open(tmp_path / "a.jpg") as image:
            expected = RandomResizedCrop(33, scale=(0.08, 1.0))(image.convert("RGB"))
        assert result.shape == (3, 33, 33) and result.dtype == torch.uint8
        difference = (result.permute(1, 2, 0).float() - torch.from_numpy(np.array(expected)).float()).abs()
        assert difference.mean() < (8 if smaller else 1), seed
        reduced += smaller
    assert reduced == 0 if min(size) < 2 * 33 else reduced > 10


def test_the_same_seed_gives_the_same_crop_and_others_differ(large):
    split = load_data(large).train
    reader = file_split.Reader(split.files, (65, 65), ("crop", "flip"))
    samples = [reader.sample(0, seed) for seed in (5, 5, *range(6, 26))]
    assert torch.equal(samples[0], samples[1])
    assert len({tuple(sample.flatten().tolist()) for sample in samples}) == 21
    turned = file_split.Reader(split.files, (65, 65), ("flip",))
    seen = {tuple(turned.sample(0, seed).flatten().tolist()) for seed in range(20)}
    plain = turned.sample(0, -1)
    assert seen == {tuple(image.flatten().tolist()) for image in (plain, plain.flip(2))}


def test_streamed_augmentation_can_be_switched_off(large):
    large.augment = []
    train = load_data(large).train
    trained = joined(train.train_batches(3, seed=SEED, epoch=0))
    assert sorted_rows(trained) == sorted_rows(joined(train.batches(3)))


def test_large_images_without_a_size_become_224(large):
    large.image_size = None
    assert next(load_data(large).train.train_batches(2, seed=SEED, epoch=0))[0].shape == (2, 3, 224, 224)


def test_streamed_images_have_augmentations_of_their_own(large):
    large.augment = ["shift"]
    with pytest.raises(UnknownNameError, match=r"images over 64 pixels: got 'shift', expected one of flip, crop"):
        load_data(large)


@pytest.mark.parametrize("how, said", [("zero", "has zero bytes"), ("cut", "is truncated or damaged")])
@pytest.mark.parametrize("workers", [0, 1])
def test_bad_streamed_images_are_named_or_dropped_and_counted(large, how, said, workers):
    spoil(os.path.join(large.root, "test", "bee", "1.jpg"), how)
    spoil(os.path.join(large.root, "test", "ant", "4.jpg"), how)
    large.workers = workers
    with pytest.raises(DataError, match=rf"^data: .*4\.jpg {said}.*data\.bad_images=skip"):
        list(load_data(large).test.batches(5))
    large.bad_images = "skip"
    loaded = load_data(large)
    with pytest.warns(BnnfreeWarning, match=r"4\.jpg") as told:
        batches = list(loaded.test.batches(5))
    assert len([each for each in told if each.category is BnnfreeWarning]) == 1
    assert [len(labels) for _, labels in batches] == [4, 4] and loaded.skipped == 2
    list(loaded.test.batches(5))
    assert loaded.skipped == 2
    with pytest.raises(DataError, match="no image of a batch can be read"):
        list(loaded.test.batches(1))
