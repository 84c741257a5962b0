"""Time of each op of a model, and its share of the processor's limit."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnnfree.bench.peak import Peak
from bnnfree.engine import Engine
from bnnfree.format import Op, PackedModel, window_of
from bnnfree.format.schema import CONVOLUTIONS
from bnnfree.format.shapes import inside_taps

SECONDS = 1.5  # for one model, about
MOST = 300  # runs


def inside_macs(model: PackedModel, op: Op) -> int:
    """Products of a convolution whose tap is inside the image: those on zero padding need not be made."""
    if op.name not in CONVOLUTIONS:
        return 0
    tensors, taps = model.tensors, []
    height, width, channels = tensors[op.writes()[0]].shape
    for side, count in zip(window_of(op).sides(*tensors[op.input].shape[:2]), (height, width), strict=True):
        first, behind = inside_taps(side, np.arange(count))
        taps.append(int((behind - first).sum()))
    return taps[0] * taps[1] * channels * tensors[op.weights].shape[3]


def layers(engine: Engine, image: np.ndarray, milliseconds: float, peak: Peak | None) -> list[dict[str, Any]]:
    """Engine.profile and, per op: inside_macs; gmacs, 10^9 macs per second; of a binary convolution peak_gmacs, what
    `peak` measures meanwhile, and what share of it are inside_macs per second, percent_of_peak, and macs per second,
    percent_of_peak_nominal. None where there is no such figure.

    milliseconds: of one run, which decides how often it is repeated. Shapes: image uint8 [1, H, W, C].
    """
    rows = engine.profile(image, int(min(MOST, max(5, 1e3 * SECONDS / milliseconds))))
    best = None
    if peak is not None:
        peak.measure()
        best = peak.best
    for op, row in zip(engine.model.ops, rows, strict=True):
        row["inside_macs"] = inside_macs(engine.model, op)
        row["gmacs"] = row["macs"] / row["ms"] / 1e6 if row["macs"] and row["ms"] else None
        row["peak_gmacs"] = best if op.name == "binary_conv2d" and row["ms"] else None
        whole = row["ms"] * 1e6 * row["peak_gmacs"] / 100 if row["peak_gmacs"] else None
        row["percent_of_peak"] = row["inside_macs"] / whole if whole else None
        row["percent_of_peak_nominal"] = row["macs"] / whole if whole else None
    return rows
