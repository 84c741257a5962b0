"""Edits of a valid packed file that each break one rule, by the error of that rule: the file, texts and tensors."""

import numpy as np
from damage import File, bases, sealed

from bnnfree.format import schema

BIG = 2**32 - 1
EDITS: dict[str, list] = {name: [] for name in schema.ERRORS}  # error -> (function, cases, sealed)


def edit(error, *cases, seal=True):
    """Adds edits: functions of a File (and of a case) that change it or return other bytes."""

    def add(function):
        rows = [case if isinstance(case, tuple) else (case,) for case in cases or ((),)]
        EDITS[error].append((function, rows, seal))
        return function

    return add


def damaged(function, case, seal) -> bytes:
    file = File(bases()[0])
    made = function(file, *case)
    blob = bytes(made if isinstance(made, (bytes, bytearray)) else file.blob)
    return sealed(blob) if seal else blob


# -- the file as a whole


@edit("MagicError", b"", b"bnnf", b"\x89PNG\r\n\x1a\n" + bytes(200), b"bnnf\n\x1a\n" + bytes(200), bytes(128),
      b"PK\x03\x04" + bytes(99), b"bnnf\r\n\x1a", b"{}", "größer".encode() * 30, seal=False)  # fmt: skip
def other_file(_, blob):
    return blob


@edit("VersionError", 0, schema.VERSION - 1, schema.VERSION + 1, BIG)
def version(f, value):
    f.header["version"] = value


@edit("SizeError", 8, 16, 127, 128, 5000, -1, seal=False)
def cut(f, size):
    return f.blob[:size]


@edit("SizeError", b"\0", bytes(64), b"x" * 5000, seal=False)
def appended(f, more):
    return bytes(f.blob) + more


@edit("SizeError", 0, 127, 2**32, 2**63, 2**64 - 1, seal=False)
def file_bytes(f, value):
    f.header["file_bytes"] = value


@edit("SizeError", ("tensor_count", 1 << 16), ("op_count", 1 << 16), ("name_bytes", 1 << 22),
      ("class_bytes", 1 << 22), ("metadata_bytes", 1 << 22))  # fmt: skip
def section_beyond_the_end(f, name, value):
    f.header[name] = value


@edit("SizeError", (2,), (1 << 20,))
def last_constant_beyond_the_end(f, side):
    last = f.constants()[-1]
    f.reshape(last, *([side] + f.tensor(last)["shape"][0, : f.tensor(last)["rank"][0]].tolist())[:4])


@edit("ChecksumError", 12, 15, 24, 40, 64, 127, 128, 500, 3000, 6000, -1, seal=False)
def flipped_bit(f, at):
    f.blob[at] ^= 16


@edit("LayoutError", 64, 70, 100, 127)
def header_rest(f, at):
    f.header["zero"] = at if at < 96 else 0
    if at >= 96:
        f.blob[at] = 1


@edit("LayoutError", *range(3, 6))
def gap_not_zero(f, section):
    end = f.sections[section].stop
    assert end % 64
    f.blob[end] = 1


@edit("LayoutError", 1, 63)
def gap_of_a_constant_not_zero(f, back):
    row = f.tensor(f.constants()[1])
    f.blob[int(row["offset"][0]) - 1 if back == 1 else f.constants_at + int(f.tensor(f.constants()[0])["bytes"][0])] = 9


@edit("LayoutError", bytes(1), bytes(64), b"\1" * 64)
def trailing_bytes(f, more):
    return bytes(f.blob) + more


@edit("LayoutError", 64)
def hole_before_the_constants(f, size):
    return f.blob[: f.constants_at] + bytes(size) + f.blob[f.constants_at :]


@edit("LayoutError", *[(n, by) for n in (0, 2, -1) for by in (-64, -1, 1, 64, 1 << 40, (1 << 64) - 4096)])
def constant_offset(f, number, by):
    row = f.tensor(f.constants()[number])
    row["offset"] = (int(row["offset"][0]) + by) % 2**64


@edit("LayoutError", (0, 1), (1, -1))
def swapped_offsets(f, a, b):
    places = f.constants()[[a, b]]
    f.tensors["offset"][places] = f.tensors["offset"][places[::-1]]


@edit("LayoutError", (0, 1), (2, -1))
def swapped_records(f, a, b):
    places = f.constants()[[a, b]]
    f.tensors[places] = f.tensors[places[::-1]].copy()


@edit("LayoutError")
def a_constant_turned_into_an_activation(f):
    f.tensor(f.constants()[3])["place"] = 1


