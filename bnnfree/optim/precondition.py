"""Batch normalisation preconditioning: gradients as if every layer's input were normalised; no layer is added.

Imports torch, bnnfree.errors and bnnfree.nn only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from bnnfree.errors import BnnfreeError
from bnnfree.nn import WeightLayer
from bnnfree.optim.groups import REAL


def whiten(
    grad: Tensor, bias_grad: Tensor | None, mean: Tensor, inverse: Tensor, groups: int = 1
) -> tuple[Tensor, Tensor | None]:
    """E[h h^T]^-1 times the gradient of one layer's weight and bias; `inverse` stands for 1 / s2.

    h is the layer's input with a 1 in front of it, its channels taken as independent, of mean mu and variance s2:

        gW'[o,c,..] = (gW[o,c,..] - gb[o] mu[c]) / s2[c]
        gb'[o]      = gb[o] - sum over c and taps of mu[c] gW'[o,c,..]

    This is P P^T g, P = [[1, -mu^T], [0, I]] diag(1, 1/s), and P^T h = [1; (h - mu)/s]: a step along it moves the
    output as a step along the gradient moves it in a layer that sees standardised inputs.

    Without a bias (bias_grad None) h has no 1, and E[h h^T] is diag(s2) + mu mu^T with mu once for every tap:

        gW'[o] = (gW[o] - mu k[o]) / s2,   k[o] = (mu / s2) . gW[o] / (1 + (mu / s2) . mu)

    Shapes: grad [O, C/groups, ...], bias_grad [O], mean and inverse [C]. Returns (gW', gb' or None).
    """
    grouped = grad.unflatten(0, (groups, -1))
    shape = (groups, 1, -1, *[1] * (grad.dim() - 2))
    mu, inverse = mean.view(shape), inverse.view(shape)
    if bias_grad is None:
        taps = grad[0, 0].numel()
        ratio = mu * inverse
        share = _dot(grouped, ratio) / (1 + taps * _dot(ratio, mu))
        return ((grouped - share.view(groups, -1, *[1] * (grad.dim() - 1)) * mu) * inverse).flatten(0, 1), None
    new = (grouped - bias_grad.view(groups, -1, *[1] * (grad.dim() - 1)) * mu) * inverse
    return new.flatten(0, 1), bias_grad - _dot(new, mu).flatten()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The products of two [groups, O, ...] summed over all but these two dims."""
    return (a * b).flatten(2).sum(2)


