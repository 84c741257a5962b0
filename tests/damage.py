"""Valid packed files that hold every op between them, and what it takes to damage them with care."""

import functools

import numpy as np
import torch
from packed import AFTER, PARTS, Net, fields_of
from torch import nn

from bnnfree.export import pack
from bnnfree.format import PackedModel, from_bytes, seal, to_bytes
from bnnfree.format.schema import ALIGN, HEADER_TYPE, OP_TYPE, OPS, TENSOR_TYPE
from bnnfree.nn import BinaryConv2d, RPReLU, RSign

SAME = fields_of((3, 3), padding=(1, 1))


def with_text(model: PackedModel) -> PackedModel:
    """The model with class names, metadata and a producer, through its file."""
    model.classes = [f"class {i}, größer" for i in range(model.tensors[model.output].shape[2])]
    model.metadata = {"mean": "0.5", "note": "größer, 日本", "a key": "x" * 2000}
    model.producer = "test 1.0"
    return from_bytes(to_bytes(model))


def every_op() -> PackedModel:
    """All ops, dtypes, places and epilogue parts in one small model."""
    net = Net(5, 4, 3)
    stem = net.add("pixel_conv2d", 0, outputs=4, parts=("slope",), writes="both", threshold="f32", flip=True, **SAME)
    signs = net.ops[-1].bits
    inner = net.add("binary_conv2d", signs, outputs=8, parts=PARTS, other=stem, **SAME)
    wide = net.add("binary_conv2d", signs, outputs=66, writes="bits", threshold="i32", flip=True, groups=2,
                   pad_value=-1, **SAME)  # fmt: skip
    net.add("pointwise", wide, parts=("scale",))
    net.add("conv2d", inner, outputs=2, weights="i8", groups=2, pad_value=1, **fields_of((2, 3), (2, 1), (0, 1)))
    net.add("conv2d", inner, outputs=3, weights="bits", **fields_of((1, 2), dilation=(1, 2)))
    net.add("max_pool2d", inner, ceil=1, **fields_of((2, 3), (2, 2), (1, 1)))
    net.add("avg_pool2d", inner, **fields_of((3, 2), (2, 1), (1, 1), (1, 2)))
    net.add("pointwise", 0, parts=("bias",))
    net.add("softmax", net.add("concat", inner, other=stem))
    net.add("group_norm", inner, groups=2, parts=("scale", "bias"))
    net.add("rms_norm", inner, groups=8, parts=PARTS, other=stem, writes="both", threshold="f32", flip=True)
    new_ops(net, inner, stem, signs)
    return with_text(net.model())


def new_ops(net: Net, inner: int, stem: int, signs: int) -> None:
    """Ops over channels and positions, of floats [5, 4, 8] and [5, 4, 4] and of bits [5, 4, 4]."""
    gate = net.add("function", net.add("avg_pool2d", inner, **fields_of((5, 4))), parts=("bias",))
    net.add("pointwise", inner, parts=(*PARTS, *AFTER), other=gate, factor=stem, other_last=1)
    net.add("function", inner, mode=2, factor=gate, writes="both", threshold="f32")
    net.add("channel_norm", inner, groups=1, mode=1, parts=("scale",))
    net.add("conv_transpose2d", inner, outputs=2, groups=2, kernel_h=2, kernel_w=3, stride_h=2, stride_w=1, padding_w=1,
            dilation_h=1, dilation_w=1, size_h=11, size_w=4)  # fmt: skip
    for source in (inner, signs):
        net.add("take", source, outputs=5)
        net.add("crop", source, padding_h=1, stride_h=2, stride_w=1, size_h=2, size_w=3)
    net.add("pad", inner, mode=1, padding_h=2, after_w=1)
    net.add("pad", signs, pad_value=-1, padding_w=1, after_h=1)
    net.add("resize", inner, mode=1, size_h=3, size_w=7)
    net.add("pixel_shuffle", inner, stride_h=2, stride_w=2)
    net.add("reduce_channels", inner, mode=2)
    net.add("max_pool2d", net.add("concat", signs, other=net.add("xor", signs, other=signs)), **fields_of((2, 2)))


def residual() -> PackedModel:
    """Bits and floats side by side, other sizes, more than one word of channels."""
    net = Net(3, 7, 1, seed=1, numbers="wild")
    stem = net.add("pixel_conv2d", 0, outputs=70, writes="both", threshold="f32", **fields_of((2, 3), (1, 2), (1, 2)))
    signs = net.ops[-1].bits
    for _ in range(2):
        stem = net.add("binary_conv2d", signs, outputs=70, parts=PARTS, other=stem, writes="both", pad_value=1,
                       **SAME)  # fmt: skip
        signs = net.ops[-1].bits
    net.add("pointwise", signs, parts=("scale", "bias"))
    net.add("conv2d", stem, outputs=5, parts=("scale", "bias"), **fields_of((1, 1)))
    return with_text(net.model())


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.sign = RSign(5)
        self.inner = BinaryConv2d(5, 9, 3, padding=1)
        self.act = RPReLU(9)
        self.head = nn.Linear(9, 4)

    def forward(self, x):
        return self.head(self.act(self.inner(self.sign(self.stem(x)))).mean((2, 3)))


