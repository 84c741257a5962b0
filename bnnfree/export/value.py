"""Values while ops are built, each an affine of a tensor; drafts of ops, and how far their epilogues have come.

Imports numpy and bnnfree.format.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np

from bnnfree.format import Op

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


def flags(*values: Value, least: int = 0) -> dict[str, Any]:
    """Flags of values that are joined or added: of each the largest."""
    return {
        "scaled": max(least, *(v.scaled for v in values)),
        "signed": any(v.signed or bool((v.scale < 0).any()) for v in values),
        "shifted": any(v.shifted for v in values),
    }


def bake(draft: Draft, value: Value) -> None:
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


def larger_first(a: Value, b: Value) -> tuple[Value, Value]:
    """The value with more positions, of as many with more channels, first."""
    size = [(v.shape[0] * v.shape[1], v.shape[2]) for v in (a, b)]
    return (a, b) if size[0] >= size[1] else (b, a)


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
