"""Policies and mixtures: a function of (seed, epoch) and of the position, on pixels, for both kinds of split.

Must not import models or recipes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import options, spoil, write_tree
from test_images import SEED, joined, same

from bnnfree.data import augment, pixel_split
from bnnfree.data.datasets import load_data
from bnnfree.errors import BnnfreeWarning, DataError
from bnnfree.train.losses import LOSSES, main_class

NEW = [*augment.POLICIES, *augment.MIXTURES]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(params=["pixels", "files"])
def make(request, tmp_path):
    """Makes the training split of each kind with augmentations: 31 images in memory, or 14 files."""
    if request.param == "pixels":
        return lambda *names, **more: load_data(options(samples=31, image_size=11, augment=list(names), **more)).train
    root = write_tree(tmp_path / "root", count=7, size=(90, 70), ending="jpg")
    files = dict(name="image_folder", root=str(root), image_size=65, cache=str(tmp_path / "cache"))
    return lambda *names, **more: load_data(options(augment=list(names), **(files | more))).train


@pytest.mark.parametrize(
    "names", [*([name] for name in NEW), ["crop", "randaugment", "flip", "mixup", "cutmix"]], ids=str
)
def test_a_sample_does_not_depend_on_batch_rank_or_where_an_epoch_is_resumed(make, names):
    split = make(*names)
    state = torch.get_rng_state()
    whole = joined(split.train_batches(len(split), seed=SEED, epoch=3))
    assert torch.equal(torch.get_rng_state(), state)
    assert same(joined(split.train_batches(3, seed=SEED, epoch=3)), whole)
    assert same(joined(split.train_batches(3, seed=SEED, epoch=3, start=2)), [each[6:] for each in whole])
    count = len(split) // 3 * 3
    ranks = [joined(split.train_batches(3, seed=SEED, epoch=3, rank=rank, world=3)) for rank in range(3)]
    for rank, part in enumerate(ranks):
        assert same([each[: count // 3] for each in part], [each[rank:count:3] for each in whole])
    other = joined(split.train_batches(len(split), seed=SEED, epoch=4))
    assert not torch.equal(other[0], whole[0])


@pytest.mark.parametrize("name", NEW)
def test_each_changes_images_and_evaluation_sees_none_of_it(make, name):
    plain, split = make(), make(name)
    assert same(joined(split.batches(5)), joined(plain.batches(5)))
    changed, order = (joined(each.train_batches(9, seed=SEED, epoch=1)) for each in (split, plain))
    assert changed[0].shape == order[0].shape and changed[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.isfinite(changed[0]).all()
    differ = (changed[0] != order[0]).flatten(1).any(1)
    assert differ.any() and (name != "random_erasing" or not differ.all())
    if name in augment.POLICIES:
        assert torch.equal(changed[1], order[1])


def test_processes_that_read_change_nothing(make):
    names = "crop", "randaugment", "random_erasing", "cutmix"
    alone, helped = (joined(make(*names, workers=n).train_batches(4, seed=SEED, epoch=1)) for n in (0, 2))
    assert same(alone, helped)


def test_policies_see_the_pixels_and_what_they_leave_empty_is_the_mean_pixel(make, monkeypatch):
    seen = []

    def look(name, fill):
        return lambda pixels: seen.append((pixels.clone(), fill)) or pixels

    monkeypatch.setattr("bnnfree.data.pixel_split.policy", look)
    monkeypatch.setattr("bnnfree.data.file_split.policy", look)
    split, plain = make("color_jitter"), make()
    assert same(*(joined(each.train_batches(4, seed=SEED, epoch=1)) for each in (split, plain)))
    assert all(pixels.dtype == torch.uint8 and pixels.shape[0] == 3 for pixels, _ in seen) and len(seen) == len(split)
    assert {fill for _, fill in seen} == {tuple(round(255 * mean) for mean in split.mean)}


@pytest.mark.parametrize("channels", [1, 3])
def test_an_erased_rectangle_is_the_mean_pixel(channels):
    split = load_data(options(samples=60, image_size=12, augment=["random_erasing"], channels=channels)).train
    pixels, _ = joined(split.train_batches(60, seed=SEED, epoch=0))
    step = 1 / (255 * min(split.std))  # a pixel's step, normalised
    empty = (pixels.abs() <= step / 2 + 1e-6).all(1).flatten(1).sum(1)
    assert 5 <= (empty >= 3).sum() <= 30


def test_policies_take_grey_and_colour_and_name_other_images():
    for name in augment.POLICIES:
        split = load_data(options(samples=20, image_size=9, channels=1, augment=[name])).train
        assert joined(split.train_batches(7, seed=0, epoch=0))[0].shape == (20, 1, 9, 9)
        with pytest.raises(DataError, match=f"got '{name}' for images of 4 channels, expected 1 or 3"):
            load_data(options(channels=4, augment=[name]))


@pytest.mark.parametrize("name", augment.MIXTURES)
def test_a_mixture_is_an_image_and_its_neighbour_in_the_shares_of_its_label(make, name):
    split, plain = make(name), make()
    mixed, shares = joined(split.train_batches(5, seed=SEED, epoch=2))
    x, labels = joined(plain.train_batches(5, seed=SEED, epoch=2))
    count, classes = len(split), split.mixing.classes
    own_shares = []
    for i in range(count):
        j = i ^ 1 if i ^ 1 < count else i
        if i == j:
            torch.testing.assert_close(mixed[i], x[i])
            continue
        if name == "cutmix":
            own, other = (mixed[i] == x[i]).all(0), (mixed[i] == x[j]).all(0)
            assert (own | other).all()
            rows, columns = (~own).any(1).nonzero(), (~own).any(0).nonzero()
            assert len(rows) == 0 or (~own).sum() == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
            share = float(own.float().mean())
        else:
            difference = (x[i] - x[j]).double()
            share = float(((mixed[i] - x[j]).double() * difference).sum() / (difference**2).sum())
            torch.testing.assert_close(mixed[i], share * x[i] + (1 - share) * x[j], rtol=0, atol=1e-4)
        expected = torch.zeros(classes, dtype=torch.float64)
        expected[labels[i]] += share
        expected[labels[j]] += 1 - share
        torch.testing.assert_close(shares[i].double(), expected, rtol=0, atol=1e-4)
        own_shares.append(share)
    assert min(own_shares) < 0.5 < max(own_shares)


def test_of_two_mixtures_an_image_draws_one():
    alone = [load_data(options(samples=301, image_size=11, augment=[name])).train for name in augment.MIXTURES]
    both = load_data(options(samples=301, image_size=11, augment=list(augment.MIXTURES))).train
    mixup, cutmix, either = (joined(each.train_batches(50, seed=SEED, epoch=0))[0] for each in (*alone, both))
    first, second = ((either == each).flatten(1).all(1) for each in (mixup, cutmix))
    assert (first | second).all() and 100 < first.sum() < 200


@pytest.mark.parametrize("alpha, spread", [(0.05, 0.4), (1.0, 0.29), (50.0, 0.05)])
def test_mix_alpha_says_how_far_shares_scatter(alpha, spread):
    split = load_data(options(samples=2000, image_size=4, augment=["mixup"], mix_alpha=alpha)).train
    shares = split.mixing.draw(2000, 1)[:, 1]
    assert abs(shares.mean() - 0.5) < 0.05 and abs(shares.std() - (1 / (4 * (2 * alpha + 1))) ** 0.5) < 0.02
    assert abs(shares.std() - spread) < 0.1


def test_an_unreadable_image_is_left_out_and_its_neighbour_stays_alone(tmp_path):
    root = write_tree(tmp_path / "root", count=4, size=(90, 70), ending="jpg")
    given = dict(name="image_folder", root=str(root), image_size=65, cache=str(tmp_path / "c"), bad_images="skip")
    split, plain = (load_data(options(augment=names, **given)).train for names in (["mixup"], []))
    before = joined(split.train_batches(3, seed=SEED, epoch=1))
    x, _ = joined(plain.train_batches(3, seed=SEED, epoch=1))
    order = plain.files.order(
        torch.Generator().manual_seed(int(np.random.SeedSequence([SEED, 1]).generate_state(1)[0]))
    )
    spoil(Path(plain.files.name(int(order[2]))), "cut")
    with pytest.warns(BnnfreeWarning, match="left out"):
        after = joined(split.train_batches(3, seed=SEED, epoch=1))
    rest = [i for i in range(8) if i != 2]
    assert torch.equal(after[0][[i for i in range(7) if i != 2]], before[0][[0, 1, 4, 5, 6, 7]])
    torch.testing.assert_close(after[0][2], x[3])
    assert len(after[1]) == len(rest) and sorted(after[1][2].tolist()) == [0, 1]


def test_flip_crop_and_shift_have_the_bits_they_always_had():
    split = load_data(options(samples=50, image_size=11, augment=["crop", "flip", "shift"])).train
    pixels, labels = joined(split.train_batches(8, seed=3, epoch=2))
    digest = hashlib.sha256(pixels.contiguous().numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    assert digest == "ff56eb3ba04584adb7ceb1a6c683054bdf38ff593eb35922a0ec8ae34d1495be"
    assert split.mixing is None and tuple(pixel_split.GEOMETRIES) == ("flip", "crop", "shift")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_a_mixed_label_is_the_mixture_of_the_losses(smoothing):
    logits, first, second = torch.randn(7, 5), torch.arange(7) % 5, torch.arange(7) * 2 % 5
    share = torch.rand(7, 1)
    labels = share * torch.eye(5)[first] + (1 - share) * torch.eye(5)[second]
    loss = LOSSES["cross_entropy"]
    expected = sum(
        share[n, 0] * loss(logits[n : n + 1], first[n : n + 1], None, smoothing)
        + (1 - share[n, 0]) * loss(logits[n : n + 1], second[n : n + 1], None, smoothing)
        for n in range(7)
    )
    torch.testing.assert_close(loss(logits, labels, None, smoothing), expected)
    assert torch.equal(main_class(labels), torch.where(share[:, 0] > 0.5, first, second))
    assert main_class(first) is first