@functools.cache
def bases() -> tuple[bytes, ...]:
    """The files: by hand, and by the exporter."""
    torch.manual_seed(0)
    exported = pack(Tiny().eval(), image_size=(5, 6), mean=0.5, std=0.25)
    return tuple(to_bytes(model) for model in (every_op(), residual(), with_text(exported.model)))


class File:
    """A file whose records can be changed in place: `header`, `tensors` and `ops` are numpy records of `blob`."""

    def __init__(self, blob: bytes):
        self.blob = bytearray(blob)
        self.header = np.frombuffer(self.blob, HEADER_TYPE, 1)[0:1]
        counts = [int(self.header["tensor_count"][0]), int(self.header["op_count"][0])]
        sizes = [128, counts[0] * TENSOR_TYPE.itemsize, counts[1] * OP_TYPE.itemsize]
        sizes += [int(self.header[f"{part}_bytes"][0]) for part in ("name", "class", "metadata")]
        self.sections, at = [], 0
        for size in sizes:
            at += -at % ALIGN
            self.sections.append(slice(at, at + size))
            at += size
        self.constants_at = at + -at % ALIGN
        self.tensors = np.frombuffer(self.blob, TENSOR_TYPE, counts[0], self.sections[1].start)
        self.ops = np.frombuffer(self.blob, OP_TYPE, counts[1], self.sections[2].start)
        self.model = from_bytes(blob)

    def op(self, name: str, number: int = 0) -> np.ndarray:
        """The record of the `number`-th op of that name, as an array of one."""
        at = np.flatnonzero(self.ops["code"] == OPS[name].code)[number]
        return self.ops[at : at + 1]

    def tensor(self, index) -> np.ndarray:
        """The record of a tensor, as an array of one; `index` may be a field of an op's record."""
        index = int(np.asarray(index).reshape(-1)[0])
        return self.tensors[index : index + 1]

    def data(self, index, dtype) -> np.ndarray:
        """The values of a constant, flat and writable."""
        row = self.tensor(index)
        size = int(row["bytes"][0]) // np.dtype(dtype).itemsize
        return np.frombuffer(self.blob, dtype, size, int(row["offset"][0]))

    def constants(self) -> np.ndarray:
        """Indices of the constants, in order."""
        return np.flatnonzero(self.tensors["place"] == 0)

    def activations(self) -> np.ndarray:
        return np.flatnonzero(self.tensors["place"] == 1)

    def reshape(self, index, *shape: int) -> None:
        """Give a tensor another shape, and the bytes that go with it."""
        row = self.tensor(index)
        row["shape"], row["rank"] = (*shape, *[1] * (4 - len(shape))), len(shape)
        item, count = {0: 4, 1: 8, 2: 1, 3: 1, 4: 4}[int(row["dtype"][0])], 1
        for side in (*shape[:-1], -(-shape[-1] // 64)) if row["dtype"][0] == 1 else shape:
            count *= side
        row["bytes"] = count * item

    def texts(self) -> dict[str, bytes]:
        """names, classes and metadata as they stand."""
        return {name: bytes(self.blob[part]) for name, part in zip(TEXTS, self.sections[3:], strict=True)}

    def retext(self, **texts: bytes) -> bytes:
        """The sealed file with other texts; the constants move with their offsets."""
        whole = bytes(self.blob[self.constants_at :])
        parts = [bytes(self.blob[part]) for part in self.sections[:3]] + list((self.texts() | texts).values())
        made = b""
        for part in parts:
            made += bytes(-len(made) % ALIGN) + part
        made += bytes(-len(made) % ALIGN)
        moved = len(made) - self.constants_at
        blob = bytearray(made + whole)
        header = np.frombuffer(blob, HEADER_TYPE, 1)
        for name, field in zip(TEXTS, ("name_bytes", "class_bytes", "metadata_bytes"), strict=True):
            header[field] = len((self.texts() | texts)[name])
        tensors = np.frombuffer(blob, TENSOR_TYPE, len(self.tensors), self.sections[1].start)
        tensors["offset"][self.constants()] += np.uint64(moved % 2**64)
        return sealed(blob)


TEXTS = ("names", "classes", "metadata")


def sealed(blob: bytes | bytearray) -> bytes:
    """The file with its own size and checksum in the header, if it has a whole one."""
    blob = bytearray(blob)
    if len(blob) >= 128:
        blob[16:24] = len(blob).to_bytes(8, "little")
        seal(blob)
    return bytes(blob)