class Precondition:
    """Between backward and optimiser: the gradient of each layer's (W, b) becomes P P^T of it (`whiten`).

        precondition = Precondition(model)           # after model.to(device), before torch.compile and DDP
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for images, labels in batches:
            loss(model(images), labels).backward()   # once, or once for each micro-batch
            precondition.step()                      # then clipping (AGC), if any
            optimizer.step()
            optimizer.zero_grad()

    Layers: every WeightLayer (ScaledStdConv2d, BinaryConv2d, BinaryLinear), nn.Linear and nn.Conv*d of `model`
    with something to train, or those for which `choose(name, layer)` holds. Their forward stays as it is, so
    nothing remains in the state dict, in an exported model or at inference.

    Statistics: mu and s2 of a layer's inputs, per input channel over samples and positions (padding not
    counted), for each forward pass in training mode. They stand still during a step, so that what is done to
    the gradient is linear and the sum over micro-batches and processes commutes with it. `step` then moves them
    by a share (1 - rho) / (1 - rho^steps) of the way to this step's first and second moment. s2 is the second
    moment about the running mean: one sample per step is enough. A layer's weights wait (gW' = 0, gb' = gb) until
    `warmup` values per channel were seen, a batch of 64 or one image; the first step of all only looks.

        s2 <- s2 + floor max_c s2 + absolute_floor;   at least sign_floor where the input is signs (binary_input)
        the gradients of all the layer's parameters are divided by max(m / N, 1)          batch_scale
        m: values that make one output (taps counted), N: samples times output positions of the step

    WeightLayers: the rule applies to the effective weight, what the latent became after standardisation, sign,
    scale and gain; the chain rule goes on from there to the latent. With centre "input" the layer sees
    h - input_mean, whose mean mu - input_mean is used. Their part happens within backward (torch.compile: in the
    graph), that of plain layers in `step`, on `.grad`.
    No bias: the published method needs one. Here the inverse of the inputs' own second moment takes its place
    (`whiten`); the step is invariant to the scale of the inputs but not to a shift, which no parameter can take up.
    Why not gW' as it is with a bias: without gb' beside it, it may point uphill.
    With Adam the division by s2 largely cancels; what couples weight and bias remains.
    A loss scale: call `step` after `GradScaler.unscale_`.
    Not finite: moments that are NaN or infinite are not taken in.

    Errors: BnnfreeError for an option out of range, a model without such layers, a weight that two layers share
    or that is computed by a parametrisation, a layer that has a preconditioner already, layers on two devices.
    Ref: Lange, Helfrich and Ye 2022, "Batch Normalization Preconditioning for Neural Network Training".
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rho: float = 0.99,
        floor: float = 1e-2,
        absolute_floor: float = 1e-4,
        sign_floor: float = 0.05,
        warmup: int = 64,
        batch_scale: bool = True,
        choose: Callable[[str, nn.Module], bool] = lambda name, layer: True,
    ):
        if not 0 <= rho < 1:
            raise BnnfreeError(f"Precondition: got rho {rho!r}, expected a number of at least 0, below 1.")
        options = {"floor": floor, "absolute_floor": absolute_floor, "sign_floor": sign_floor, "warmup": warmup}
        for option, value in options.items():
            if not value >= 0:
                raise BnnfreeError(f"Precondition: got {option} {value!r}, expected a number of at least 0.")
        self.rho, self.floor, self.absolute_floor = rho, floor, absolute_floor
        self.warmup, self.batch_scale = warmup, batch_scale
        chosen = [(name, module) for name, module in _trained_layers(model) if choose(name, module)]
        _check(model, chosen)
        self._layers = [_Layer(name, module) for name, module in chosen]
        self._sizes = [layer.channels for layer in self._layers]
        device = self._layers[0].mean.device
        self._owner = torch.arange(len(self._layers), device=device).repeat_interleave(
            torch.tensor(self._sizes, device=device)
        )
        signs = [sign_floor if getattr(layer.module, "binary_input", False) else 0.0 for layer in self._layers]
        per_layer = torch.zeros(len(self._layers), dtype=torch.float64, device=device)
        self._sign_floor = per_layer.new_tensor(signs)[self._owner]
        self._fan_in = per_layer.new_tensor([layer.weight[0].numel() for layer in self._layers])
        self._steps, self._values = per_layer, per_layer.clone()
        for layer in self._layers:
            layer.attach()

    @torch.no_grad()
    def step(self, reduce: Callable[[Tensor], object] | None = None) -> None:
        """Finish the gradients of this step and move the statistics; once, after the step's last backward.

        `reduce` sums the step's statistics over processes, in place (torch.distributed.all_reduce). The gradients
        must be shared by then, as DistributedDataParallel does in the backward pass.
        """
        layers = self._layers
        parts = [layer.sums[: layer.channels] for layer in layers]
        parts += [layer.sums[layer.channels : -2] for layer in layers] + [layer.sums[-2:] for layer in layers]
        packed = torch.cat(parts)
        if reduce is not None:
            reduce(packed)
        channels = len(self._owner)
        total, squares, counts = packed.split([channels, channels, 2 * len(layers)])
        inputs, outputs = counts.view(-1, 2).unbind(1)
        for layer, known in zip(layers, (self._steps + inputs > 0).unbind(), strict=True):
            if not isinstance(layer.module, WeightLayer):
                layer.transform(known)
        if self.batch_scale:
            self._divide(outputs)
        self._move(total, squares, inputs)
        torch._foreach_zero_([layer.sums for layer in layers])

    def _divide(self, outputs: Tensor) -> None:
        """Every gradient of a layer times min(N / m, 1); a layer that saw nothing keeps its own."""
        factors = torch.where(outputs > 0, (outputs / self._fan_in).clamp_max(1), torch.ones_like(outputs))
        pairs = [
            (param.grad, factor)
            for layer, factor in zip(self._layers, factors.unbind(), strict=True)
            for param in layer.module.parameters(recurse=False)
            if param.grad is not None
        ]
        if pairs:
            torch._foreach_mul_([grad for grad, _ in pairs], [factor.to(grad.dtype) for grad, factor in pairs])

    def _move(self, total: Tensor, squares: Tensor, inputs: Tensor) -> None:
        """Fold the step's sums of (h - mu) and (h - mu)^2 into the running moments."""
        old_mean, old_variance = self._flat("mean"), self._flat("variance")
        saw = (inputs > 0).double()
        self._steps += saw
        self._values += inputs
        share = (saw * (1 - self.rho) / (1 - self.rho ** self._steps.clamp_min(1)))[self._owner]
        count = inputs.clamp_min(1)[self._owner]
        move = share * (total / count)
        # E[h^2] - mu^2 of the moments mixed by `share`, written without the difference of large numbers
        variance = (old_variance + share * (squares / count - old_variance) - move.square()).clamp_min(0)
        finite = torch.isfinite(move) & torch.isfinite(variance)
        self._set("mean", torch.where(finite, old_mean + move, old_mean))
        self._set("variance", torch.where(finite, variance, old_variance))
        self._invert()

    def _invert(self) -> None:
        """1 / s2 of every channel, after the floors; 0 where a layer still waits or a channel never moves."""
        variance = self._flat("variance")
        largest = torch.stack([part.max() for part in variance.split(self._sizes)])[self._owner]
        floored = torch.maximum(variance + self.floor * largest + self.absolute_floor, self._sign_floor)
        ready = (self._values >= max(self.warmup, 1))[self._owner] & (floored > 0)
        self._set("inverse", torch.where(ready, 1 / floored, torch.zeros_like(floored)))

    def _flat(self, field: str) -> Tensor:
        return torch.cat([getattr(layer, field).double() for layer in self._layers])

    def _set(self, field: str, flat: Tensor) -> None:
        torch._foreach_copy_([getattr(layer, field) for layer in self._layers], list(flat.split(self._sizes)))

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """{layer: its mean [C], variance [C] (before the floors), steps and values}; safe with weights_only."""
        return {
            layer.name: {
                "mean": layer.mean.clone(),
                "variance": layer.variance.clone(),
                "steps": self._steps[i].clone(),
                "values": self._values[i].clone(),
            }
            for i, layer in enumerate(self._layers)
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Go back to what `state_dict` returned between two steps, on this device; nothing is loaded on an error."""
        expected = {layer.name: layer.channels for layer in self._layers}
        found = {name: len(part["mean"]) for name, part in state.items()}
        if expected != found:
            differing = sorted(dict(expected.items() ^ found.items()))
            raise BnnfreeError(
                f"Precondition.load_state_dict: got statistics of other layers or widths ({', '.join(differing)}), "
                "expected those of this model."
            )
        for i, layer in enumerate(self._layers):
            part = state[layer.name]
            layer.mean.copy_(part["mean"])
            layer.variance.copy_(part["variance"])
            self._steps[i], self._values[i] = part["steps"], part["values"]
            layer.sums.zero_()
        self._invert()

    def close(self) -> None:
        """Leave the model as it was found; gradients of later backward passes are the plain ones."""
        for layer in self._layers:
            layer.detach()


class _Layer:
    """One preconditioned layer: its running moments, the sums of the step, its hooks.

    mean, variance, inverse  [C] in at least float32; inverse is 1 / s2 after the floors, 0 while waiting
    sums                     [2C + 2] in float64: of h - mean, of its square, input values per channel, output positions
    """

    def __init__(self, name: str, module: nn.Module):
        self.name, self.module = name, module
        weight = self.weight
        self.groups: int = getattr(module, "groups", 1)
        self.channels = weight.shape[1] * self.groups
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.mean, self.variance, self.inverse = (weight.new_zeros(self.channels, dtype=dtype) for _ in range(3))
        self.sums = weight.new_zeros(2 * self.channels + 2, dtype=torch.float64)

    @property
    def weight(self) -> Tensor:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    def attach(self) -> None:
        self.handle = self.module.register_forward_hook(self.observe, with_kwargs=True)
        if isinstance(self.module, WeightLayer):
            self.module.preconditioner = self.through

    def detach(self) -> None:
        self.handle.remove()
        if isinstance(self.module, WeightLayer):
            self.module.preconditioner = None

    @torch.no_grad()
    def observe(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        """The forward hook: take in the moments of what came in."""
        x = args[0] if args else next(iter(kwargs.values()))
        if not module.training or not x.numel():
            return
        x = x[None] if x.dim() == 1 else x
        axis = x.dim() + 1 - self.weight.dim()  # the positions, if any, lie behind the channels
        n = x.numel() // self.channels
        variance, mean = torch.var_mean(x.to(self.mean.dtype), [d for d in range(x.dim()) if d != axis], correction=0)
        delta = (mean - self.mean).double()  # at first the mean itself, next to whose square a variance vanishes
        self.sums[: self.channels].add_(delta * n)
        self.sums[self.channels : -2].add_((variance + delta.square()) * n)
        self.sums[-2].add_(n)
        self.sums[-1].add_(output.numel() // self.weight.shape[0])

    def through(
        self, weight: Tensor, factor: Tensor | None, bias: Tensor | None, bare: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The same (weight, factor, bias) of a WeightLayer, whose gradients are preconditioned on the way back.

        bare: weight and factor stay apart, for a layer that multiplies after the product; else the factor is merged.
        """
        effective = weight if factor is None else weight * factor.view(-1, *[1] * (weight.dim() - 1))
        assert isinstance(self.module, WeightLayer)
        mean = self.mean - self.module.input_mean if self.module.centre == "input" else self.mean
        if bias is None or not bias.requires_grad:
            effective = _WhitenWeight.apply(effective, mean, self.inverse, self.groups)
        else:
            effective, bias = _Whiten.apply(effective, bias, mean, self.inverse, self.groups)
        if factor is None or not bare:
            return effective, None, bias
        return _Bare.apply(effective, weight.detach(), factor.detach()), factor.detach(), bias

    def transform(self, known: Tensor) -> None:
        """`whiten` on `.grad` of a plain layer; known: it saw inputs once (else its forward is never called)."""
        grad, bias = self.weight.grad, self.module.bias
        if grad is None:
            return
        bias_grad = bias.grad if isinstance(bias, Tensor) else None
        inverse = torch.where(known, self.inverse, torch.ones_like(self.inverse))
        new, new_bias = whiten(grad, bias_grad, self.mean, inverse, self.groups)
        grad.copy_(new)
        if bias_grad is not None and new_bias is not None:
            bias_grad.copy_(new_bias)


class _Whiten(torch.autograd.Function):
    """Forward: weight and bias as they are. Backward: `whiten`."""

    @staticmethod
    def forward(ctx, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, groups: int):
        ctx.save_for_backward(mean, inverse)
        ctx.groups = groups
        return weight.view_as(weight), bias.view_as(bias)

    @staticmethod
    def backward(ctx, grad: Tensor, bias_grad: Tensor):
        mean, inverse = ctx.saved_tensors
        return *whiten(grad, bias_grad, mean, inverse, ctx.groups), None, None, None


class _WhitenWeight(torch.autograd.Function):
    """`_Whiten` of a layer without a bias."""

    @staticmethod
    def forward(ctx, weight: Tensor, mean: Tensor, inverse: Tensor, groups: int):
        ctx.save_for_backward(mean, inverse)
        ctx.groups = groups
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        mean, inverse = ctx.saved_tensors
        return whiten(grad, None, mean, inverse, ctx.groups)[0], None, None, None


class _Bare(torch.autograd.Function):
    """Forward: `weight`, of which `effective` = weight * factor. Backward: what would have come to `effective`.

    The layer multiplies its output by a constant `factor`, so what comes is factor times that; a factor of
    exactly 0 hides it, and nothing goes on.
    """

    @staticmethod
    def forward(ctx, effective: Tensor, weight: Tensor, factor: Tensor):
        ctx.save_for_backward(factor)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (factor,) = ctx.saved_tensors
        undo = torch.where(factor == 0, torch.zeros_like(factor), 1 / factor)
        return grad * undo.view(-1, *[1] * (grad.dim() - 1)), None, None


def _trained_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, REAL) and any(p.requires_grad for p in module.parameters(recurse=False)):
            yield name, module


def _check(model: nn.Module, chosen: list[tuple[str, nn.Module]]) -> None:
    if not chosen:
        raise BnnfreeError(
            f"Precondition: got a {type(model).__name__} without a chosen convolution or linear layer that trains, "
            "expected at least one."
        )
    owners: dict[Tensor, str] = {}
    for name, module in chosen:
        weight = module._parameters.get("weight")
        if weight is None or isinstance(weight, UninitializedParameter):
            raise BnnfreeError(
                f"Precondition: got the layer {name} whose weight is no parameter with a shape, expected one. Run one "
                "batch through lazy layers first; leave out layers with a parametrisation by choose=."
            )
        if weight in owners:
            raise BnnfreeError(
                f"Precondition: got one weight in two layers, {owners[weight]} and {name}, expected each in one: "
                "their inputs differ. Leave both out by choose=."
            )
        owners[weight] = name
        if isinstance(module, WeightLayer) and module.preconditioner is not None:
            raise BnnfreeError(f"Precondition: got the layer {name} that has a preconditioner, call its close() first.")
    devices = sorted({str(weight.device) for weight in owners})
    if len(devices) > 1:
        raise BnnfreeError(f"Precondition: got layers on {' and '.join(devices)}, expected one device.")
