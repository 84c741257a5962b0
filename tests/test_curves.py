"""Losses of 200 steps on real images: however a network runs, they are the plain formulation's to seed noise.

Handwritten digits by default, CIFAR-10 from a folder of train/CLASS and test/CLASS; some minutes on one core:
    BNNFREE_CIFAR10=FOLDER python -m pytest -m slow -n 0 -s tests/test_curves.py
"""

import itertools
import os

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from bnnfree.analysis.plain import move_input_means, plain
from bnnfree.models import MODELS
from bnnfree.nn import calibrate, update_input_means
from bnnfree.nn.fused import choose_speed
from bnnfree.train import load_data, load_recipe

DATA = os.environ.get("BNNFREE_CIFAR10")
SOURCE = ["data.name=image_folder", f"data.root={DATA}"] if DATA else ["data.name=digits", "data.augment=[]"]
SEEDS, STEPS, SMOOTH = 3, 200, 20
WAYS = {  # name: speed, precision
    "plain": ("layers", "fp32"),
    "fused": ("fused", "fp32"),
    "fused bf16": ("fused", "bf16"),
    "fused bf16_trunk": ("fused", "bf16_trunk"),
}


def losses(data, norm, way, seed):
    """Loss of each step of a quarter-wide ReActNet-18: same start, same batches for every way."""
    torch.manual_seed(seed)
    model = MODELS["reactnet18"](10, data.channels, norm=norm, width=0.25, latent_std=0.04)
    epochs = (data.train.train_batches(32, seed=seed, epoch=epoch) for epoch in itertools.count())
    batches = list(itertools.islice(itertools.chain.from_iterable(epochs), STEPS))
    calibrate(model, torch.cat([images for images, _ in batches[:8]]))
    model = model.to(memory_format=torch.channels_last).train()
    speed, precision = WAYS[way]
    if way == "plain":
        model = plain(model).train()
    else:
        choose_speed(model, speed, precision=precision)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    found = []
    for step, (images, labels) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 50)
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        (move_input_means if way == "plain" else update_input_means)(model)
        found.append(loss.item())
    return np.convolve(found, np.ones(SMOOTH) / SMOOTH, mode="valid")


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["free", "free_paper"])
def test_every_way_learns_as_the_plain_formulation(norm):
    """Smoothed over 20 steps, the mean curve of 3 seeds stays within two deviations of the plain one's seeds."""
    data = load_data(load_recipe("recipes/cifar10_reactnet20.yaml", [*SOURCE, "data.batch_size=32"], MODELS).data)
    curves = {way: np.array([losses(data, norm, way, seed) for seed in range(SEEDS)]) for way in WAYS}
    mean, noise = curves["plain"].mean(0), curves["plain"].std(0, ddof=1).mean()
    for way, curve in curves.items():
        off = np.abs(curve.mean(0) - mean)
        ends = curve[:, -1]
        print(f"{norm} {way}: last 20 steps {ends.mean():.3f} +- {ends.std(ddof=1):.3f}, "
              f"off by {off.mean():.3f} on average, {off.max():.3f} at most; seed noise {noise:.3f}")  # fmt: skip
        assert off.mean() <= noise and off.max() <= 3 * noise, way
        assert curve[:, -1].mean() < 0.9 * curve[:, 0].mean()
