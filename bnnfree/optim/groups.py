"""Groups of parameters, by the type of their module, and the optimisers made of them.

Imports torch, bnnfree.errors and bnnfree.nn only. To add an optimiser: a function from groups and options
to a list of torch optimisers, and its line in OPTIMIZERS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from bnnfree.errors import BnnfreeError, nearest, pick
from bnnfree.nn import BinaryConv2d, BinaryLinear, WeightLayer
from bnnfree.optim.bop import Bop

KINDS = ("latent", "real", "affine", "head")
LATENT = (BinaryConv2d, BinaryLinear)
REAL = (WeightLayer, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
MOMENTS = {"momentum_buffer": 1, "exp_avg": 1, "exp_avg_sq": 2}  # what optimisers keep, in powers of the gradient


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    affine_lr_mult: float = 1.0,
    agc: bool = True,
    lr_mult: Mapping[str, float] = MappingProxyType({}),
    lr_mult_name: str = "lr_mult",
) -> list[dict[str, Any]]:
    """Optimiser groups of the trainable parameters of `model`, each parameter in exactly one of them.

    kind    what                                                     lr                   decay  AGC
    latent  `.weight` of BinaryConv2d, BinaryLinear, signed or not   lr                   yes    if agc
    real    `.weight` of ScaledStdConv2d, nn.Conv*d, nn.Linear       lr                   yes    if agc
    affine  all else: gains, scales, biases, RSign, RPReLU, norms    lr * affine_lr_mult  no     no
    head    every parameter of `find_head(model)`                    lr                   no     no

    lr_mult: factors on lr by pattern of parameter names (see `matching`), of several that match the last; parameters of
    one kind and several factors are several groups. lr_mult_name: what errors call it.
    Types include subclasses; names and numbers of dims decide nothing, so a rename changes nothing.
    A parameter shared by several modules appears once: head before latent before real before affine.
    Returns: non-empty groups in this order, dicts of params, names (full dotted ones), kind, lr, weight_decay
    and agc (bool, read by `adaptive_grad_clip`).
    Why affine has no AGC: a vector is one unit; biases that start at zero would be held to a gradient norm of
    clip * eps (2e-5 for a clip of 0.02), which freezes them under SGD. Why the head has none: Brock et al.
    2021 find it better not to clip the last linear layer.
    Errors: BnnfreeError for a negative number, a pattern without a match, a model with nothing to train, a lazy layer
    not yet run.
    """
    numbers = {"lr": lr, "weight_decay": weight_decay, "affine_lr_mult": affine_lr_mult}
    numbers |= {f"lr_mult of {pattern!r}": factor for pattern, factor in lr_mult.items()}
    for option, value in numbers.items():
        if not value >= 0:
            raise BnnfreeError(f"parameter_groups: got {option} {value!r}, expected a number of at least 0.")
    kinds = _kinds(model)
    decays = {"latent": weight_decay, "real": weight_decay}
    names = [name for name, _ in model.named_parameters()]
    factors = {name: mult for pattern, mult in lr_mult.items() for name in matching(names, pattern, lr_mult_name)}
    members: dict[tuple[str, float], list[tuple[str, nn.Parameter]]] = {(kind, 1.0): [] for kind in KINDS}
    for name, param in model.named_parameters():
        if isinstance(param, UninitializedParameter):
            raise BnnfreeError(
                f"parameter_groups: got the uninitialised parameter {name}, expected one with a shape. "
                "Run one batch through the model first."
            )
        if param.requires_grad:
            members.setdefault((kinds.get(param, "affine"), factors.get(name, 1.0)), []).append((name, param))
    groups = [
        {
            "params": [param for _, param in named],
            "names": [name for name, _ in named],
            "kind": kind,
            "lr": lr * factor * (affine_lr_mult if kind == "affine" else 1.0),
            "weight_decay": decays.get(kind, 0.0),
            "agc": agc and kind in ("latent", "real"),
        }
        for (kind, factor), named in sorted(members.items(), key=lambda item: KINDS.index(item[0][0]))
        if named
    ]
    if not groups:
        raise BnnfreeError(
            f"parameter_groups: got a {type(model).__name__} in which no parameter requires a gradient, "
            "expected at least one that does."
        )
    return groups


def matching(names: Iterable[str], pattern: str, where: str) -> list[str]:
    """The names that a shell's pattern (*, ?, [...]) matches. Errors: BnnfreeError if none, with the nearest."""
    names = list(names)
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        inside = any(name.startswith(f"{pattern}.") for name in names)
        hint = f" For all of that layer: '{pattern}.*'." if inside else nearest(pattern, names)
        hint = hint or f" Names are {', '.join(names[:3])}, ..., {names[-1]}."
        raise BnnfreeError(f"{where}: got {pattern!r}, which matches no parameter.{hint}")
    return found


def find_head(model: nn.Module) -> nn.Module | None:
    """The classifier of `model`, found by structure: None if it has none that can be told.

    A model with a method `get_classifier()` (timm's convention) answers for itself, None included. Otherwise
    it is the last module, in the order of registration, that has a weight of kind latent or real, if that one
    is an nn.Linear; norms and activations may follow it. A classifier that is a convolution, or that is
    registered before other layers, is found through `get_classifier` only.
    Errors: BnnfreeError when `get_classifier` returns something else.
    """
    if callable(ask := getattr(model, "get_classifier", None)):
        head = ask()
        if head is not None and not isinstance(head, nn.Module):
            raise BnnfreeError(
                f"{type(model).__name__}.get_classifier: got a {type(head).__name__}, expected a module. "
                "Return the classifying layer."
            )
        return head
    weighted = [module for module in model.modules() if isinstance(module, REAL)]
    return weighted[-1] if weighted and isinstance(weighted[-1], nn.Linear) else None


