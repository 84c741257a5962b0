"""THE table: every number, record and rule of the packed file format. Standard library and numpy only.

The reader, the writer, the checks, native/format.h and the tables of FORMAT.md are all made from what stands
here (`python tools/gen_format.py`). To add an op: an `Op` line in OPS, its shapes in check.py, its meaning in
bnnfree.ops, its kernel in each engine backend; tests/test_format.py counts them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAGIC = b"bnnf\r\n\x1a\n"  # like PNG's: a transfer in text mode breaks it
VERSION = 3
ALIGN = 64  # bytes: a section, a constant and an activation each start at a multiple
NONE = 0xFFFFFFFF  # "no tensor here" in a record

MAX_RECORDS = 1 << 16
MAX_TEXT = 1 << 22
MAX_LINE = 1 << 10
MAX_KEYS = 1 << 10
MAX_SIDE = 1 << 20
MAX_VALUES = 1 << 27
MAX_BYTES = 1 << 30
MAX_TAPS = 1 << 18
MAX_SUM = 1 << 24
MAX_BORDER = 1 << 16
MAX_WORK = 1 << 40
LEAST_WORK = 1 << 10

LIMITS = {
    "MAX_RECORDS": "tensors, and ops; there is one of each at least",
    "MAX_TEXT": "bytes of names, of class names, of metadata",
    "MAX_LINE": "bytes of one name, class name or key of the metadata, without its line feed",
    "MAX_KEYS": "keys of the metadata",
    "MAX_SIDE": "values along one dimension; each field of a window",
    "MAX_VALUES": "values of the image and of an activation, bits counted one by one",
    "MAX_BYTES": "of the arena, and of the input of an op with a window as stored in its dtype (bits in whole words), "
    "with the padding on both sides and, where ceil is 1, one stride more along each axis",
    "MAX_TAPS": "positions of one window",
    "MAX_SUM": "products in a sum of binary_conv2d: float32 holds all whole numbers up to here (a conv2d with weights "
    "of bits is not limited)",
    "MAX_BORDER": "positions along an axis at which a window of pixel_conv2d has its first or its last tap outside",
    "MAX_WORK": "values and products of one image over all ops, about 90 times a ResNet-152: see Limits",
    "LEAST_WORK": "results that a sum counts for at least in that: each step costs an engine something",
}


@dataclass(frozen=True)
class Field:
    """One value of a record: its name, its little-endian numpy type, what it means."""

    name: str
    type: str
    meaning: str

    @property
    def c_type(self) -> str:
        """The same as a member of a C struct: (type, suffix)."""
        kind = np.dtype(self.type)
        if kind.kind == "S":
            return f"char {self.name}[{kind.itemsize}]"
        shape = f"[{kind.shape[0]}]" if kind.shape else ""
        return f"{'int' if kind.base.kind == 'i' else 'uint'}{8 * kind.base.itemsize}_t {self.name}{shape}"


HEADER = (
    Field("magic", "S8", '"bnnf", carriage return, line feed, 0x1a, line feed'),
    Field("version", "<u4", "of the format; a reader refuses any other"),
    Field("checksum", "<u4", "CRC-32 (IEEE 802.3, as zlib) of every byte from offset 16 to the end"),
    Field("file_bytes", "<u8", "size of the whole file"),
    Field("arena_bytes", "<u8", "memory that holds all activations of one image"),
    Field("tensor_count", "<u4", "records in the tensor table"),
    Field("op_count", "<u4", "records in the op table"),
    Field("name_bytes", "<u4", "size of the names: one UTF-8 line per tensor"),
    Field("class_bytes", "<u4", "size of the class names: one UTF-8 line per class"),
    Field("metadata_bytes", "<u4", "size of the metadata: UTF-8 lines, a key and its value in turn"),
    Field("input", "<u4", "tensor that takes the image"),
    Field("output", "<u4", "tensor that holds the result"),
    Field("zero", "<u4", "0"),
    Field("producer", "S32", "what wrote the file: 0 to 32 bytes of 0x20 to 0x7E, then zeros"),
    Field("rest", "S32", "zeros"),
)

TENSOR = (
    Field("offset", "<u8", "constant: from the start of the file; activation: of the arena; image: 0"),
    Field("bytes", "<u8", "size; follows from dtype and shape"),
    Field("shape", "(4,)<u4", "sizes, each 1 or more, the last varies fastest; 1 beyond the rank"),
    Field("dtype", "u1", "code of its dtype"),
    Field("place", "u1", "code of its place"),
    Field("rank", "u1", "number of sizes, 1 to 4"),
    Field("zero", "u1", "0"),
    Field("zeros", "<u4", "0"),
)

WINDOW_FIELDS = (
    "kernel_h", "kernel_w", "stride_h", "stride_w", "padding_h", "padding_w", "after_h", "after_w",
    "dilation_h", "dilation_w", "groups", "pad_value", "ceil",
)  # fmt: skip
EPILOGUE_FIELDS = ("scale", "bias", "slope", "low", "high", "scale_after", "bias_after", "threshold", "flip")
FLOAT_FIELDS = EPILOGUE_FIELDS[:-2]  # what makes the value
MAY_BE_INFINITE = ("low", "high", "threshold")  # every other float constant is a finite number

OP = (
    Field("code", "<u4", "which op"),
    Field("input", "<u4", "activation that it reads, or the image"),
    Field("other", "<u4", "second activation: what the epilogue adds, or the second part of a concat"),
    Field("factor", "<u4", "activation that the epilogue multiplies by"),
    Field("real", "<u4", "activation it writes in float32"),
    Field("bits", "<u4", "activation it writes in bits"),
    Field(
        "weights",
        "<u4",
        "constant [outputs, kernel_h, kernel_w, channels / groups]; of a norm [groups]: its eps; of take i32 [outputs]",
    ),
    Field("scale", "<u4", "constant f32 [channels]: factor of the epilogue"),
    Field(
        "bias",
        "<u4",
        "constant f32 [channels]; of pixel_conv2d, and where wanted of binary_conv2d, [row, column classes, channels]",
    ),
    Field("slope", "<u4", "constant f32 [channels]: factor of negative values"),
    Field("low", "<u4", "constant f32 [channels]: smallest value"),
    Field("high", "<u4", "constant f32 [channels]: largest value"),
    Field("scale_after", "<u4", "constant f32 [channels]: factor after the activation"),
    Field("bias_after", "<u4", "constant f32 [channels]: added after the activation"),
    Field("threshold", "<u4", "constant [channels]: f32, of the value; or i32, of the sum of signs"),
    Field("flip", "<u4", "constant bits [channels]: where the bit is inverted"),
    Field("kernel_h", "<u4", "rows of the window"),
    Field("kernel_w", "<u4", "columns of the window"),
    Field("stride_h", "<u4", "rows from one position to the next"),
    Field("stride_w", "<u4", "columns from one position to the next"),
    Field("padding_h", "<u4", "rows added above"),
    Field("padding_w", "<u4", "columns added on the left"),
    Field("after_h", "<u4", "rows added below"),
    Field("after_w", "<u4", "columns added on the right"),
    Field("dilation_h", "<u4", "rows from one tap to the next"),
    Field("dilation_w", "<u4", "columns from one tap to the next"),
    Field("groups", "<u4", "channels are split into so many independent convolutions"),
    Field("pad_value", "<i4", "what padding carries: 0, 1 or -1"),
    Field("ceil", "<u4", "1: windows of a pooling may hang over the far edge"),
    Field("other_last", "<u4", "1: the epilogue adds `other` after the activation"),
    Field("mode", "<u4", "which of its kind, for an op that has several"),
    Field("size_h", "<u4", "rows of the result, for an op that does not follow them from its window"),
    Field("size_w", "<u4", "columns of the result, likewise"),
    Field("rest", "(7,)<u4", "zeros"),
)

HEADER_TYPE, TENSOR_TYPE, OP_TYPE = (np.dtype([(f.name, f.type) for f in part]) for part in (HEADER, TENSOR, OP))
CHECKED_FROM = 16  # the checksum covers the bytes from here on
ACTIVATION_FIELDS = ("input", "other", "factor", "real", "bits")
TENSOR_FIELDS = (*ACTIVATION_FIELDS, "weights", *EPILOGUE_FIELDS)


@dataclass(frozen=True)
class DType:
    """A type of value: its code, the numpy type that stores it, and what a C programmer must know."""

    code: int
    storage: str
    meaning: str


DTYPES = {
    "f32": DType(0, "<f4", "IEEE single precision"),
    "bits": DType(1, "<u8", "signs: 1 is negative; value c of the last dimension is bit c % 64 of its word c // 64"),
    "i8": DType(2, "i1", "two's complement"),
    "u8": DType(3, "u1", "a pixel"),
    "i32": DType(4, "<i4", "two's complement"),
}

PLACES = {"constant": 0, "activation": 1, "image": 2}
PLACE_MEANINGS = {
    "constant": "in this file",
    "activation": "in the arena while the engine runs",
    "image": "the caller's pixels, [height, width, channels]",
}

DEPENDENT = ("binary_conv2d", "pixel_conv2d")  # whose bias may depend on the border class
CONVOLUTIONS = ("binary_conv2d", "pixel_conv2d", "conv2d")
POOLINGS = ("max_pool2d", "avg_pool2d")
NORMS = ("group_norm", "rms_norm")


@dataclass(frozen=True)
class Op:
    """An op: its code and meaning, the dtypes its input may have, and the fields of its record.

    needs: must name a tensor; may: can name one; every other tensor field is NONE. window: the window fields that are
    meant; every other is 0. modes: what its mode numbers, from 0 on. sized: size_h and size_w are those of its result.
    moves: it copies values, and writes `real` of floats and `bits` of bits.
    """

    code: int
    meaning: str
    inputs: tuple[str, ...]
    needs: tuple[str, ...] = ()
    may: tuple[str, ...] = ()
    window: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    sized: bool = False
    moves: bool = False


_EPILOGUE = ("other", "factor", *EPILOGUE_FIELDS, "real", "bits")

OPS: dict[str, Op] = {
    "pointwise": Op(
        1,
        "the epilogue on its own: v is the input, bits as +1 and -1, pixels as 0 to 255",
        ("f32", "bits", "u8"),
        may=_EPILOGUE,
    ),
    "binary_conv2d": Op(
        2,
        "v is the exact sum of products of signs; taps on padding count pad_value",
        ("bits",),
        ("weights",),
        _EPILOGUE,
        WINDOW_FIELDS,
        ("bits",),
    ),
    "pixel_conv2d": Op(
        3,
        "v is the exact sum of pixels times weights over the taps inside the image; the epilogue's bias depends "
        "on which taps are inside, so that padding is zero after normalisation",
        ("u8",),
        ("weights", "scale", "bias"),
        tuple(f for f in _EPILOGUE if f not in ("scale", "bias")),
        WINDOW_FIELDS,
        ("i8",),
    ),
    "conv2d": Op(
        4,
        "v is the float sum of inputs times weights, row by row, column by column, channel by channel, each product "
        "and each sum rounded; taps on padding count pad_value",
        ("f32",),
        ("weights",),
        _EPILOGUE,
        WINDOW_FIELDS,
        ("f32", "i8", "bits"),
    ),
    "max_pool2d": Op(
        5,
        "largest value of the window inside the image",
        ("f32", "bits"),
        may=("real", "bits"),
        window=WINDOW_FIELDS,
        moves=True,
    ),
    "avg_pool2d": Op(
        6,
        "sum of the window's values inside the image, row by row, then column by column, divided by their number",
        ("f32",),
        ("real",),
        window=WINDOW_FIELDS,
    ),
    "concat": Op(
        7,
        "the channels of input, then those of other",
        ("f32", "bits"),
        ("other",),
        ("real", "bits"),
        moves=True,
    ),
    "softmax": Op(8, "e^(v - max v) over its sum, along the channels", ("f32",), ("real",)),
    "group_norm": Op(
        9,
        "v is the input less the mean of its group of channels over all positions, divided by their deviation",
        ("f32",),
        ("weights",),
        _EPILOGUE,
        weights=("f32",),
    ),
    "rms_norm": Op(
        10,
        "v is the input divided by the root mean square of its group of channels over all positions",
        ("f32",),
        ("weights",),
        _EPILOGUE,
        weights=("f32",),
    ),
    "channel_norm": Op(
        11,
        "v is the input less the mean of its position over all channels, divided by their deviation; uncentred: with a "
        "mean of 0",
        ("f32",),
        ("weights",),
        _EPILOGUE,
        weights=("f32",),
        modes=("centred", "uncentred"),
    ),
    "function": Op(
        12,
        "v is a function of the input",
        ("f32",),
        may=_EPILOGUE,
        modes=("sigmoid", "tanh", "gelu", "gelu_tanh", "silu", "elu", "exp", "sqrt", "reciprocal"),
    ),
    "conv_transpose2d": Op(
        13,
        "v is the float sum of inputs times weights, where output row r takes input row q by tap i if q stride_h - "
        "padding_h + i dilation_h = r",
        ("f32",),
        ("weights",),
        _EPILOGUE,
        (
            "kernel_h",
            "kernel_w",
            "stride_h",
            "stride_w",
            "padding_h",
            "padding_w",
            "dilation_h",
            "dilation_w",
            "groups",
        ),
        ("f32",),
        sized=True,
    ),
    "take": Op(
        14,
        "channel o is the input's channel weights[o]; of floats +0 where that is -1",
        ("f32", "bits"),
        ("weights",),
        ("real", "bits"),
        weights=("i32",),
        moves=True,
    ),
    "crop": Op(
        15,
        "row r is the input's row padding_h + r stride_h, likewise columns",
        ("f32", "bits"),
        may=("real", "bits"),
        window=("stride_h", "stride_w", "padding_h", "padding_w"),
        sized=True,
        moves=True,
    ),
    "pad": Op(
        16,
        "rows and columns around the input",
        ("f32", "bits"),
        may=("real", "bits"),
        window=("padding_h", "padding_w", "after_h", "after_w", "pad_value"),
        modes=("constant", "reflect", "replicate", "circular"),
        moves=True,
    ),
    "resize": Op(
        17,
        "the map in another size",
        ("f32",),
        ("real",),
        modes=("nearest", "bilinear", "bilinear_corners"),
        sized=True,
    ),
    "pixel_shuffle": Op(
        18,
        "channels to the stride_h x stride_w places of a block of positions, or back",
        ("f32",),
        ("real",),
        window=("stride_h", "stride_w"),
        modes=("shuffle", "unshuffle"),
    ),
    "reduce_channels": Op(
        19,
        "over the channels of each position: one result",
        ("f32",),
        ("real",),
        modes=("mean", "sum", "max"),
    ),
    "xor": Op(20, "product of the signs of input and other", ("bits",), ("other", "bits"), moves=True),
}

EPILOGUE = """\
v <- fl(v * scale)              where there is a scale
v <- fl(v + bias)               where there is a bias
v <- fl(v * factor)             where there is a factor
v <- fl(v + other)              where there is an other and other_last is 0
v <- v if v >= 0 else fl(v * slope)     where there is a slope
v <- v if v > low else low      where there is a low
v <- v if v < high else high    where there is a high
v <- fl(v * scale_after)        where there is a scale_after
v <- fl(v + bias_after)         where there is a bias_after
v <- fl(v + other)              where there is an other and other_last is 1
real = v                        where real is written
bit = not (v >= threshold)      where bits are written (threshold 0 where there is none),
bit <- bit xor flip             where there is a flip"""

ERRORS = {
    "MagicError": "the first 8 bytes are not the magic, or there are fewer: another kind of file",
    "VersionError": "a version of the format that this reader does not know",
    "SizeError": "shorter or longer than its header says, or too short for what it counts",
    "ChecksumError": "the bytes are not those that were written",
    "LimitError": "a count, a size or a product of sizes above its limit; no tensor, or no op",
    "LayoutError": "a section or constant is not where the one before it ends: a hole, an overlap; or a gap, or zero "
    "or rest of the header, is not zero",
    "TextError": "names, classes, metadata or producer are not the text they should be",
    "TensorError": "a tensor record that contradicts itself, or a header that points at the wrong one: unknown dtype "
    "or place, a size of 0, other bytes than the shape takes; input not the one image of u8, output no activation of "
    "f32, not one class name for each of its channels; an activation of another dtype or rank",
    "ConstantError": "a constant that holds what it may not: no finite number, a bit above the last channel",
    "OpError": "an op record with an unknown code, a field it must not have, or lacks, or out of range, or a tensor "
    "of another place or dtype in it",
    "GraphError": "ops that do not fit together: read before written, written twice, never read, a wrong shape",
    "PlanError": "activations that are alive at the same time share memory, or one is not at a multiple of 64, or the "
    "arena is smaller or larger than they take",
}
