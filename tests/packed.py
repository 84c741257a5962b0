"""Packed models built by hand, op by op, for the tests of the engines and of what reads the format."""

import numpy as np

from bnnfree import ops
from bnnfree.format import PackedModel, Tensor, from_bytes, make_op, plan, to_bytes
from bnnfree.format.schema import CONVOLUTIONS, NORMS, OPS, POOLINGS

F32 = np.float32
PARTS = ("scale", "bias", "other", "slope", "low", "high")
AFTER = ("scale_after", "bias_after")
WILD = np.array([0.0, -0.0, 1e-45, -1e-45, 1.1e-38, -3e-39, 3e38, -3e38, 1e30, -1e20, 1.0, -1.0, 1 / 3], F32)

GEOMETRIES = [  # height, width, kernel, stride, padding, dilation
    (1, 1, (1, 1), (1, 1), (0, 0), (1, 1)),
    (5, 4, (1, 1), (2, 2), (0, 0), (1, 1)),
    (4, 3, (1, 1), (3, 1), (1, 1), (1, 1)),
    (5, 7, (3, 3), (1, 1), (1, 1), (1, 1)),
    (6, 5, (3, 3), (2, 2), (1, 1), (1, 1)),
    (7, 6, (2, 2), (1, 1), (1, 1), (1, 1)),
    (9, 8, (5, 5), (3, 3), (2, 2), (1, 1)),
    (9, 10, (7, 7), (2, 2), (3, 3), (1, 1)),
    (8, 9, (3, 3), (1, 1), (2, 2), (2, 2)),
    (6, 9, (3, 2), (2, 1), (0, 1), (1, 2)),
    (4, 7, (1, 5), (1, 3), (0, 2), (1, 1)),
    (3, 3, (3, 3), (1, 1), (2, 2), (1, 1)),
]


def fields_of(kernel, stride=(1, 1), padding=(0, 0), dilation=(1, 1), after=None, **more) -> dict[str, int]:
    """The window fields of an op; after: padding below and on the right (None: as above and on the left)."""
    after = padding if after is None else after
    pairs = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation, "after": after}
    return {f"{name}_{axis}": pair[i] for name, pair in pairs.items() for i, axis in enumerate("hw")} | more


MOVES = {name for name, op in OPS.items() if op.moves}


def _taken(net, fields, shape, outputs):
    least = 0 if net.tensors[fields["input"]].dtype == "bits" else -1
    fields["weights"] = net.constant(net.random.integers(least, shape[2], outputs).astype(np.int32), "i32")
    return *shape[:2], outputs


