"""Building the ops of a packed model, with everything affine deferred until an op can take it in.

What is built depends on which parameters there are, never on their values: a trained network gives the same ops and
the same file size as one that is not trained.

A `Value` is what a node of the torch graph means: scale * tensor + shift, per channel. Scalings, biases, batch
normalisation and thresholds only change scale and shift; a sign turns them into its threshold, a convolution takes
them into its weights or bias, pooling lets them pass. So nothing of them is left to compute. An op just made is
open: what follows may still go into its epilogue. Imports numpy, bnnfree.errors, ops and format; no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np

from bnnfree import ops
from bnnfree.format import Op, PackedModel, Tensor, make_op, plan
from bnnfree.format.schema import OPS

Shape = tuple[int, int, int]  # rows, columns, channels
SUM, FACTORED, ADDED, SLOPED, CLAMPED, AFTER, LAST = range(7)  # how far an op's epilogue has come


@dataclass(eq=False)
class Draft:
    """An op being made: activations by index, constants as float64 (or packed) arrays."""

    op: Op
    stage: int = SUM
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)  # of constants that are not f32


@dataclass(frozen=True, eq=False)
class Value:
    """scale * tensor + shift. kind: "image" (u8), "real" (f32) or "bits" (+1 and -1).

    open: nothing else reads the tensor, so its op may still change. repeat: the channels stand so many times one
    after the other; the tensor holds them once. scaled: 0 by nothing, 1 by one number, 2 by one per channel;
    signed: its scale may be negative; shifted: by anything. These say what there is, whatever its values.
    """

    kind: str
    tensor: int
    shape: Shape
    scale: np.ndarray
    shift: np.ndarray
    open: bool = False
    repeat: int = 1
    scaled: int = 0
    signed: bool = False
    shifted: bool = False

    def affine(self, scale: np.ndarray | float = 1.0, shift: np.ndarray | float = 0.0, *, signed: bool = True) -> Value:
        """scale * self + shift, which costs nothing. signed=False: an array of scales that are never negative."""
        vector = isinstance(scale, np.ndarray)
        return replace(
            self,
            scale=self.scale * scale,
            shift=self.shift * scale + shift,
            scaled=max(self.scaled, 2 if vector else int(scale != 1)),
            signed=self.signed or (signed if vector else bool(scale < 0)),
            shifted=self.shifted or isinstance(shift, np.ndarray) or shift != 0,
        )

    def like(self, other: Value) -> Value:
        """Self's tensor with the affine part of `other`."""
        names = ("scale", "shift", "scaled", "signed", "shifted")
        return replace(self, **{name: getattr(other, name) for name in names})

    def bare(self) -> Value:
        """The tensor itself."""
        channels = self.shape[2]
        return replace(self, scale=np.ones(channels), shift=np.zeros(channels), scaled=0, signed=False, shifted=False)


