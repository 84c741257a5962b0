"""Ways to run a network in training: one of SPEEDS, chosen by what is there. Imports torch and bnnfree.nn only.

    layers           module by module: the readable formulation, and what everything else is compared with
    fused            one autograd node per binary convolution: C passes on a CPU, torch's own operations elsewhere
    compiled         torch.compile of the layers
    fused_compiled   torch.compile of the fused nodes, with torch's own operations

On a CPU, torch.compile needs a C++ compiler.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from bnnfree.errors import BnnfreeError, pick
from bnnfree.names import SPEEDS
from bnnfree.nn.fused import int8
from bnnfree.nn.fused.chain import Fusion, unfusible
from bnnfree.nn.fused.native import load_passes
from bnnfree.nn.fused.passes import PASSES, Passes, Shared

PRECISIONS: dict[str, tuple[torch.dtype | None, torch.dtype | None]] = {  # dtypes of trunk and signs; None: as it is
    "fp32": (None, None),
    "bf16": (None, torch.bfloat16),
    "bf16_trunk": (torch.bfloat16, torch.bfloat16),
}


@dataclass(frozen=True)
class Speed:
    """The choice: a name of SPEEDS, whether the network is to be wrapped in torch.compile, and the reason as a text."""

    name: str
    compiled: bool
    why: str

    def __str__(self) -> str:
        return f"{self.name} ({self.why})" if self.why else self.name


def choose_speed(
    model: nn.Module,
    wanted: str = "auto",
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    shared: Shared | None = None,
) -> Speed:
    """Set `model.fusion` for training on `device` in `precision`, and say what was chosen.

    wanted: a name of SPEEDS, or "auto": on a CPU fused where a block can be, else layers; on other devices compiled,
    or fused_compiled for a bf16 trunk.
    shared: see Fusion; compiled networks do not use it.
    Blocks that cannot be fused run as layers among those that are. Evaluation always runs the layers.
    Errors: BnnfreeError where what is wanted cannot be had.
    """
    pick(dict.fromkeys(("auto", *SPEEDS)), wanted, "speed")
    trunk, signs = pick(PRECISIONS, precision, "precision")
    kind = torch.device(device).type
    blocks = list(getattr(model, "blocks", ())) if hasattr(model, "fusion") else []
    reasons = [reason for reason in map(unfusible, blocks) if reason is not None]
    fusible = len(blocks) - len(reasons)
    obstacle = reasons[0] if reasons else "it has no blocks that could be"
    if wanted in ("fused", "fused_compiled") and not fusible:
        raise BnnfreeError(f"speed: got {wanted!r} for a network that cannot be fused: {obstacle}. Use speed=layers.")
    name = wanted
    if wanted == "auto":
        name = "fused" if fusible else "layers"
        if kind != "cpu":
            name = "fused_compiled" if fusible and trunk is not None else "compiled"
    if precision == "bf16_trunk" and not name.startswith("fused"):
        raise BnnfreeError(
            f"precision: got 'bf16_trunk', a matter of fused blocks, but the network runs as {name}"
            f"{'' if fusible else ': ' + obstacle}. Use precision=bf16, or speed=fused."
        )
    if not name.startswith("fused"):
        _set(model, None)
        return Speed(name, name == "compiled", "" if fusible or wanted != "auto" else obstacle)
    passes, why = _passes(model, kind, name)
    whole = name == "fused" and kind == "cpu" and precision == "fp32" and int8.is_faster()
    _set(model, Fusion(passes, trunk, signs, shared if name == "fused" else None, whole))
    products = ", products in int8" if whole else ""
    return Speed(name, name == "fused_compiled", f"{fusible} of {len(blocks)} blocks, {why}{products}")


def _set(model: nn.Module, fusion: Fusion | None) -> None:
    if hasattr(model, "fusion"):
        model.fusion = fusion  # type: ignore[assignment]


def _passes(model: nn.Module, kind: str, name: str) -> tuple[Passes, str]:
    """(passes, which they are and why)."""
    if kind != "cpu" or name == "fused_compiled":
        return PASSES, "torch's operations"
    native, missing = load_passes()
    if native is None:
        return PASSES, f"torch's operations, for {missing}"
    unknown = native.unknown(model)
    return (native, "C passes") if unknown is None else (PASSES, f"torch's operations, for {unknown}")
