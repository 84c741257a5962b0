"""Meaning of every operation of a packed model, in numpy: the reference all else is tested against.

Written to be read, never to be fast. Arrays are NHWC; a pixel's channels are what is packed into words.
`binary` works on signs and bits, and is exact integers; `real` works on float32, where the order of every
sum is part of the meaning, so that any backend on any processor gives the same bits. Imports numpy and
bnnfree.errors only.
"""

from bnnfree.ops.binary import (
    WORD,
    Side,
    Window,
    binary_conv2d,
    binary_linear,
    pack_bits,
    sign_bits,
    signs,
    threshold_bits,
    unpack_bits,
)
from bnnfree.ops.real import (
    add,
    avg_pool2d,
    border_bias,
    border_classes,
    concat,
    conv2d,
    epilogue,
    exp,
    global_avg_pool,
    group_norm,
    hardtanh,
    linear,
    max_pool2d,
    pixel_conv2d,
    pixel_sums,
    pool_output,
    prelu,
    relu,
    rms_norm,
    softmax,
    tlu,
)

__all__ = [
    "WORD",
    "Side",
    "Window",
    "add",
    "avg_pool2d",
    "binary_conv2d",
    "binary_linear",
    "border_bias",
    "border_classes",
    "concat",
    "conv2d",
    "epilogue",
    "exp",
    "global_avg_pool",
    "group_norm",
    "hardtanh",
    "linear",
    "max_pool2d",
    "pack_bits",
    "pixel_conv2d",
    "pixel_sums",
    "pool_output",
    "prelu",
    "relu",
    "rms_norm",
    "sign_bits",
    "signs",
    "softmax",
    "threshold_bits",
    "tlu",
    "unpack_bits",
]
