"""Adaptive gradient clipping: a unit's gradient stays within a fraction of its weight.

Imports torch and bnnfree.errors only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from bnnfree.errors import BnnfreeError

EPS = 1e-3  # smallest weight norm assumed


@torch.no_grad()
def adaptive_grad_clip(
    parameters: Tensor | Iterable[Tensor] | Iterable[dict[str, Any]], clip: float, eps: float = EPS
) -> list[Tensor]:
    """Rescale, in place, the gradient of every unit u whose norm is too large for its weight.

    Formula: G_u <- G_u * min(1, limit_u / ||G_u||),  limit_u = clip * max(||W_u||, eps).
    A unit is one row along dim 0 (the output channel of OIHW and OI weights) of a tensor with two or more
    dims, and the whole tensor of a vector or a scalar. Norms of half-precision tensors are taken in float32.
    A gradient within its limit keeps every bit. `clip=inf` clips nothing.

    Parameters: tensors, or optimiser groups (dicts with "params"): a group with `agc: False` is left alone
    and a group's own "clip" replaces `clip`. Parameters without a gradient are skipped.
    Returns: for each parameter with a gradient (in no group with `agc: False`), in order, the share of its
    units that were rescaled, in [0, 1]: a 0-dim float32 tensor on its device, for which nothing waits.
    Not finite: a unit whose gradient norm is NaN, infinite or overflows becomes NaN as a whole and counts as
    not clipped (likewise one whose weight is NaN). AGC never turns a bad gradient into a good one.
    AMP: call it after `GradScaler.unscale_`; on scaled gradients the limit is wrong by the loss scale.
    Accumulation: call it once, after the last backward of the step.
    Errors: BnnfreeError when clip or eps is not positive, or a gradient is sparse.
    Ref: Brock et al. 2021, High-Performance Large-Scale Image Recognition Without Normalization, eq. 3.
    """
    _check_positive(clip=clip, eps=eps)
    chosen = list(_clipped(parameters, clip))
    rates = [Tensor() for _ in chosen]
    alike: dict[tuple, list[int]] = {}
    for i, (_, weight, limit) in enumerate(chosen):
        key = weight.device, torch.promote_types(weight.dtype, torch.float32), limit
        alike.setdefault(key, []).append(i)
    for (_, dtype, limit), indices in alike.items():
        bucket = _clip_units([chosen[i][1] for i in indices], limit, eps, dtype)
        for i, rate in zip(indices, bucket, strict=True):
            rates[i] = rate
    return rates


class ClipRate:
    """The mean clip rate of every named parameter over the steps since the last reset; no step waits for it.

    Units: share of a parameter's units (0 to 1), averaged over the steps in which it had a gradient.

        rates = adaptive_grad_clip(groups, 0.02)
        clip_rate.update(groups, rates)     # before zero_grad: a rate belongs to a parameter with a gradient
        clip_rate.mean()                    # {"blocks.0.conv.weight": 0.031, ...}; this one waits
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget every step."""
        self._total: dict[str, Tensor] = {}
        self._steps: dict[str, int] = {}

    def update(self, groups: Iterable[dict[str, Any]], rates: list[Tensor]) -> None:
        """Add what `adaptive_grad_clip(groups, ...)` returned; groups carry the "names" of their params."""
        names = [name for name, _, _ in _clipped(groups, 1.0)]
        if len(names) != len(rates) or "" in names:
            raise BnnfreeError(
                f"ClipRate.update: got {len(rates)} rates for {len(names)} parameters with a gradient, "
                "expected one each, in groups with names. "
                "Call it right after adaptive_grad_clip, before zero_grad."
            )
        if not names:
            return
        old = [
            self._total[name].to(rate.device) if name in self._total else torch.zeros_like(rate)
            for name, rate in zip(names, rates, strict=True)
        ]
        for name, total in zip(names, torch._foreach_add(old, rates), strict=True):
            self._total[name] = total
            self._steps[name] = self._steps.get(name, 0) + 1

    def mean(self) -> dict[str, float]:
        """{name: mean rate} in the order of first appearance; waits for the device once."""
        if not self._total:
            return {}
        device = next(iter(self._total.values())).device
        totals = torch.stack([total.to(device) for total in self._total.values()]).tolist()
        return {name: t / self._steps[name] for name, t in zip(self._total, totals, strict=True)}

    def state_dict(self) -> dict[str, dict]:
        """{"total": {name: 0-dim tensor}, "steps": {name: int}}: safe to `torch.load` with weights_only."""
        return {"total": dict(self._total), "steps": dict(self._steps)}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Replace everything counted by what `state_dict` returned; totals follow the rates' device."""
        self._total = dict(state["total"])
        self._steps = dict(state["steps"])


def _clipped(parameters: Any, clip: float) -> Iterator[tuple[str, Tensor, float]]:
    """(name or "", parameter, clip) of each parameter that has a gradient and that AGC applies to."""
    items = [parameters] if isinstance(parameters, Tensor | dict) else list(parameters)
    groups: Any = items if items and isinstance(items[0], dict) else [{"params": items}]
    for group in groups:
        if not group.get("agc", True):
            continue
        _check_positive(clip=group.get("clip", clip))
        params = group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        for name, param in zip(group.get("names", [""] * len(params)), params, strict=True):
            if not isinstance(param, Tensor):
                raise BnnfreeError(
                    f"adaptive_grad_clip: got a {type(param).__name__} as a parameter, expected tensors "
                    "or optimiser groups (dicts). Pass model.parameters(), not model.named_parameters()."
                )
            if param.grad is not None:
                yield name, param, group.get("clip", clip)


def _clip_units(weights: list[Tensor], clip: float, eps: float, dtype: torch.dtype) -> list[Tensor]:
    """Clip the gradients of weights that share a device and a norm dtype; the clip rate of each.

    Why flat: all units' norms lie in one vector, so the arithmetic is a handful of launches per step.
    """
    grads = [_dense_grad(weight) for weight in weights]
    norms = [_unit_norm(grad, dtype) for grad in grads]
    sizes = [norm.numel() for norm in norms]
    size = torch.cat([norm.flatten() for norm in norms])
    size = size + 0 * size  # inf becomes NaN: limit / inf would be 0 and zero the unit's finite gradients
    limit = clip * torch.cat([_unit_norm(w, dtype).flatten() for w in weights]).clamp_min(eps)
    factor = (limit / size).clamp_max(1)  # exactly 1 within the limit, also for a zero gradient (limit / 0)
    torch._foreach_mul_(grads, [f.view_as(n) for f, n in zip(factor.split(sizes), norms, strict=True)])
    clipped = (factor < 1).float().split(sizes)
    return list(torch._foreach_div(torch._foreach_norm(clipped, 1), [float(max(n, 1)) for n in sizes]))


def _dense_grad(weight: Tensor) -> Tensor:
    grad = weight.grad
    if grad is None or grad.layout != torch.strided:
        raise BnnfreeError(
            f"adaptive_grad_clip: got a gradient of layout {getattr(grad, 'layout', None)} and shape "
            f"{tuple(weight.shape)}, expected a dense one. Put that parameter in a group with agc=False."
        )
    return grad


def _unit_norm(x: Tensor, dtype: torch.dtype) -> Tensor:
    """||x_u|| in `dtype`; shapes: [O, ...] -> [O, 1, ...], [C] and [] -> []."""
    if x.ndim < 2:
        return torch.linalg.vector_norm(x, dtype=dtype)
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True, dtype=dtype)


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise BnnfreeError(f"adaptive_grad_clip: got {name} {value!r}, expected a number above 0.")
