"""Architectures, by name. Not part of the wheel: clone to train, install to deploy.

A builder takes (classes, channels=3, **options) and returns an nn.Module with `get_classifier()`. Options
that all share: norm, norm_options, width, stem, binarize and the fields of bnnfree.nn.Design. To add a model: a builder
in a file of its family and a line in MODELS; recipes and tests pick it up from there.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from bnnfree.models.reactnet_a import reactnet_a
from bnnfree.models.resnet import (
    birealnet18,
    birealnet20,
    reactnet15,
    reactnet18,
    reactnet20,
    resnet20,
    xnor_resnet18,
    xnor_resnet20,
)

MODELS: dict[str, Callable[..., nn.Module]] = {
    "reactnet18": reactnet18,
    "reactnet20": reactnet20,
    "reactnet15": reactnet15,
    "reactnet_a": reactnet_a,
    "birealnet18": birealnet18,
    "birealnet20": birealnet20,
    "xnor_resnet18": xnor_resnet18,
    "xnor_resnet20": xnor_resnet20,
    "resnet20": resnet20,
}
