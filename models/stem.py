"""What every model here has in common: stems, widths, and the head. Imports torch and bnnfree.nn only."""

from __future__ import annotations

from torch import Tensor, nn

from bnnfree.errors import BnnfreeError, pick

STEMS = ("cifar", "imagenet")


def check_stem(stem: str) -> str:
    """`stem` if it is one of STEMS, else an error that lists them."""
    pick(dict.fromkeys(STEMS), stem, "stem")
    return stem


def scale_width(channels: int, width: float) -> int:
    """`channels` times `width`, rounded to a multiple of 8, at least 8; exact at width 1."""
    if width <= 0:
        raise BnnfreeError(f"width: got {width}, expected a number above 0.")
    return channels if width == 1 else max(8, 8 * round(channels * width / 8))


class Trunk(nn.Module):
    """stem -> blocks -> global average pool -> linear head. Shapes: [N, C, H, W] -> [N, classes]."""

    def __init__(self, stem: nn.Module, blocks: list[nn.Module], channels: int, classes: int):
        super().__init__()
        self.stem = stem
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)

    def get_classifier(self) -> nn.Module:
        """The layer that gives the logits."""
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.blocks(self.stem(x))).flatten(1))
