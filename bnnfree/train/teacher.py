"""The network that another is taught by: loaded, checked, and shown the images as it was trained to see them.

Imports torch, torchvision (when asked for), bnnfree.errors and its own room; the model builders are passed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnnfree.data.datasets import Data
from bnnfree.errors import BnnfreeError, nearest
from bnnfree.train.checkpoint import Builders, load_model

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601: Pillow's grey of red, green and blue


@dataclass(frozen=True)
class View:
    """Images as a network expects them: size (height, width), channels, and the statistics they are normalised by."""

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @staticmethod
    def of(size: Sequence[int], channels: int, mean: Sequence[float], std: Sequence[float]) -> View:
        """A view from lists, as checkpoints hold them."""
        return View((size[0], size[1]), channels, tuple(mean), tuple(std))


class Teacher(nn.Module):
    """A frozen network in eval mode that is given a student's images [N, C, H, W], normalised as the student's are.

    Where the network expects others, the images are converted: normalisation undone, grey to three channels or three to
    grey, resized (bilinear, antialiased), normalised by the network's own statistics. Returns its logits.
    """

    def __init__(self, net: nn.Module, student: View, own: View):
        super().__init__()
        self.net = net
        self.student, self.own = student, own
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x if self.student == self.own else converted(x, self.student, self.own))


def converted(x: Tensor, given: View, wanted: View) -> Tensor:
    """Images normalised as `given`, as `wanted` has them. Shapes: [N, C, H, W] -> [N, C', H', W']."""
    with torch.autocast(x.device.type, enabled=False):
        pixels = x * _column(given.std, x) + _column(given.mean, x)
        if wanted.channels == 3 and given.channels == 1:
            pixels = pixels.expand(-1, 3, -1, -1)
        elif wanted.channels == 1 and given.channels == 3:
            pixels = (pixels * _column(LUMA, x)).sum(1, keepdim=True)
        if wanted.size != given.size:
            pixels = F.interpolate(pixels, wanted.size, mode="bilinear", antialias=True)
        return (pixels - _column(wanted.mean, x)) / _column(wanted.std, x)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return like.new_tensor(values).view(1, -1, 1, 1)


def load_teacher(name: str, builders: Builders, data: Data) -> Teacher:
    """The teacher of a student on `data`: a checkpoint or run folder of ours, or torchvision:NAME with its weights.

    Errors: BnnfreeError for one of other classes, or of channels that the data's cannot be converted to.
    """
    student = View.of(data.image_size, data.channels, data.mean, data.std)
    if name.startswith("torchvision:"):
        net, own, classes = _of_torchvision(name.removeprefix("torchvision:"))
        if len(data.classes) != classes:
            raise BnnfreeError(
                f"loss.teacher: {name} knows {classes} classes, and this recipe's data have {len(data.classes)}, "
                "expected the same."
            )
    else:
        net, state = load_model(name, builders)
        seen = state["data"]
        if seen["classes"] != list(data.classes):
            raise BnnfreeError(
                f"loss.teacher: {name} was trained on other classes ({_shown(seen['classes'])}) than this recipe's "
                f"data have ({_shown(data.classes)})."
            )
        own = View.of(seen["image_size"], seen["channels"], seen["mean"], seen["std"])
    if own.channels != student.channels and {own.channels, student.channels} != {1, 3}:
        raise BnnfreeError(
            f"loss.teacher: {name} takes images of {own.channels} channels, and this recipe's data have "
            f"{student.channels}, expected the same, or 1 and 3."
        )
    return Teacher(net, student, own)


def _shown(classes: Sequence[str]) -> str:
    text = ", ".join(classes[:3])
    return f"{len(classes)}: {text}{', ...' if len(classes) > 3 else ''}"


def _of_torchvision(short: str) -> tuple[nn.Module, View, int]:
    """A classifier of torchvision with its best weights, the images that it expects, and how many classes it knows."""
    from torchvision import models as zoo

    names = zoo.list_models(module=zoo)
    if short not in names:
        hint = nearest(short, names, "torchvision:")
        raise BnnfreeError(f"loss.teacher: torchvision has no model {short!r} that tells classes.{hint}")
    weights = zoo.get_model_weights(short).DEFAULT
    shown = weights.transforms()
    try:
        net = zoo.get_model(short, weights=weights)
    except OSError as error:
        raise BnnfreeError(f"loss.teacher: the weights of {short} could not be fetched ({error}).") from None
    side = shown.crop_size[0]
    return net, View.of((side, side), len(shown.mean), shown.mean, shown.std), len(weights.meta["categories"])
