"""Residual networks of 3x3 convolutions: ReActNet, Bi-Real and XNOR-ResNet of 15 to 20 layers, the real ResNet-20.

    name            widths             blocks per stage   a block holds      thresholds, RPReLU
    reactnet18      64 128 256 512     4                  one convolution    yes
    birealnet18     64 128 256 512     4                  one convolution    no
    xnor_resnet18   64 128 256 512     2                  two convolutions   no
    reactnet20      16 32 64           6                  one convolution    yes
    reactnet15      16 32 64           6, 4, 3            one convolution    yes
    birealnet20     16 32 64           6                  one convolution    no
    xnor_resnet20   16 32 64           3                  two convolutions   no
    resnet20        16 32 64           3                  two convolutions   no: all real, with ReLU

The first block of each stage but the first has stride 2 and a pooled 1x1 shortcut convolution. Stem
"cifar": 3x3, stride 1; "half": 3x3, stride 2; "imagenet": 7x7, stride 2, then max-pool 3x3, stride 2.
Imports torch, bnnfree.nn.
Ref: Liu et al. 2020 (ReActNet), 2018 (Bi-Real Net); Rastegari et al. 2016 (XNOR-Net); He et al. 2016.
"""

from __future__ import annotations

from torch import nn

from bnnfree.models.stem import Trunk, check_stem, scale_width
from bnnfree.nn import BinaryBlock, BlockShape, Design, expected_betas

STEM_SHAPES = {"cifar": (3, 1), "half": (3, 2), "imagenet": (7, 2)}  # kernel, stride


def _resnet(
    widths: tuple[int, ...],
    blocks: int | tuple[int, ...],
    classes: int,
    channels: int,
    *,
    convs: int = 1,
    width: float = 1.0,
    stem: str = "cifar",
    **options,
) -> Trunk:
    """The skeleton of the table above; `options` are the fields of bnnfree.nn.Design."""
    design = Design(**options)
    kernel, step = STEM_SHAPES[check_stem(stem)]
    outs = [scale_width(w, width) for w in widths]
    counts = (blocks,) * len(outs) if isinstance(blocks, int) else blocks
    shapes = [
        BlockShape(1, transition=b == 0 and s > 0, ref_resets=b == 0)
        for s, count in enumerate(counts)
        for b in range(count)
    ]
    betas = iter(expected_betas(shapes, design.alpha, design.beta))
    layers: list[nn.Module] = []
    cin = outs[0]
    for s, (cout, count) in enumerate(zip(outs, counts, strict=True)):
        for b in range(count):
            stride = 2 if b == 0 and s > 0 else 1
            layers.append(BinaryBlock(cin, cout, design, stride=stride, convs=convs, beta=next(betas)[0]))
            cin = cout
    first = design.make_stem(channels, outs[0], kernel, step)
    if stem == "imagenet":
        first.append(nn.MaxPool2d(3, stride=2, padding=1))
    return Trunk(first, layers, cin, classes, design)


def reactnet18(classes: int, channels: int = 3, **options) -> Trunk:
    """ReActNet-18: ResNet-18 widths, a shortcut around every 3x3 binary convolution, RSign and RPReLU."""
    return _resnet((64, 128, 256, 512), 4, classes, channels, **options)


def reactnet20(classes: int, channels: int = 3, **options) -> Trunk:
    """ReActNet-20: the same blocks in the shape of the CIFAR ResNet-20, 0.27 M weights; fits a CPU."""
    return _resnet((16, 32, 64), 6, classes, channels, **options)


def reactnet15(classes: int, channels: int = 3, **options) -> Trunk:
    """ReActNet-15: fewer blocks where maps are small and weights many; with stem "half" and width 2 it fits an MCU."""
    return _resnet((16, 32, 64), (6, 4, 3), classes, channels, **options)


def birealnet18(classes: int, channels: int = 3, **options) -> Trunk:
    """Bi-Real-18: as ReActNet-18 with a bare sign and no activation on the trunk."""
    return _resnet((64, 128, 256, 512), 4, classes, channels, react=False, **options)


def xnor_resnet18(classes: int, channels: int = 3, **options) -> Trunk:
    """XNOR-ResNet-18: as Bi-Real-18, but a shortcut spans two binary convolutions."""
    return _resnet((64, 128, 256, 512), 2, classes, channels, convs=2, react=False, **options)


def birealnet20(classes: int, channels: int = 3, **options) -> Trunk:
    """Bi-Real-20: as ReActNet-20 with a bare sign and no activation on the trunk."""
    return _resnet((16, 32, 64), 6, classes, channels, react=False, **options)


def xnor_resnet20(classes: int, channels: int = 3, **options) -> Trunk:
    """XNOR-ResNet-20: as Bi-Real-20, but a shortcut spans two binary convolutions."""
    return _resnet((16, 32, 64), 3, classes, channels, convs=2, react=False, **options)


def resnet20(classes: int, channels: int = 3, **options) -> Trunk:
    """The CIFAR ResNet-20 of real weights and ReLU, ReActNet-20's twin: same widths and depth, same normalisers.

    It stays real whatever `binarize` says; `standardize=False` makes its convolutions the ordinary ones. The
    shortcuts of its transitions are pooled 1x1 convolutions, as in the other networks here.
    """
    return _resnet((16, 32, 64), 3, classes, channels, convs=2, react=False, real=True, **options)
