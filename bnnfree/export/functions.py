"""Rules for functions of single values, and choices between two. Imports numpy, torch and its own room."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from bnnfree.export.rules import arguments, per_channel
from bnnfree.export.value import Value

if TYPE_CHECKING:
    from bnnfree.export.lower import Lowering


def function(name: str) -> Any:
    return lambda low, node, x, *_: low.builder.function(x, name)


def gelu(low: Lowering, node: fx.Node, x: Value, approximate: str) -> Value:
    return low.builder.function(x, "gelu" if approximate == "none" else "gelu_tanh")


def hard_sigmoid(low: Lowering, node: fx.Node, x: Value, *_: Any) -> Value:
    return low.builder.activate(x.affine(1 / 6, 0.5), low=0.0, high=1.0)


def hard_swish(low: Lowering, node: fx.Node, x: Value, *_: Any) -> Value:
    x = low.builder.share(x)
    return low.builder.multiply(hard_sigmoid(low, node, x), x)


def elu(low: Lowering, node: fx.Node, x: Value, alpha: float, scale: float = 1.0, inner: float = 1.0) -> Value:
    """scale (x, or alpha (exp(inner x) - 1) below 0)."""
    y = low.builder.function(x.affine(inner) if inner != 1 else x, "elu")
    y = y.affine(1 / inner) if inner != 1 else y
    y = low.builder.activate(y, slope=alpha * inner) if alpha * inner != 1 else y
    return y.affine(scale) if scale != 1 else y


SELU = (1.6732632423543772, 1.0507009873554805)  # alpha, scale


def absolute(low: Lowering, node: fx.Node, x: Value, *_: Any) -> Value:
    return low.builder.activate(x, slope=-1.0)


def square(low: Lowering, node: fx.Node, x: Value, *_: Any) -> Value:
    x = low.builder.share(x)
    return low.builder.multiply(x, x)


def power(low: Lowering, node: fx.Node) -> Any:
    x, exponent = arguments(node, ("input", "exponent"), (None, None))
    known = {2: square, 0.5: function("sqrt"), -1: function("reciprocal"), 1: lambda low, node, x: x}
    if exponent not in known:
        raise low.refuse(node, f"takes the power {exponent}", f"Known are {', '.join(map(str, known))}.")
    return known[exponent](low, node, low.value(node, x))  # type: ignore[operator]


def compared(kind: str) -> Any:
    """1 where the comparison with numbers per channel holds, else 0."""

    def rule(low: Lowering, node: fx.Node) -> Value:
        a, b = (low.take(argument) for argument in arguments(node, ("input", "other"), (None, None)))
        if not isinstance(a, Value) or isinstance(b, Value):
            raise low.refuse(node, "compares two activations, or no activation", "Compare one with numbers.")
        limit = per_channel(low, node, b, a)
        difference = a.affine(1.0, -limit) if kind in ("ge", "lt") else a.affine(-1.0, limit)
        holds = low.builder.sign(difference)  # +1 at 0 too
        return holds.affine(0.5, 0.5) if kind in ("ge", "le") else holds.affine(-0.5, 0.5)

    return rule


def where(low: Lowering, node: fx.Node) -> Value:
    """b + mask (a - b)."""
    mask, *parts = (low.take(each) for each in arguments(node, ("condition", "input", "other"), (None, None, None)))
    if not isinstance(mask, Value) or mask.kind != "bits":
        raise low.refuse(node, "chooses by what is no comparison of an activation with numbers", "")
    build = low.builder
    mask = build.share(mask)
    zero = mask.affine(0.0)
    a, b = (
        build.share(part) if isinstance(part, Value) else zero.affine(1.0, per_channel(low, node, part, mask))
        for part in parts
    )
    return build.add(build.multiply(build.add(a, b.affine(-1.0)), mask), b)
