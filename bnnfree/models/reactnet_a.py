"""ReActNet-A: the MobileNet-shaped binary network. Imports torch and bnnfree.nn only.

Thirteen pairs of residual units after a real 3x3 stem: a dense 3x3 binary convolution that keeps the width
(average-pooled shortcut at stride 2), then a 1x1 one that keeps it, or doubles it with a shortcut that
repeats the input along the channels. Stem stride: 1 ("cifar") or 2 ("half", "imagenet").
Ref: Liu et al. 2020, "ReActNet", section 4.1.
"""

from __future__ import annotations

from torch import nn

from bnnfree.models.stem import Trunk, check_stem, scale_width
from bnnfree.nn import BinaryBlock, BlockShape, Design, expected_betas

WIDTHS = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)


def reactnet_a(classes: int, channels: int = 3, *, width: float = 1.0, stem: str = "imagenet", **options) -> Trunk:
    """ReActNet-A; `options` are the fields of bnnfree.nn.Design."""
    design = Design(**options)
    narrowest = scale_width(WIDTHS[0], width)  # the others are its multiples: doublings must stay doublings
    outs = [w // WIDTHS[0] * narrowest for w in WIDTHS]
    # the first doubling, right after the stem, keeps the resolution
    strides = [2 if i > 0 and a != b else 1 for i, (a, b) in enumerate(zip(WIDTHS, WIDTHS[1:], strict=False))]
    shapes = [BlockShape(2, transition=s == 2, ref_resets=s == 2) for s in strides]
    betas = expected_betas(shapes, design.alpha, design.beta)
    layers: list[nn.Module] = []
    for cin, cout, stride, (beta3, beta1) in zip(outs, outs[1:], strides, betas, strict=False):
        layers.append(BinaryBlock(cin, cin, design, stride=stride, beta=beta3))
        layers.append(BinaryBlock(cin, cout, design, kernel=1, beta=beta1, duplicate=cin != cout))
    first = design.make_stem(channels, outs[0], 3, 1 if check_stem(stem) == "cifar" else 2)
    return Trunk(first, layers, outs[-1], classes, design)
