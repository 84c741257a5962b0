"""Blocks one after the other, fused: what a block hands on is its sum before the activation.

Imports torch, bnnfree.errors and bnnfree.nn only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bnnfree.nn.binary import BinaryConv2d
from bnnfree.nn.block import BinaryBlock, Clip
from bnnfree.nn.fused.node import ActivationNode, BinaryNode, Step
from bnnfree.nn.fused.passes import Activation, Latent, Passes, Shared
from bnnfree.nn.fused.place import Place
from bnnfree.nn.norms import KalmanNorm2d
from bnnfree.nn.react import RPReLU, RSign
from bnnfree.nn.sign import Sign


@dataclass(frozen=True)
class Fusion:
    """Settings of fused blocks: passes, and the dtypes of trunk and signs (None: as the trunk comes).

    int8: products of signs and binary weights in float32 blocks are 8-bit whole numbers (see `int8`).
    shared: the weights of a step for all its micro-batches; who sets it says `shared.forget()` after each step.
    """

    passes: Passes
    trunk: torch.dtype | None = None
    signs: torch.dtype | None = None
    shared: Shared | None = None
    int8: bool = False


def unfusible(block: nn.Module) -> str | None:
    """Reason that a block cannot be one node per convolution; None where it can."""
    if not isinstance(block, BinaryBlock):
        return f"a {type(block).__name__} is no BinaryBlock"
    hooked = [m for m in block.modules() if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks]
    if hooked:
        return f"a {type(hooked[0]).__name__} has hooks"
    if not isinstance(block.act, nn.Identity | RPReLU):
        return f"its activation is a {type(block.act).__name__}"
    units = _units(block)
    if units is None:
        return "its branch is not made of signs, convolutions and what follows these"
    for sign, conv, after in units:
        if type(sign) not in (Sign, RSign):
            return f"a {type(sign).__name__} is no sign"
        if type(conv) is not BinaryConv2d:
            return f"a {type(conv).__name__} follows a sign"
        if any(isinstance(module, KalmanNorm2d) for module in after):
            return "a KalmanNorm2d leads a belief beside the map"
        if conv.preconditioner is not None:
            return "gradients are preconditioned"
        if conv.groups > 1 and conv.centre is not None or conv.centre == "output":
            return "a convolution is centred otherwise than by its inputs as a whole"
        if conv.scale_rule == "learned" and not conv.binary:
            return "real weights have a learned scale"
    return None


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, fusion: Fusion) -> Tensor:
    """Run the blocks on x, in training; those that cannot be fused run as they are.

    Equal to running them one by one but for rounding. Signs are taken from values that are rounded alike.
    Shapes: [N, C, H, W] -> [N, C', H', W'], x's dtype.
    """
    dtype, kind = x.dtype, x.device.type
    v, act = x.to(fusion.trunk or dtype), Activation()
    for block in blocks:
        with torch.autocast(kind, enabled=False):
            if isinstance(block, BinaryBlock) and unfusible(block) is None:
                v, act = _run_block(block, v, act, fusion)
                continue
            x = _activated(v, act, fusion).to(dtype)
        v, act = block(x).to(v.dtype), Activation()
    with torch.autocast(kind, enabled=False):
        return _activated(v, act, fusion).to(dtype)


class _Unit(NamedTuple):
    """A sign, the convolution that reads it, and the modules after that: a normaliser, or none."""

    sign: Sign
    conv: BinaryConv2d
    after: list[nn.Module]


def _units(block: BinaryBlock) -> list[_Unit] | None:
    """The branch as units; None where it is something else."""
    units: list[_Unit] = []
    parts = [module for module in block.branch if not isinstance(module, nn.Identity)]
    starts = [i for i, module in enumerate(parts) if isinstance(module, Sign | Clip)]
    if not starts or starts[0]:
        return None
    for start, end in zip(starts, [*starts[1:], len(parts)], strict=True):
        if end - start < 2:
            return None
        units.append(_Unit(parts[start], parts[start + 1], parts[start + 2 : end]))  # type: ignore[arg-type]
    return units


def _activated(v: Tensor, act: Activation, fusion: Fusion, beta: Tensor | None = None, pool: int = 1) -> Tensor:
    if act == Activation() and beta is None and pool == 1:
        return v
    return ActivationNode.apply(fusion.passes, v, *act, beta, pool)


def _run_block(block: BinaryBlock, v: Tensor, act: Activation, fusion: Fusion) -> tuple[Tensor, Activation]:
    beta = block.beta if block.scaled else None
    units = _units(block)
    assert units is not None  # unfusible has said so
    plain = block.stride == 1 and block.shortcut is None and not block.duplicate
    identity = None
    if not plain:
        pooled = block.stride > 1 or block.shortcut is not None
        scaled = beta if pooled and block.scales_shortcut else None
        identity = block.widened(_activated(v, act, fusion, scaled, block.stride)).to(v.dtype)
    elif len(units) > 1 or units[-1].after:
        identity = _activated(v, act, fusion)
    for i, unit in enumerate(units):
        last = i + 1 == len(units)
        alpha = block.alpha if last and block.damped else None
        if unit.after:
            h = _run_unit(unit, v, act, beta, None, False, None, fusion)
            h = _followed(h, unit.after, alpha, fusion)
            v = (h if identity is None or not last else h + identity).to(v.dtype)
        else:
            added = last and identity is None
            v = _run_unit(unit, v, act, beta, alpha, added, identity if last else None, fusion)
        act, beta = Activation(), None
    return v, _activation_of(block.act)


def _followed(h: Tensor, after: list[nn.Module], alpha: Tensor | None, fusion: Fusion) -> Tensor:
    """A convolution's output h behind the modules that follow it, times alpha; an RPReLU is a fused pass."""
    for module in after:
        if isinstance(module, RPReLU):
            h = _activated(h, _activation_of(module), fusion)
        else:
            h = module(h.float() if h.dtype in (torch.bfloat16, torch.float16) else h)
    return h if alpha is None else h * alpha


def _activation_of(act: nn.Module) -> Activation:
    return Activation(act.slope, act.input_shift, act.output_shift) if isinstance(act, RPReLU) else Activation()


def _run_unit(
    unit: _Unit,
    v: Tensor,
    act: Activation,
    beta: Tensor | None,
    alpha: Tensor | None,
    added: bool,
    identity: Tensor | None,
    fusion: Fusion,
) -> Tensor:
    """h of one sign and convolution; the running mean of the convolution's inputs is kept."""
    sign, conv, _ = unit
    centred, counted = conv.centre == "input", conv.counted(len(v))
    step = Step(
        fusion.passes,
        Place(conv.stride, conv.padding, conv.dilation, conv.groups, conv.pad_value),
        Latent(conv.standardize, conv.binary, conv.binary and conv.scale_rule == "mean_abs"),
        sign.ste,
        sign.window == "sample",
        fusion.signs or v.dtype,
        added,
        counted,
        conv.gradient_centre,
        fusion.shared,
        fusion.int8 and conv.binary and v.dtype == torch.float32 and fusion.signs in (None, torch.float32),
    )
    scale = conv.known_scale()
    factor = conv.output_factor(scale)
    factor = conv.weight.new_ones(conv.out_channels) if factor is None else factor
    bias: Tensor = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
    if alpha is not None:
        factor, bias = factor * alpha, bias * alpha
    h, means = BinaryNode.apply(
        step,
        v,
        *act,
        sign.bias if isinstance(sign, RSign) else None,
        beta,
        sign.parameter,
        conv.weight,
        None if scale is None or not conv.binary else scale.detach().abs(),
        factor,
        bias,
        conv.expected_input(v.shape[2:]) if centred else None,
        identity,
    )
    if counted:
        with torch.no_grad():
            conv.input_sum += means.to(conv.input_sum.dtype)
            conv.input_count += counted
    return h