def describe_groups(groups: list[dict[str, Any]]) -> str:
    """A table with one line per group. Units: tensors counts parameters, values their elements; lr is the peak's."""
    lines = [f"{'kind':<8}{'tensors':>8}{'values':>12}{'lr':>12}{'weight decay':>14}  AGC"]
    for group in groups:
        values = sum(param.numel() for param in group["params"])
        lines.append(
            f"{group['kind']:<8}{len(group['params']):>8}{values:>12,}{group.get('initial_lr', group['lr']):>12.3g}"
            f"{group['weight_decay']:>14.3g}  {'yes' if group['agc'] else 'no'}"
        )
    return "\n".join(lines)


def make_optimizer(
    groups: list[dict[str, Any]],
    name: str,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float = 0.9,
    nesterov: bool = False,
    bop_gamma: float = 1e-4,
    bop_threshold: float = 1e-8,
) -> list[torch.optim.Optimizer]:
    """The optimisers `name` of OPTIMIZERS stands for, over copies of the dicts in `groups`.

    adam, adamw  betas, eps               one optimiser over all groups
    sgd          momentum, nesterov       one optimiser over all groups
    bop          bop_gamma, bop_threshold Bop on the latent group (lr and decay do not apply), then Adam
                 (betas, eps) on the rest. Bop replaces the latents by their signs, so the binary layers
                 must have binary=True and standardize=False (Why: a row of equal signs standardises to 0).

    Each takes its own options and ignores the others, so a recipe can pass them all. Each group keeps its lr
    under "initial_lr": a schedule with factor f sets lr = f * initial_lr in every group of every optimiser.
    Where torch has fused kernels for the parameters' device they take the steps; they repeat exactly.
    Errors: UnknownNameError; BnnfreeError from Bop, or when there is no latent group for it.
    """
    build = pick(OPTIMIZERS, name, "optimizer")
    return build(
        [{**group, "initial_lr": group["lr"]} for group in groups],
        betas=betas,
        eps=eps,
        momentum=momentum,
        nesterov=nesterov,
        bop_gamma=bop_gamma,
        bop_threshold=bop_threshold,
    )


@torch.no_grad()
def rescale_moments(optimizers: Iterable[torch.optim.Optimizer], scaled: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
    """After parameters were multiplied by factors without a change of the function: what optimisers remember of them.

    With p' = r p and the same loss, dL/dp' = (dL/dp) / r. So momenta are divided by r and second moments by r^2: the
    memory is then of gradients that would have been seen by p' all along, and neither direction nor size of the next
    steps is one of two units mixed. Of torch's optimisers; weight decay is of p' as it is.
    scaled: pairs of a parameter and its factors, of its shape (see `bnnfree.nn.rescale`).
    """
    pairs = list(scaled)
    for optimizer in optimizers:
        for param, ratio in pairs:
            kept = optimizer.state.get(param, {})
            for name, power in MOMENTS.items():
                if (moment := kept.get(name)) is not None:  # Why None: SGD's momentum before its first step
                    moment /= ratio**power


def _kinds(model: nn.Module) -> dict[Tensor, str]:
    """The kind of every parameter that is not affine; tensors hash by identity."""
    kinds: dict[Tensor, str] = {}
    for kind, types in (("real", REAL), ("latent", LATENT)):  # the latter overrules: LATENT are WeightLayers
        kinds |= {module.weight: kind for module in model.modules() if isinstance(module, types)}
    head = find_head(model)
    return kinds | {param: "head" for param in (head.parameters() if head is not None else ())}


def _adam(groups, *, betas, eps, **_) -> list[torch.optim.Optimizer]:
    return [_aligned(torch.optim.Adam(groups, betas=betas, eps=eps, fused=_fusible(groups)))]


def _adamw(groups, *, betas, eps, **_) -> list[torch.optim.Optimizer]:
    return [_aligned(torch.optim.AdamW(groups, betas=betas, eps=eps, fused=_fusible(groups)))]


def _sgd(groups, *, momentum, nesterov, **_) -> list[torch.optim.Optimizer]:
    return [_aligned(torch.optim.SGD(groups, momentum=momentum, nesterov=nesterov, fused=_fusible(groups)))]


def _fusible(groups) -> bool:
    """Are all parameters real numbers on one kind of device for which torch has fused kernels?"""
    params = [param for group in groups for param in group["params"]]
    kinds = {param.device.type for param in params}
    return len(kinds) == 1 and kinds <= {"cpu", "cuda"} and all(param.is_floating_point() for param in params)


def _aligned(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Gradients get the memory order of their parameters before each step: fused CPU kernels take it for given."""
    optimizer.register_step_pre_hook(_align)
    return optimizer


def _align(optimizer: torch.optim.Optimizer, *_) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None and param.grad.stride() != param.stride():
                param.grad = torch.empty_like(param).copy_(param.grad)


def _bop(groups, *, bop_gamma, bop_threshold, **options) -> list[torch.optim.Optimizer]:
    latent = [{**group, "weight_decay": 0.0} for group in groups if group["kind"] == "latent"]
    rest = [group for group in groups if group["kind"] != "latent"]
    if not latent:
        raise BnnfreeError(
            "optimizer 'bop': got no latent weights, expected a model with BinaryConv2d or BinaryLinear. "
            "Use adam for a model with real weights only."
        )
    return [Bop(latent, bop_gamma, bop_threshold), *(_adam(rest, **options) if rest else [])]


OPTIMIZERS: dict[str, Callable[..., list[torch.optim.Optimizer]]] = {
    "adam": _adam,
    "adamw": _adamw,
    "sgd": _sgd,
    "bop": _bop,
}
