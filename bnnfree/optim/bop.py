"""Bop: binary weights that an optimiser flips, without latent magnitudes. Imports torch and errors only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bnnfree.errors import BnnfreeError


class Bop(torch.optim.Optimizer):
    """Flip a ±1 weight when the running mean of its gradient keeps pushing against it.

    Formula: m <- (1 - gamma) m + gamma g;  w <- -w where w m > threshold (strictly, so m has the sign of w).
    `gamma` in (0, 1] is how fast m follows the gradient; a larger `threshold` >= 0 means fewer flips. There
    is no learning rate: multiplying all gradients by c is dividing `threshold` by c.

    Construction replaces every weight by its sign, with sign(0) = +1: load the network first. State per
    parameter: "m", zeros at first. Parameter groups may carry their own gamma and threshold.
    `flips`: 0-dim int64 tensor, how many weights the last step flipped, over all groups; reading it waits.
    The layer must hand the gradient of sign(w) to w as it is (the identity estimator, as BinaryConv2d does):
    an estimator that vanishes at |w| = 1, such as 2 - 2|w|, never flips anything.
    Not finite: a NaN or infinite gradient ends as a NaN in m, whose weight never flips again: check the loss
    before the step.
    Errors: BnnfreeError for gamma outside (0, 1], threshold < 0, a sparse gradient, or a parameter that is
    not float32 or float64 (Why: 1 - gamma rounds to 1 in half precision, so m would never decay).
    Ref: Helwegen et al. 2019, Latent Weights Do Not Exist, Algorithm 1.
    """

    def __init__(self, params: Any, gamma: float = 1e-4, threshold: float = 1e-8) -> None:
        self.flips = torch.zeros((), dtype=torch.int64)
        super().__init__(params, {"gamma": gamma, "threshold": threshold})

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters and replace its weights by their signs."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if not 0 < group["gamma"] <= 1:
            raise BnnfreeError(f"Bop: got gamma {group['gamma']!r}, expected a number above 0, at most 1.")
        if not group["threshold"] >= 0:
            raise BnnfreeError(f"Bop: got threshold {group['threshold']!r}, expected a number of at least 0.")
        for w in group["params"]:
            if w.dtype not in (torch.float32, torch.float64):
                raise BnnfreeError(
                    f"Bop: got a parameter of {w.dtype}, expected torch.float32 or torch.float64. "
                    "Keep the weights in float32 and run the forward pass under autocast."
                )
            w.copy_(torch.where(w < 0, -1.0, 1.0))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        flips = [count for group in self.param_groups for count in self._update(group)]
        self.flips = (
            torch.stack([count.to(flips[0].device) for count in flips]).sum() if flips else torch.zeros_like(self.flips)
        )
        return loss

    def _update(self, group: dict[str, Any]) -> list[Tensor]:
        """Update one group in place; the number of flips in each of its parameters with a gradient."""
        weights = [w for w in group["params"] if w.grad is not None]
        if not weights:
            return []
        if any(w.grad.layout != torch.strided for w in weights):
            raise BnnfreeError("Bop: got a sparse gradient, expected dense ones.")
        for w in weights:
            if "m" not in self.state[w]:
                self.state[w]["m"] = torch.zeros_like(w)
        means = [self.state[w]["m"] for w in weights]
        torch._foreach_lerp_(means, [w.grad for w in weights], group["gamma"])
        flipped = [wm > group["threshold"] for wm in torch._foreach_mul(weights, means)]
        ones = [f.to(w.dtype) for f, w in zip(flipped, weights, strict=True)]
        torch._foreach_addcmul_(weights, weights, ones, value=-2)
        return [f.count_nonzero() for f in flipped]