class Builder:
    """Collects tensors and ops; `finish` gives the model."""

    def __init__(self, image: Shape):
        self.tensors: list[Tensor] = [Tensor("image", "u8", "image", image)]
        self.drafts: list[Draft] = []
        self.makers: dict[int, Draft] = {}  # activation -> the op that writes it
        self.number: dict[int, int] = {}  # old -> final index, once finished
        self.on_settle: Callable[[Value], object] = lambda value: None  # told when a tensor takes its affine part in

    # -- values

    def image(self, scale: np.ndarray, shift: np.ndarray) -> Value:
        height, width, channels = self.tensors[0].shape
        value = Value("image", 0, (height, width, channels), np.ones(channels), np.zeros(channels))
        return value.affine(scale, shift, signed=False)

    def emit(self, name: str, source: Value, shape: Shape, *, kind: str = "real", **fields: Any) -> Value:
        """A new op that reads `source`'s tensor, and its result. Its constants follow by `constant`."""
        index = self._activation("f32" if kind == "real" else "bits", shape)
        op = make_op(name, input=source.tensor, **{"real" if kind == "real" else "bits": index}, **fields)
        draft = Draft(op)
        self.drafts.append(draft)
        self.makers[index] = draft
        return Value(kind, index, shape, np.ones(shape[2]), np.zeros(shape[2]), open=True)

    def constant(self, value: Value, name: str, array: np.ndarray, dtype: str = "f32") -> None:
        """Give the op that writes `value` a constant."""
        draft = self.makers[value.tensor]
        draft.constants[name] = array
        if dtype != "f32":
            draft.dtypes[name] = dtype

    def _activation(self, dtype: str, shape: Shape) -> int:
        self.tensors.append(Tensor("", dtype, "activation", shape))
        return len(self.tensors) - 1

    def _draft(self, value: Value, latest: int) -> Draft | None:
        """The op of an open value, if it has an epilogue that has not gone beyond `latest`."""
        if not value.open or value.kind != "real" or value.repeat > 1:
            return None
        draft = self.makers[value.tensor]
        takes = "slope" in OPS[draft.op.name].may and draft.op.bits is None
        return draft if takes and draft.stage <= latest else None

    # -- making a value's affine part real

    def settle(self, value: Value, *, scale_only: bool = False) -> Value:
        """The same value with scale 1 and shift 0 (with scale_only the shift may stay), as one real tensor."""
        if value.repeat > 1:
            value = self._joined(value)
        if value.kind == "real" and not value.scaled and (scale_only or not value.shifted):
            return value
        draft = self._draft(value, AFTER)
        if draft is None:
            return self._own_op(value)
        _bake(draft, value)
        value = value.bare()
        self.on_settle(value)
        return value

    def _own_op(self, value: Value) -> Value:
        """A pointwise op that applies scale and shift."""
        made = self.emit("pointwise", value, value.shape)
        _bake(self.makers[made.tensor], value)
        return made

    def _joined(self, value: Value) -> Value:
        """A repeated value as a tensor of its own."""
        rows, columns, channels = self.tensors[value.tensor].shape
        shape = (rows, columns, channels)
        once = replace(value, repeat=1, shape=shape, open=False).bare()
        whole = once
        for _ in range(value.repeat - 1):
            rows, columns, channels = whole.shape
            whole = self.emit("concat", whole, (rows, columns, channels + shape[2]), other=once.tensor)
        return whole.like(value)

    def share(self, value: Value) -> Value:
        """Prepare a value that several nodes will read: made real at once where that is free."""
        if self._draft(value, SUM) is not None:
            value = self.settle(value)
        return replace(value, open=False)

    def as_tensor(self, value: Value) -> Value:
        """A value whose tensor is real and stands for all its channels; scale and shift stay."""
        if value.repeat > 1:
            return self._joined(value)
        return value if value.kind == "real" else self._own_op(value)

    # -- what ops do to values

    def concat(self, values: list[Value]) -> Value:
        """Channels one after the other; one value several times costs nothing until somebody needs it whole."""
        first = values[0]
        rows, columns, channels = first.shape
        if len(values) > 1 and all(v.kind == "bits" and not (v.scaled or v.shifted) for v in values):
            whole = first
            for value in values[1:]:
                shape = (rows, columns, whole.shape[2] + value.shape[2])
                whole = replace(self.emit("concat", whole, shape, kind="bits", other=value.tensor), open=False)
            return whole
        if all(v is first for v in values) and first.kind == "real" and first.repeat == 1:
            count = len(values)
            scale, shift = np.tile(first.scale, count), np.tile(first.shift, count)
            shape = (rows, columns, channels * count)
            return replace(first, shape=shape, scale=scale, shift=shift, open=False, repeat=count)
        whole = self.as_tensor(first)
        for value in map(self.as_tensor, values[1:]):
            scale, shift = (np.concatenate([getattr(v, n) for v in (whole, value)]) for n in ("scale", "shift"))
            flags = _flags(whole, value)
            flags["scaled"] *= 2 if flags["scaled"] == 1 else 1  # numbers that may differ
            joined = self.emit("concat", whole, (rows, columns, len(scale)), other=value.tensor)
            whole = replace(joined, scale=scale, shift=shift, **flags)
        return whole

    def add(self, a: Value, b: Value) -> Value:
        """a + b: into the epilogue of the op of one of them, or an op of its own. b may be one channel, one position."""
        a, b = _larger_first(a, b)
        if a.tensor == b.tensor and a.kind == b.kind and a.repeat == b.repeat:
            return replace(a, scale=a.scale + b.scale, shift=a.shift + b.shift, open=False, **_flags(a, b, least=1))
        # the one whose op is farther from done takes the other in
        orders = ((a, b), (b, a)) if a.shape == b.shape else ((a, b),)
        for host, guest in orders:
            draft = self._draft(host, FACTORED)
            taken = draft is not None and (draft.stage == FACTORED and (host.scaled or host.shifted))
            if draft is not None and draft.op.name != "pointwise" and not taken:
                return self._add_into(draft, host, guest)
        for host, guest in orders:
            draft = self._draft(host, AFTER)
            if draft is not None and draft.stage != SUM and draft.op.other is None:
                return self._add_into(draft, host, guest)
        host = self._own_op(self._joined(a) if a.repeat > 1 else a) if self._draft(a, SUM) is None else a
        return self._add_into(self.makers[host.tensor], host, b)

    def _add_into(self, draft: Draft, host: Value, guest: Value) -> Value:
        if guest.kind != "real" or guest.scaled:
            guest = self.settle(guest, scale_only=True)
        whole = host.affine(1.0, guest.shift) if guest.shifted else host
        _bake(draft, whole)
        draft.op.fields["other"] = guest.tensor
        draft.op.fields["other_last"] = int(draft.stage > FACTORED)
        draft.stage = LAST if draft.stage > FACTORED else ADDED
        self.drafts.remove(draft)  # to the end: the guest may be younger
        self.drafts.append(draft)
        return replace(host.bare(), open=True)

    def multiply(self, a: Value, b: Value) -> Value:
        """a b: a factor in the epilogue of the op of one of them, or an op of its own; of two signs their xor."""
        a, b = _larger_first(a, b)
        if a.kind == b.kind == "bits" and not (a.shifted or b.shifted) and a.shape == b.shape and a.tensor != b.tensor:
            product = self.emit("xor", a, a.shape, kind="bits", other=b.tensor)
            scale = a.scale * b.scale
            return replace(
                product, scale=scale, scaled=max(a.scaled, b.scaled), signed=a.signed or b.signed, open=False
            )
        orders = ((a, b), (b, a)) if a.shape == b.shape else ((a, b),)
        for host, guest in orders:
            draft = self._draft(host, SUM)
            if draft is not None and host.tensor != guest.tensor:
                return self._multiply_into(draft, host, self.settle(guest))
        guest = self.settle(b)
        host = self._own_op(self._joined(a) if a.repeat > 1 else a)
        return self._multiply_into(self.makers[host.tensor], host, guest)

    def _multiply_into(self, draft: Draft, host: Value, guest: Value) -> Value:
        _bake(draft, host)
        draft.op.fields["factor"] = guest.tensor
        draft.stage = FACTORED
        self.drafts.remove(draft)
        self.drafts.append(draft)
        return replace(host.bare(), open=True)

    def move(self, name: str, value: Value, shape: Shape, **fields: int) -> Value:
        """The op `name`, which copies values: of floats, or of bits, with the affine part that they had."""
        value = self._joined(value) if value.repeat > 1 else value
        value = self._own_op(value) if value.kind == "image" else value
        made = self.emit(name, value, shape, kind="bits" if value.kind == "bits" else "real", **fields)
        return made.like(value) if shape[2] == value.shape[2] else made

    def take(self, value: Value, index: np.ndarray) -> Value:
        """Channels by number; 0 where that is -1."""
        if (index < 0).any():
            value = self.settle(value)
        made = self.move("take", value, (*value.shape[:2], len(index)))
        made = replace(made, scale=np.ones(len(index)), shift=np.zeros(len(index)))
        self.constant(made, "weights", index, "i32")
        whole = replace(made, **{name: getattr(value, name) for name in ("scaled", "signed", "shifted")})
        if (index < 0).any():
            return whole
        return replace(whole, scale=value.scale[index], shift=value.shift[index])

    def pad(self, value: Value, around: tuple[int, int, int, int], mode: int = 0, fill: float = 0.0) -> Value:
        """Rows and columns around a map: above, on the left, below, on the right; mode: one of the op's."""
        rows, columns, channels = value.shape
        shape = (rows + around[0] + around[2], columns + around[1] + around[3], channels)
        fields = dict(zip(("padding_h", "padding_w", "after_h", "after_w"), around, strict=True))
        if mode:
            return self.move("pad", value, shape, mode=mode, **fields)
        if value.kind == "bits" and abs(fill) == 1 and not (value.scaled or value.shifted):
            return self.move("pad", value, shape, pad_value=int(fill), **fields)
        near = 0.0 if fill not in (0.0, 1.0, -1.0) else fill
        value = self.settle(value.affine(1.0, near - fill) if near != fill else value)
        made = self.move("pad", value, shape, pad_value=int(near), **fields)
        return made.affine(1.0, fill - near) if near != fill else made

    def function(self, value: Value, name: str) -> Value:
        """The op `function` in the mode of that name."""
        return self.emit("function", self.settle(value), value.shape, mode=OPS["function"].modes.index(name))

    def activate(self, value: Value, **constants: np.ndarray | float) -> Value:
        """slope, or low and high, per channel."""
        latest = ADDED if "slope" in constants else SLOPED
        value = self.settle(value)
        draft = self._draft(value, latest)
        if draft is None:
            made = self.emit("pointwise", value, value.shape)
            draft, value = self.makers[made.tensor], made
        for name, array in constants.items():
            draft.constants[name] = np.broadcast_to(np.asarray(array, np.float64), (value.shape[2],)).copy()
        draft.stage = SLOPED if "slope" in constants else CLAMPED
        return value

    def sign(self, value: Value) -> Value:
        """Bits of scale * tensor + shift >= 0, as a threshold of the tensor."""
        if value.repeat > 1:
            value = self._joined(value)
        draft = self.makers.get(value.tensor)
        whole = (
            self._draft(value, SUM) is draft and draft is not None
            and draft.op.name == "binary_conv2d" and not set(draft.constants) - {"weights"}
        )  # fmt: skip
        if (
            draft is None
            or "threshold" not in OPS[draft.op.name].may
            or draft.op.bits is not None
            or value.kind != "real"
        ):
            made = self.emit("pointwise", value, value.shape, kind="bits")
            draft = self.makers[made.tensor]
            bits = made.tensor
        else:
            bits = self._activation("bits", value.shape)
            draft.op.fields["bits"] = bits
            self.makers[bits] = draft
        if whole:
            terms = int(np.prod(draft.constants["weights"].shape[1:]))
            threshold, flip = sum_threshold(value.scale, value.shift, terms)
            draft.op.fields["real"] = None
            draft.dtypes["threshold"] = "i32"
        else:
            threshold, flip = real_threshold(value.scale, value.shift)
        flips = value.signed or bool(flip.any())
        if whole or value.shifted or flips:
            draft.constants["threshold"] = threshold
        if flips:
            draft.constants["flip"], draft.dtypes["flip"] = flip, "bits"
        return Value("bits", bits, value.shape, np.ones(value.shape[2]), np.zeros(value.shape[2]))

    # -- the end

    def finish(self, output: Value, name_of: Callable[[int], str]) -> PackedModel:
        """The model whose result is `output`; activations are named by `name_of(old index)`.

        Ops whose results nobody reads are dropped, tensors are numbered anew in the order of their use.
        """
        output = self.settle(output)
        kept, needed = [], {output.tensor}
        for draft in reversed(self.drafts):
            op = draft.op
            for field_name in ("real", "bits"):
                if op.fields[field_name] not in needed:
                    op.fields[field_name] = None
            if op.writes():
                kept.append(draft)
                needed |= set(op.reads())
        kept.reverse()
        number = {0: 0}
        tensors = [replace(self.tensors[0])]
        final = []
        for draft in kept:
            fields = dict(draft.op.fields)
            for name in ("input", "other", "factor"):
                if (old := fields[name]) is not None:
                    fields[name] = number[old]
            if fields["bits"] is None:
                draft.constants.pop("threshold", None)
                draft.constants.pop("flip", None)
            for name, array in draft.constants.items():
                fields[name] = len(tensors)
                tensors.append(_constant(name, array, draft.dtypes.get(name, "f32")))
            for name in ("real", "bits"):
                if (old := fields[name]) is not None:
                    number[old] = fields[name] = len(tensors)
                    tensors.append(replace(self.tensors[old], name=name_of(old)))
            final.append(Op(draft.op.name, fields))
        model = PackedModel(tensors, final, input=0, output=number[output.tensor])
        plan(model)
        self.number = number
        return model