# -- limits


@edit("LimitError", *[(n, v) for n in ("tensor_count", "op_count") for v in (0, (1 << 16) + 1, 1 << 31, BIG)],
      *[(n, v) for n in ("name_bytes", "class_bytes", "metadata_bytes") for v in ((1 << 22) + 1, 1 << 31, BIG)],
      *[("arena_bytes", v) for v in ((1 << 30) + 64, 1 << 63, 2**64 - 1)])  # fmt: skip
def count(f, name, value):
    f.header[name] = value


@edit("LimitError", *[(n, axis, v) for n in (0, 1, -1) for axis in (0, 2) for v in ((1 << 20) + 1, 1 << 31, BIG)])
def side(f, index, axis, value):
    f.tensors["shape"][index, axis] = value


@edit("LimitError", (1 << 20, 1 << 20, 3), (1 << 20, 128, 2), (1, 1 << 8, 1 << 20))
def huge_image(f, *shape):
    f.reshape(0, *shape)


@edit("LimitError", (1 << 20, 1 << 20, 1), (129, 1, 1 << 20), (1 << 20, 1 << 20, 1 << 20))
def huge_activation(f, *shape):
    f.reshape(f.activations()[0], *shape)


@edit("LimitError", (1 << 9, 1 << 10), (1 << 20, 1), (1 << 20, 1 << 20))
def taps(f, rows, columns):
    f.op("conv2d")["kernel_h"], f.op("conv2d")["kernel_w"] = rows, columns


@edit("LimitError", ("pixel_conv2d", 1 << 20), ("binary_conv2d", 1 << 14), ("conv2d", 1 << 20))
def padding(f, name, value):
    f.op(name)["padding_h"] = f.op(name)["padding_w"] = value


@edit("LimitError", 1 << 20)
def stride_of_a_pooling_with_ceil(f, value):
    f.op("max_pool2d")["stride_h"] = f.op("max_pool2d")["stride_w"] = value


@edit("LimitError", 1025, 5000)
def many_keys(f, count):
    return f.retext(metadata=b"".join(b"k%d\nv\n" % i for i in range(count)))


@edit("LimitError", b"k" * 1025 + b"\nv\n", b"a\nb\n" + b"k" * 2000 + b"\nv\n")
def long_key(f, text):
    return f.retext(metadata=text)


@edit("LimitError", *[(op, field, value) for op in ("conv2d", "avg_pool2d", "pixel_conv2d", "binary_conv2d")
                      for field in schema.WINDOW_FIELDS if field not in ("pad_value", "ceil")
                      for value in ((1 << 20) + 1, 1 << 31, BIG)])  # fmt: skip
def large_window_field(f, op, field, value):
    f.op(op)[field] = value


@edit("LimitError", "names", "classes")
def long_line(f, part):
    return f.retext(**{part: b"x" * 1025 + b"\n" + f.texts()[part].split(b"\n", 1)[1]})


# -- texts


@edit("TextError", *[(part, text) for part in ("names", "classes") for text in (
    b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"", b"\x1b[2J", b"a\0b", b"a\rb", b"\x7f", "\x9b2J".encode(), b"a\tb",
)])  # fmt: skip
def first_line(f, part, text):
    return f.retext(**{part: text + b"\n" + f.texts()[part].split(b"\n", 1)[1]})


@edit("TextError", b"one more\n", b"no end", b"\n")
def names_appended(f, more):
    return f.retext(names=f.texts()["names"] + more)


@edit("TextError", b"", b"only one\n")
def too_few_names(f, names):
    return f.retext(names=names)


@edit("TextError", b"no end", b"\n")
def classes_appended(f, more):
    return f.retext(classes=f.texts()["classes"] + more)


@edit("TextError", b"a\n", b"a\nb\nc\n", b"a\n\n", b"\nb\n", b"a\nb", b"{}", b"a\nb\na\nb\n", b"a\nb\nc\nd\na\ne\n",
      b"a\nb\0\n", b"a\x1b\nb\n", b"a\nb\x7f\n", b"a\n\xff\n", b"a\n\xed\xa0\x80\n", b"\xc2\x9b\nb\n",
      b"a\r\nb\r\n")  # fmt: skip
def metadata(f, text):
    return f.retext(metadata=text)


@edit("TextError", b"\xffa", b"a\x1b[2J", b"a\0b", b"a\x7f", b"\0a", "ü".encode(), b"a" * 31 + b"\n")
def producer(f, text):
    f.blob[64:96] = text.ljust(32, b"\0")


