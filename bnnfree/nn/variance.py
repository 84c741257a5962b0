"""Bookkeeping of the expected variance along a residual trunk. Standard library and bnnfree.errors only.

A BN-free block divides its input by the deviation it expects there: u = beta x with beta = 1/sqrt(v).
Starting from v = 1, a block adds alpha^2 to v for each of its units; a transition block, whose shortcut
takes the scaled input, resets v to 1 before that. Ref: Brock et al. 2021 ("Characterizing signal
propagation ..."), section 3.1; Chen et al. 2021 ("BNN - BN = ?"), figure 2 (which writes 1/beta).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bnnfree.errors import pick

BETA_MODES = {
    "nf": "as the paper means it: v += alpha^2 per unit, reset to 1 inside every transition block",
    "ref": "as the released code does it: v reset to 1 only after a block that `ref_resets`, so that the "
    "increments of that block are lost and its second unit still has the old v",
    "measured": "1/std of the trunk over the calibration images, set by bnnfree.nn.calibrate",
    "none": "1 everywhere",
}


@dataclass(frozen=True)
class BlockShape:
    """Shape of a block for the bookkeeping: residual units in it, and whether its first is a transition.

    ref_resets: the released code sets v back to 1 after this block (ReActNet-18: the first block of every
    stage; ReActNet-A: every block of stride 2).
    """

    units: int = 1
    transition: bool = False
    ref_resets: bool = False


def expected_betas(blocks: Sequence[BlockShape], alpha: float, mode: str) -> list[list[float]]:
    """beta of every unit of every block, for a mode of BETA_MODES ("measured" starts at 1).

    Example: four one-unit blocks at alpha 0.2, mode "nf" -> 1, 0.9806, 0.9623, 0.9449.
    """
    pick(BETA_MODES, mode, "beta")
    if mode in ("none", "measured"):
        return [[1.0] * block.units for block in blocks]
    variance, betas = 1.0, []
    for block in blocks:
        units = []
        for unit in range(block.units):
            units.append(1 / math.sqrt(variance))
            if mode == "nf" and block.transition and unit == 0:
                variance = 1.0
            variance += alpha**2
        if mode == "ref" and block.ref_resets:
            variance = 1.0
        betas.append(units)
    return betas