def _flags(*values: Value, least: int = 0) -> dict[str, Any]:
    """Flags of values that are joined or added: of each the largest."""
    return {
        "scaled": max(least, *(v.scaled for v in values)),
        "signed": any(v.signed or bool((v.scale < 0).any()) for v in values),
        "shifted": any(v.shifted for v in values),
    }


def _bake(draft: Draft, value: Value) -> None:
    """Put the affine part of `value` into the epilogue: before what it has already, or after the activation."""
    if not (value.scaled or value.shifted):
        return
    constants = draft.constants
    before = draft.stage == SUM or (draft.stage == ADDED and not value.scaled and draft.op.factor is None)
    scale, bias = ("scale", "bias") if before else ("scale_after", "bias_after")
    if value.scaled:
        constants[scale] = constants.get(scale, 1.0) * value.scale
        if bias in constants:
            constants[bias] = constants[bias] * value.scale
    if value.shifted:
        constants[bias] = constants.get(bias, 0.0) + value.shift
    draft.stage = draft.stage if before else AFTER


def _larger_first(a: Value, b: Value) -> tuple[Value, Value]:
    """The value with more positions, of as many with more channels, first."""
    size = [(v.shape[0] * v.shape[1], v.shape[2]) for v in (a, b)]
    return (a, b) if size[0] >= size[1] else (b, a)


