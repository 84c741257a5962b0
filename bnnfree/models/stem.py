"""Shared parts of all models: stem, width scaling, trunk and head. Imports torch and bnnfree.nn only."""

from __future__ import annotations

from torch import Tensor, nn

from bnnfree.errors import BnnfreeError, pick
from bnnfree.nn import Design, first_belief
from bnnfree.nn.fused import Fusion, run_blocks

STEMS = ("cifar", "half", "imagenet")


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
    """stem -> blocks -> (normaliser, where the trunk has none) -> global average pool -> linear head.

    With a normaliser that predicts (kn) a belief about the map goes from block to block beside it, in training.
    Shapes: [N, C, H, W] -> [N, classes].
    """

    def __init__(self, stem: nn.Module, blocks: list[nn.Module], channels: int, classes: int, design: Design):
        super().__init__()
        self.stem = stem
        self.blocks = nn.Sequential(*blocks)
        self.tail = design.make_tail(channels)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = design.make_head(channels, classes)
        self.believes = first_belief(stem) is not None
        self.fusion: Fusion | None = None  # how blocks are fused in training; see bnnfree.nn.fused

    def get_classifier(self) -> nn.Module:
        """The layer that gives the logits."""
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.believes and self.training:
            x = self._believing(x)
        elif self.fusion is not None and self.training:
            x = run_blocks(self.blocks, x, self.fusion)
        else:
            x = self.blocks(x)
        x = x if self.tail is None else self.tail(x)
        return self.head(self.pool(x).flatten(1))

    def _believing(self, x: Tensor) -> Tensor:
        belief = first_belief(self.stem)
        for block in self.blocks:
            x, belief = block(x, belief)
        return x
