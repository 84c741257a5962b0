"""Single ops of the shapes that usual networks have, as packed models with random weights: what a kernel takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from bnnfree.bench.peak import BASE
from bnnfree.engine import Engine
from bnnfree.format import Op, PackedModel, Tensor, make_op, plan
from bnnfree.format.schema import NORMS, OPS
from bnnfree.format.shapes import Shape as Sizes
from bnnfree.format.shapes import check_shapes, count_classes
from bnnfree.ops import Window, pack_bits


@dataclass
class Shape:
    """One op. side: of its square input; epilogue, for ops that have a choice: "sign" (a threshold on the sum, bits
    out), "float" (scale and bias, floats out) or "block" (these, the shortcut, slope, thresholds; floats and bits out).
    """

    op: str
    side: int
    channels: int
    outputs: int
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    weights: str = "bits"
    epilogue: str = ""
    groups: int = 1
    fields: dict[str, int] = field(default_factory=dict)  # more of the op's record

    @property
    def text(self) -> str:
        window = f"{self.kernel}x{self.kernel}" + (f"/{self.stride}" if self.stride > 1 else "")
        groups = f" in {self.groups} groups" if self.groups > 1 else ""
        modes = OPS[self.op].modes
        ending = self.epilogue or (modes[self.fields.get("mode", 0)] if modes else "")
        return f"{window} {self.channels}->{self.outputs}@{self.side}{groups} {ending}".rstrip()


STAGES = ((56, 64), (28, 128), (14, 256), (7, 512))  # side and channels of a ResNet-18
SHAPES = [
    *(
        Shape("binary_conv2d", side, channels, channels, 3, 1, 1, epilogue=end)
        for end in ("sign", "float", "block")
        for side, channels in STAGES
    ),
    Shape("binary_conv2d", 56, 64, 128, 3, 2, 1, epilogue="block"),
    Shape("binary_conv2d", 14, 512, 512, 1, epilogue="block"),
    Shape("binary_conv2d", 7, 1024, 1024, 1, epilogue="block"),
    Shape("pixel_conv2d", 224, 3, 64, 7, 2, 3, "i8"),
    Shape("pixel_conv2d", 224, 3, 32, 3, 2, 1, "i8"),
    Shape("conv2d", 28, 64, 128),
    Shape("conv2d", 7, 256, 512),
    Shape("conv2d", 1, 512, 1000, weights="i8"),
    Shape("conv2d", 55, 64, 64, 3, 2, 1, "f32", groups=64),
    Shape("conv2d", 14, 512, 512, 3, 1, 1, "f32", groups=512),
    Shape("conv2d", 112, 32, 32, 3, 1, 1, "f32", groups=4),
    Shape("max_pool2d", 112, 64, 64, 3, 2, 1),
    Shape("avg_pool2d", 56, 64, 64, 2, 2),
    Shape("avg_pool2d", 7, 512, 512, 7),
    Shape("pointwise", 56, 64, 64, epilogue="sign"),
    Shape("concat", 28, 128, 256),
    Shape("softmax", 1, 1000, 1000),
    Shape("group_norm", 28, 128, 128, epilogue="block"),
    Shape("rms_norm", 28, 128, 128, epilogue="block"),
    Shape("channel_norm", 28, 128, 128),
    *(Shape("function", 28, 128, 128, fields={"mode": mode}) for mode in (0, 2)),
    Shape("conv_transpose2d", 14, 64, 32, 2, 2, fields={"size_h": 28, "size_w": 28}, weights="f32"),
    Shape("take", 28, 128, 64),
    Shape("crop", 28, 64, 64, stride=2, fields={"size_h": 14, "size_w": 14}),
    Shape("pad", 28, 64, 64, padding=1, fields={"mode": 1}),
    *(Shape("resize", 28, 64, 64, fields={"mode": mode, "size_h": 56, "size_w": 56}) for mode in (0, 1)),
    Shape("pixel_shuffle", 28, 128, 32, stride=2),
    Shape("reduce_channels", 28, 128, 1),
    Shape("xor", 28, 128, 128),
]


@dataclass
class Case:
    """A shape and the engine that runs it; isa: its backend; number: of the op that is meant."""

    shape: Shape
    isa: str
    engine: Engine
    number: int

    @property
    def kernel(self) -> str:
        return self.engine.kernels()[self.number]

    @property
    def label(self) -> str:
        """Name of the instruction set in reports, the same in those of every version."""
        return "avx512 base" if self.isa == BASE else self.isa


def cases(backends: Iterable[str], threads: int = 1) -> Iterator[Case]:
    """Each shape with each backend; with BASE only where other kernels run than with avx512."""
    backends = list(backends)
    for shape in SHAPES:
        model, number = model_of(shape)
        seen = None
        for name in backends:
            engine = Engine(model, name, threads)
            case = Case(shape, engine.backend, engine, number)
            if case.isa != BASE or case.kernel != seen:
                yield case
            seen = case.kernel if case.isa == "avx512" else seen


@dataclass
class _Maker:
    """A packed model in the making, of random constants."""

    random: np.random.Generator
    tensors: list[Tensor]
    ops: list[Op] = field(default_factory=list)

    def constant(self, data: np.ndarray) -> int:
        """Arrays of bool become bits."""
        dtype = {"b": "bits", "f": "f32"}.get(data.dtype.kind, f"i{8 * data.itemsize}")
        words = pack_bits(data) if dtype == "bits" else data
        self.tensors.append(Tensor(f"constant{len(self.tensors)}", dtype, "constant", data.shape, data=words))
        return len(self.tensors) - 1

    def activation(self, dtype: str, shape: tuple[int, ...]) -> int:
        self.tensors.append(Tensor(f"activation{len(self.tensors)}", dtype, "activation", shape))
        return len(self.tensors) - 1

    def floats(self, *shape: int) -> int:
        return self.constant(self.random.standard_normal(shape).astype(np.float32))

    def source(self, dtype: str, shape: tuple[int, ...]) -> int:
        """The image as signs or as floats."""
        written = self.activation(dtype, shape)
        fields = {"real": written}
        if dtype == "bits":
            fields = {"bits": written, "threshold": self.constant(np.full(shape[2], 128, np.float32))}
        self.ops.append(make_op("pointwise", input=0, **fields))
        return written


def model_of(shape: Shape, seed: int = 0) -> tuple[PackedModel, int]:
    """The packed model, and the number of the op that is meant: its input and output need ops of their own."""
    square = (shape.side, shape.side, shape.channels)
    make = _Maker(np.random.default_rng(seed), [Tensor("image", "u8", "image", square)])
    dtype = OPS[shape.op].inputs[0]
    fields = {"input": 0 if dtype == "u8" else make.source(dtype, square), **shape.fields}
    if shape.op in ("concat", "xor"):
        fields["other"] = make.source(dtype, square)
    numbers = {"kernel": shape.kernel, "stride": shape.stride, "padding": shape.padding, "after": shape.padding}
    named = {f"{name}_{axis}": value for name, value in numbers.items() for axis in "hw"}
    fields |= {name: value for name, value in named.items() if name in OPS[shape.op].window}
    if OPS[shape.op].weights:
        fields |= _weights(make, shape)
    written = check_shapes(PackedModel(make.tensors, [], 0, 0), make_op(shape.op, **fields), shape.op)
    window = Window(*[(n, n) for n in (shape.kernel, shape.stride, shape.padding)])
    fields |= _epilogue(make, shape, written, window)
    writes_bits = shape.epilogue in ("sign", "block") or shape.op == "xor"
    if shape.epilogue != "sign" and shape.op != "xor":
        fields["real"] = make.activation("f32", written)
    if writes_bits:
        fields["bits"] = make.activation("bits", written)
    make.ops.append(make_op(shape.op, **fields))
    number = len(make.ops) - 1
    output = fields.get("real", len(make.tensors) - 1)
    if "bits" in fields:  # an output is made of floats, and nothing may be left unread
        output = make.activation("f32", written)
        more = {"other": fields["real"]} if "real" in fields else {}
        make.ops.append(make_op("pointwise", input=fields["bits"], real=output, **more))
    model = PackedModel(make.tensors, make.ops, 0, output)
    plan(model)
    return model, number


def _weights(make: _Maker, shape: Shape) -> dict[str, int]:
    """Constant of the weights, and the groups of a convolution."""
    if shape.op in NORMS:  # 16 channels a group; each of its own
        groups = shape.channels // (16 if shape.op == "group_norm" else 1)
        return {"weights": make.constant(np.full(groups, 1e-5, np.float32))}
    if shape.op == "channel_norm":
        return {"weights": make.constant(np.full(1, 1e-5, np.float32))}
    if shape.op == "take":
        return {"weights": make.constant(make.random.permutation(shape.channels)[: shape.outputs].astype(np.int32))}
    sizes = (shape.outputs, shape.kernel, shape.kernel, shape.channels // shape.groups)
    if shape.weights == "f32":
        weights = make.floats(*sizes)
    elif shape.weights == "bits":
        weights = make.constant(make.random.random(sizes) < 0.5)
    else:
        weights = make.constant(make.random.integers(-127, 128, sizes).astype(np.int8))
    return {"weights": weights, "groups": shape.groups}


def _epilogue(make: _Maker, shape: Shape, written: Sizes, window: Window) -> dict[str, int]:
    outputs = shape.outputs
    if shape.op == "pixel_conv2d":
        classes = [count_classes(side) for side in window.sides(shape.side, shape.side)]
        return {"scale": make.floats(outputs), "bias": make.floats(*classes, outputs)}
    if shape.epilogue == "sign":
        whole = shape.op == "binary_conv2d"
        near = make.random.integers(-9, 10, outputs)
        return {"threshold": make.constant(near.astype(np.int32 if whole else np.float32))}
    if shape.epilogue == "block":
        shortcut = make.activation("f32", written)
        _shortcut(make, shape, shortcut, written)
        fields = {name: make.floats(outputs) for name in ("scale", "bias", "slope", "threshold")}
        return {**fields, "other": shortcut}
    if shape.op == "conv2d" or shape.epilogue == "float":
        return {"scale": make.floats(outputs), "bias": make.floats(outputs)}
    return {}


def _shortcut(make: _Maker, shape: Shape, shortcut: int, written: Sizes) -> None:
    """Floats of the output's shape: the image, through a 1x1 convolution where its shape is another."""
    if written == (shape.side, shape.side, shape.channels):
        make.ops.append(make_op("pointwise", input=0, real=shortcut))
        return
    weights = make.constant(np.ones((written[2], 1, 1, shape.channels), np.int8))
    window = Window((1, 1), (shape.stride, shape.stride))
    classes = [count_classes(side) for side in window.sides(shape.side, shape.side)]
    fields = {"weights": weights, "scale": make.floats(written[2]), "bias": make.floats(*classes, written[2])}
    kernel = {"kernel_h": 1, "kernel_w": 1, "stride_h": shape.stride, "stride_w": shape.stride}
    make.ops.append(make_op("pixel_conv2d", input=0, real=shortcut, **fields, **kernel))
