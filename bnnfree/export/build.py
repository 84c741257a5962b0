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
from dataclasses import replace
from typing import Any

import numpy as np

from bnnfree import ops
from bnnfree.export.value import (
    ADDED,
    AFTER,
    CLAMPED,
    FACTORED,
    LAST,
    SLOPED,
    SUM,
    Draft,
    Shape,
    Value,
    bake,
    flags,
    larger_first,
    real_threshold,
    sum_threshold,
)  # fmt: skip
from bnnfree.format import Op, PackedModel, Tensor, make_op, plan
from bnnfree.format.schema import OPS


class Builder:
    """Collects tensors and ops; `finish` gives the model."""

    def __init__(self, image: Shape):
        self.tensors: list[Tensor] = [Tensor("image", "u8", "image", image)]
        self.drafts: list[Draft] = []
        self.makers: dict[int, Draft] = {}  # activation -> the op that writes it
        self.number: dict[int, int] = {}  # old -> final index, once finished
        self.on_settle: Callable[[Value], object] = lambda value: None  # told of a value that its tensor becomes

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
        bake(draft, value)
        self.on_settle(value)
        return value.bare()

    def _own_op(self, value: Value) -> Value:
        """A pointwise op that applies scale and shift."""
        made = self.emit("pointwise", value, value.shape)
        bake(self.makers[made.tensor], value)
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
            both = flags(whole, value)
            both["scaled"] *= 2 if both["scaled"] == 1 else 1  # numbers that may differ
            joined = self.emit("concat", whole, (rows, columns, len(scale)), other=value.tensor)
            whole = replace(joined, scale=scale, shift=shift, **both)
        return whole

    def add(self, a: Value, b: Value) -> Value:
        """a + b: into the epilogue of the op of one, or an op of its own. One may have one channel, or one position."""
        a, b = larger_first(a, b)
        if a.tensor == b.tensor and a.kind == b.kind and a.repeat == b.repeat:
            return replace(a, scale=a.scale + b.scale, shift=a.shift + b.shift, open=False, **flags(a, b, least=1))
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
        bake(draft, whole)
        draft.op.fields["other"] = guest.tensor
        draft.op.fields["other_last"] = int(draft.stage > FACTORED)
        draft.stage = LAST if draft.stage > FACTORED else ADDED
        self.drafts.remove(draft)  # to the end: the guest may be younger
        self.drafts.append(draft)
        return replace(host.bare(), open=True)

    def multiply(self, a: Value, b: Value) -> Value:
        """a b: a factor in the epilogue of the op of one of them, or an op of its own; of two signs their xor."""
        a, b = larger_first(a, b)
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
        bake(draft, host)
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


def _constant(name: str, array: np.ndarray, dtype: str) -> Tensor:
    if dtype == "bits":
        bits = np.asarray(array, bool)
        return Tensor(name, dtype, "constant", bits.shape, data=ops.pack_bits(bits))
    kinds = {"f32": np.float32, "i8": np.int8, "i32": np.int32}
    data = np.ascontiguousarray(np.asarray(array).astype(kinds[dtype]))
    return Tensor(name, dtype, "constant", data.shape, data=data)