# -- tensors and constants


@edit("TensorError", *[(f, v) for f in ("dtype", "place") for v in (5, 255)], ("rank", 0), ("rank", 5), ("rank", 255),
      ("zero", 1), ("zeros", 1 << 31), ("bytes", 0), ("bytes", 1 << 63), ("bytes", 2**64 - 1))  # fmt: skip
def tensor_field(f, name, value):
    f.tensors[name][1] = value


@edit("TensorError", (0, -1), (0, 1), (1, 1), (-1, -1))
def tensor_bytes(f, index, by):
    f.tensors["bytes"][index] = int(f.tensors["bytes"][index]) + by


@edit("TensorError", *[(n, axis) for n in (0, 1, -1) for axis in (0, 2)])
def size_of_zero(f, index, axis):
    f.tensors["shape"][index, axis] = 0


@edit("TensorError", *range(3))
def rank_below_the_shape(f, rank):
    f.tensors["rank"][0] = rank


@edit("TensorError", (1 << 16, 1 << 16, 1 << 16, 1 << 16), (1 << 20,) * 4, (1 << 20, 1 << 20, 1 << 20, 16))
def product_that_leaves_64_bits(f, *shape):
    f.tensors["shape"][1], f.tensors["rank"][1] = shape, 4


@edit("TensorError", 0, 1, 2)
def image_dtype(f, dtype):
    f.tensors["dtype"][0] = dtype
    f.reshape(0, 5, 4, 3)


@edit("TensorError", (60,), (20, 3), (5, 4, 3, 1))
def image_shape(f, *shape):
    f.reshape(0, *shape)


@edit("TensorError", 1, 64, 2**63)
def image_offset(f, value):
    f.tensors["offset"][0] = value


@edit("TensorError", 0, 2)
def number_of_images(f, count):
    index = 0 if count == 0 else f.activations()[0]
    f.tensors["place"][index], f.tensors["offset"][index] = (1 if count == 0 else 2), 0
    f.tensors["dtype"][index] = 3
    f.reshape(index, 5, 4, 4 if count else 3)


@edit("TensorError")
def input_is_another_tensor(f):
    f.header["input"] = f.activations()[0]


@edit("TensorError", *[(n, v) for n in ("input", "output") for v in (None, BIG)])
def index_beyond_the_table(f, name, value):
    f.header[name] = value or len(f.tensors)


@edit("TensorError", "constant", "image", "bits")
def output(f, kind):
    bits = np.flatnonzero((f.tensors["place"] == 1) & (f.tensors["dtype"] == 1))
    f.header["output"] = {"constant": f.constants()[0], "image": 0, "bits": bits[0]}[kind]


@edit("TensorError", b"one\n", b"")
def class_names(f, classes):
    more = f.texts()["classes"]
    return f.retext(classes=classes or more + b"one more\n")


@edit("TensorError", 2, 4)
def activation_dtype(f, dtype):
    index = f.activations()[0]
    f.tensors["dtype"][index] = dtype
    f.reshape(index, 5, 4, 4)


@edit("TensorError", (20, 4), (80,), (5, 4, 4, 1))
def activation_rank(f, *shape):
    f.reshape(f.activations()[0], *shape)


@edit("ConstantError", *[(op, field, v) for v in (np.nan, np.inf, -np.inf) for op, field in (
    ("pixel_conv2d", "scale"), ("pixel_conv2d", "bias"), ("pixel_conv2d", "slope"), ("binary_conv2d", "scale"),
)], *[("binary_conv2d", field, np.nan) for field in ("low", "high")],
      ("pixel_conv2d", "threshold", np.nan), ("pixel_conv2d", "threshold", -np.nan),
      *[(op, "weights", v) for op in schema.NORMS for v in (np.nan, np.inf, -np.inf)])  # fmt: skip
def no_finite_number(f, op, field, value):
    f.data(f.op(op)[field], "<f4")[-1] = value


@edit("ConstantError", "low", "high")
def infinite_limit_that_is_a_scale_too(f, field):
    op = f.op("binary_conv2d")
    f.data(op[field], "<f4")[0], op["scale"] = np.inf, op[field]


@edit("ConstantError", ("pixel_conv2d", "flip", 4), ("pixel_conv2d", "flip", 63), ("binary_conv2d", "weights", 4),
      ("binary_conv2d", "weights", 31))  # fmt: skip
def bit_above_the_last_channel(f, op, field, bit):
    f.data(f.op(op)[field], "<u8")[-1] |= np.uint64(1 << bit)