def _transposed(net, fields, shape, outputs):
    groups = fields.setdefault("groups", 1)
    fields["weights"] = net._weights("f32", (outputs, fields["kernel_h"], fields["kernel_w"], shape[2] // groups))
    return fields["size_h"], fields["size_w"], outputs


def _shuffled(net, fields, shape, _):
    (height, width, channels), rows, columns = shape, fields["stride_h"], fields["stride_w"]
    if fields.get("mode"):
        return height // rows, width // columns, channels * rows * columns
    return height * rows, width * columns, channels // (rows * columns)


def _padded(net, fields, shape, _):
    around = [fields.get(f"padding_{axis}", 0) + fields.get(f"after_{axis}", 0) for axis in "hw"]
    return shape[0] + around[0], shape[1] + around[1], shape[2]


RESULTS = {  # name -> the result's shape; some give their op constants
    "take": _taken,
    "conv_transpose2d": _transposed,
    "pixel_shuffle": _shuffled,
    "pad": _padded,
    "crop": lambda net, fields, shape, _: (fields["size_h"], fields["size_w"], shape[2]),
    "resize": lambda net, fields, shape, _: (fields["size_h"], fields["size_w"], shape[2]),
    "reduce_channels": lambda net, fields, shape, _: (*shape[:2], 1),
}


class Net:
    """A model in the making; activations are indices. Constants are random: `tame` (about 1), `whole` (small whole
    numbers and powers of two, so that every float sum is exact) or `wild` (denormal, huge, zeros of both signs)."""

    def __init__(self, height, width, channels, seed=0, numbers="tame"):
        self.random = np.random.default_rng(seed)
        self.numbers = numbers
        self.tensors = [Tensor("image", "u8", "image", (height, width, channels))]
        self.ops = []

    def values(self, shape) -> np.ndarray:
        random = self.random
        if self.numbers == "whole":
            return (random.integers(1, 4, shape) * random.choice([-1, 1], shape)).astype(F32)
        tame = random.standard_normal(shape).astype(F32)
        return (
            tame if self.numbers == "tame" else np.where(random.random(shape) < 0.5, random.choice(WILD, shape), tame)
        )

    def constant(self, array, dtype="f32") -> int:
        """Arrays of bool become bits."""
        array = np.asarray(array)
        data = ops.pack_bits(array) if dtype == "bits" else array
        self.tensors.append(Tensor(f"constant {len(self.tensors)}", dtype, "constant", array.shape, data=data))
        return len(self.tensors) - 1

    def activation(self, dtype, shape) -> int:
        self.tensors.append(Tensor(f"t{len(self.tensors)}", dtype, "activation", tuple(shape)))
        return len(self.tensors) - 1

    def shape(self, index) -> tuple[int, ...]:
        return self.tensors[index].shape

    def add(self, name, source, *, outputs=None, parts=(), other=None, writes="real", weights=None, threshold=None,
            flip=False, factor=None, other_last=0, **window) -> int:  # fmt: skip
        """One more op; returns what it writes: the real of "both". threshold: None, "f32" or "i32"."""
        height, width, channels = self.shape(source)
        if name in MOVES and self.tensors[source].dtype == "bits":
            writes = "bits"
        groups = window.pop("groups", 1) if name in NORMS or name == "channel_norm" else None
        for axis in "hw" if "padding_h" in window and name in (*CONVOLUTIONS, *POOLINGS) else "":
            window.setdefault(f"after_{axis}", window[f"padding_{axis}"])
        spatial = name in (*CONVOLUTIONS, *POOLINGS) and ops.Window(*[(window[f"{n}_h"], window[f"{n}_w"])
                                          for n in ("kernel", "stride", "padding", "dilation", "after")])  # fmt: skip
        fields = {"input": source, "factor": factor, "other_last": other_last, **window}
        if name in CONVOLUTIONS:
            kind = weights or {"binary_conv2d": "bits", "pixel_conv2d": "i8", "conv2d": "f32"}[name]
            fields["weights"] = self._weights(kind, (outputs, *spatial.size, channels // window.get("groups", 1)))
            if name == "pixel_conv2d":
                parts = {"scale", "bias", *parts}
                bias_shape = tuple(len(ops.border_classes(side)[1]) for side in spatial.sides(height, width))
            height, width = spatial.output(height, width)
            channels = outputs
        elif name in POOLINGS:
            height, width = ops.pool_output(spatial, height, width, bool(window.get("ceil")))
        elif name in ("concat", "xor"):
            fields["other"] = other
            channels += self.shape(other)[2] if name == "concat" else 0
        elif groups:
            fields["weights"] = self._eps(groups)
        elif name in RESULTS:
            height, width, channels = RESULTS[name](self, fields, (height, width, channels), outputs)
        for part in (*PARTS, *AFTER):
            if part == "other" and part in parts:
                fields["other"] = other
            elif part in parts:
                whole = (*bias_shape, channels) if part == "bias" and name == "pixel_conv2d" else (channels,)
                fields[part] = self.constant(self._part(part, whole))
        if writes != "real":
            if threshold == "i32":
                terms = int(np.prod(self.shape(fields["weights"])[1:]))
                fields["threshold"] = self.constant(self._whole_thresholds(terms, channels), "i32")
            elif threshold:
                fields["threshold"] = self.constant(self.values((channels,)))
            if flip:
                fields["flip"] = self.constant(self.random.random(channels) < 0.5, "bits")
        results = {}
        for kind, dtype in (("real", "f32"), ("bits", "bits")):
            if writes in (kind, "both"):
                results[kind] = fields[kind] = self.activation(dtype, (height, width, channels))
        self.ops.append(make_op(name, **fields))
        return results.get("real", results.get("bits"))

    def _weights(self, kind, shape) -> int:
        if kind == "bits":
            return self.constant(self.random.random(shape) < 0.5, "bits")
        if kind == "i8":
            extremes = self.random.choice(np.array([-128, -127, 127, 0], np.int8), shape)
            plain = self.random.integers(-128, 128, shape).astype(np.int8)
            return self.constant(np.where(self.random.random(shape) < 0.2, extremes, plain), "i8")
        return self.constant(self.values(shape))

    def _eps(self, groups) -> int:
        values = self.values((groups,))
        return self.constant(values if self.numbers == "wild" else np.abs(values) * F32(1e-3))

    def _part(self, part, shape) -> np.ndarray:
        values = self.values(shape)
        if self.numbers == "whole" and part in ("scale", "slope"):
            return np.copysign(F32(0.5), values)
        return values if part not in ("low", "high") or self.numbers == "wild" else values * F32(9)

    def _whole_thresholds(self, terms, channels) -> np.ndarray:
        near = self.random.integers(-terms - 1, terms + 2, channels)
        ends = self.random.choice(np.array([-(2**31), 2**31 - 1, terms, -terms]), channels)
        return np.where(self.random.random(channels) < 0.2, ends, near).astype(np.int32)

    def real(self, channels) -> int:
        """A float activation of the image's height and width."""
        return self.add("pixel_conv2d", 0, outputs=channels, **fields_of((1, 1)))

    def bits(self, channels) -> int:
        """A bits activation of the image's height and width."""
        return self.add("pixel_conv2d", 0, outputs=channels, writes="bits", threshold="f32", flip=True,
                        **fields_of((1, 1)))  # fmt: skip

    def model(self, output=None, **more) -> PackedModel:
        """The model, through its file. Without an `output` all that nothing reads is averaged and joined to one."""
        if output is None:
            read = {index for op in self.ops for index in op.reads()}
            ends = [i for i, t in enumerate(self.tensors) if t.place == "activation" and i not in read]
            ends = [i if self.tensors[i].dtype == "f32" else self.add("pointwise", i) for i in ends]
            ends = [self.add("avg_pool2d", i, **fields_of(self.shape(i)[:2])) for i in ends]
            output = ends[0]
            for end in ends[1:]:
                output = self.add("concat", output, other=end)
        model = PackedModel(self.tensors, self.ops, 0, output, **more)
        plan(model)
        return from_bytes(to_bytes(model))


def images(model, count, seed=0) -> np.ndarray:
    """Random pixels for a model or a Net, some rows all 0 or all 255."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (count, *model.tensors[0].shape), np.uint8)
    pixels[random.random(pixels.shape[:2]) < 0.1] = 255
    pixels[random.random(pixels.shape[:2]) < 0.1] = 0
    return pixels


def options_of(net, name, source, random) -> dict:
    """Random fields that the op `name` takes on `source`: of one that is neither a convolution nor a pooling."""
    dtype, (height, width, channels) = net.tensors[source].dtype, net.shape(source)
    if name in ("concat", "xor"):
        return {"other": source}
    if name in NORMS or name == "channel_norm":
        divisors = [g for g in range(1, channels + 1) if channels % g == 0 and (g == 1 or name in NORMS)]
        return {"groups": int(random.choice(divisors))}
    if name == "take":
        return {"outputs": int(random.integers(1, 70))}
    if name == "crop":
        start, stride = ([int(random.integers(n)) for n in (height, width)] for _ in range(2))
        most = [(n - 1 - a) // (s + 1) + 1 for n, a, s in zip((height, width), start, stride, strict=True)]
        size = [int(random.integers(1, n + 1)) for n in most]
        fields = {"padding": start, "size": size, "stride": [s + 1 for s in stride]}
        return {f"{field}_{axis}": values[i] for i, axis in enumerate("hw") for field, values in fields.items()}
    if name == "pad":
        mode = int(random.integers(len(OPS[name].modes)))
        most = {"reflect": -1, "circular": 0}.get(OPS[name].modes[mode], 3)
        around = {f"{side}_{axis}": int(random.integers(0, min(2, n + most) + 1)) for side in ("padding", "after")
                  for axis, n in zip("hw", (height, width), strict=True)}  # fmt: skip
        values = (-1, 1) if dtype == "bits" else (-1, 0, 1)
        return {"mode": mode, **around, "pad_value": 0 if mode else int(random.choice(values))}
    if name == "resize":
        return {"size_h": int(random.integers(1, 9)), "size_w": int(random.integers(1, 9))}
    if name == "pixel_shuffle":
        blocks = [(0, r, c) for r in (1, 2, 3) for c in (1, 2) if channels % (r * c) == 0]
        blocks += [(1, r, c) for r in (1, 2, 3) for c in (1, 2) if height % r == 0 and width % c == 0]
        mode, rows, columns = blocks[random.integers(len(blocks))]
        return {"mode": mode, "stride_h": rows, "stride_w": columns}
    if name == "conv_transpose2d":
        return _transposed_options(height, width, channels, random)
    return {}


def _transposed_options(height, width, channels, random) -> dict:
    groups = int(random.choice([g for g in (1, 2, 3) if channels % g == 0]))
    fields = {"groups": groups, "outputs": groups * 2}
    for axis, n in zip("hw", (height, width), strict=True):
        kernel, stride, dilation = (int(random.integers(1, 4)) for _ in range(3))
        whole = (n - 1) * stride + dilation * (kernel - 1) + 1
        padding = int(random.integers(0, min(kernel, (whole + 1) // 2)))
        more = int(random.integers(max(stride, dilation)))
        values = {"kernel": kernel, "stride": stride, "dilation": dilation, "padding": padding}
        fields |= {f"{field}_{axis}": value for field, value in values.items()}
        fields[f"size_{axis}"] = whole - 2 * padding + more
    return fields


def random_net(seed, numbers="tame") -> PackedModel:
    """A small net of random ops and geometries, every value of the schema's tables within reach."""
    random = np.random.default_rng(seed)
    net = Net(int(random.integers(3, 9)), int(random.integers(3, 9)), int(random.choice([1, 2, 3, 5])), seed, numbers)
    live = [0, net.real(int(random.choice([1, 3, 33]))), net.bits(int(random.choice([2, 6, 64, 65, 66])))]
    for _ in range(int(random.integers(2, 6))):
        source = int(random.choice(live))
        dtype, (height, width, channels) = net.tensors[source].dtype, net.shape(source)
        name = str(random.choice([n for n, rule in OPS.items() if dtype in rule.inputs]))
        kernel = [int(random.integers(1, min(n, 4) + 1)) for n in (height, width)]
        stride, dilation = random.integers(1, 4, 2).tolist(), [1, 1]
        if random.random() < 0.3:
            dilation = [2 if 2 * (k - 1) < n else 1 for k, n in zip(kernel, (height, width), strict=True)]
        most = [k if name in CONVOLUTIONS else k // 2 for k in kernel]
        padding, after = ([int(random.integers(0, p + 1)) for p in most] for _ in range(2))
        window = fields_of(kernel, stride, padding, dilation, after)
        options = options_of(net, name, source, random)
        if len(OPS[name].modes) > 1 and "mode" not in options:
            options["mode"] = int(random.integers(len(OPS[name].modes)))
        if name in POOLINGS:
            options = {**window, "ceil": int(random.integers(2))}
        if "slope" in OPS[name].may:
            parts = {p for p in (*PARTS, *AFTER) if p != "other" and random.random() < 0.3}
            options |= {"parts": parts, "writes": str(random.choice(["real", "bits", "both"]))}
            options |= {"threshold": random.choice([None, "f32"]), "flip": bool(random.integers(2))}
            if name == "pixel_conv2d":
                options |= {**window, "outputs": 3}
            elif name in CONVOLUTIONS:
                groups = int(random.choice([g for g in (1, 2, 3) if channels % g == 0]))
                pad_value = int(random.integers(-1, 2))
                options |= {**window, "groups": groups, "pad_value": pad_value, "outputs": groups * 3}
                if name == "conv2d":
                    options["weights"] = str(random.choice(OPS[name].weights))
                elif options["writes"] == "bits" and random.random() < 0.5:
                    options |= {"threshold": "i32", "parts": ()}
            elif dtype == "f32" and name != "conv_transpose2d":
                factor = source if random.random() < 0.3 else None
                last = int(random.integers(2))
                options |= {"parts": {*parts, "other"}, "other": source, "factor": factor, "other_last": last}
        before = len(net.tensors)
        net.add(name, source, **options)
        live += [i for i in range(before, len(net.tensors)) if net.tensors[i].place == "activation"]
    return net.model()