def _constant(name: str, array: np.ndarray, dtype: str) -> Tensor:
    if dtype == "bits":
        bits = np.asarray(array, bool)
        return Tensor(name, dtype, "constant", bits.shape, data=ops.pack_bits(bits))
    kinds = {"f32": np.float32, "i8": np.int8, "i32": np.int32}
    data = np.ascontiguousarray(np.asarray(array).astype(kinds[dtype]))
    return Tensor(name, dtype, "constant", data.shape, data=data)


def real_threshold(scale: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(threshold float32, flip) such that (not v >= threshold) xor flip says scale * v + shift < 0, for float32 v.

    Exact: of the numbers that float32 has, the threshold is the least that counts.
    """
    with np.errstate(all="ignore"):  # a caller may have told numpy to raise
        cut = np.where(scale == 0, np.where(shift >= 0, -np.inf, np.inf), -shift / scale)
        near = np.clip(cut, -3.4028234663852886e38, 3.4028234663852886e38).astype(np.float32)
        near = np.where(np.isinf(cut), cut, near).astype(np.float32)
        above = np.nextafter(near, np.float32(np.inf))
    flip = scale < 0
    wide = near.astype(np.float64)
    least = np.where(wide >= cut, near, above)  # v >= cut
    beyond = np.where(wide > cut, near, above)  # v > cut, for negative scales
    return np.where(flip, beyond, least) + np.float32(0), flip


def sum_threshold(scale: np.ndarray, shift: np.ndarray, terms: int) -> tuple[np.ndarray, np.ndarray]:
    """The same for a sum of `terms` signs: (threshold int32, flip), by exact fractions."""
    thresholds, flips = [], scale < 0
    for a, b in zip(scale.tolist(), shift.tolist(), strict=True):
        if a == 0:
            cut = -terms if b >= 0 else terms + 1
        else:
            exact = Fraction(-b) / Fraction(a)
            cut = -(-exact.numerator // exact.denominator) if a > 0 else exact.numerator // exact.denominator + 1
        thresholds.append(max(-terms, min(terms + 1, cut)))
    return np.array(thresholds, np.int32), flips
