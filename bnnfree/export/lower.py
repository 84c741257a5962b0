"""One rule per kind of layer: from a node of the torch graph to ops. Imports torch, numpy, bnnfree.nn, format.

To make a layer of your own exportable: a function (Lowering, node, value, layer) -> Value and a line in LAYERS
(for a function of torch: FUNCTIONS), or write its forward in terms of what is there. A rule works on float64
numbers in the engine's order [H, W, C]; what `Value` means stands in build.py.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bnnfree.errors import nearest
from bnnfree.export.build import Builder, Value
from bnnfree.export.convolve import lower_linear
from bnnfree.export.errors import ExportError
from bnnfree.export.norms import Affine, lower_affine, lower_batch_norm, lower_group_norm, lower_response_norm
from bnnfree.export.pool import lower_adaptive, lower_average, lower_avg_pool, lower_max_pool, lower_pool
from bnnfree.export.quantize import Int8Layer
from bnnfree.export.trace import PASSING, Traced, constant, is_ours, is_passing, path_of
from bnnfree.format import PackedModel
from bnnfree.nn import (
    BinaryConv2d,
    BinaryLinear,
    CentredLinear,
    FilterResponseNorm,
    GroupNorm,
    RPReLU,
    RSign,
    ScaledStdConv2d,
    Sign,
    ThresholdedLinear,
)
from bnnfree.nn.block import Clip

Rule = Callable[..., Any]


class Lowering:
    """Walks the nodes of a traced module in order and keeps what each became."""

    def __init__(self, traced: Traced, mean: np.ndarray, std: np.ndarray):
        self.traced = traced
        _, channels, height, width = traced.image.meta["shape"]
        self.builder = Builder((height, width, channels))
        self.values: dict[fx.Node, Any] = {}
        self.meaning: dict[int, tuple[fx.Node, Value]] = {}  # activation -> the node it stands for
        self.builder.on_settle = self._settled
        self.values[traced.image] = self.builder.image(1 / (255 * std), -mean / std)

    def model(self) -> PackedModel:
        """The packed model, its activations named after the nodes they stand for."""
        for node in self.traced.module.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            value = self._lower(node)
            if isinstance(value, Value):
                signs = value.kind == "bits" and value.tensor in self.meaning  # they stand for the sign, scaled or not
                if not (is_passing(self.traced, node) or signs):  # flattened values have another order
                    self.meaning[value.tensor] = (node, value)
                value = self.builder.share(value) if len(node.users) > 1 else value
            self.values[node] = value
        output = self.values[self.traced.output]
        names = {"image": 1}

        def name_of(index: int) -> str:
            path = path_of(self.meaning[index][0]) if index in self.meaning else "inner"
            names[path] = names.get(path, 0) + 1
            return path if names[path] == 1 else f"{path}#{names[path]}"

        return self.builder.finish(output, name_of)

    def _settled(self, value: Value) -> None:
        if value.tensor in self.meaning:
            self.meaning[value.tensor] = (self.meaning[value.tensor][0], value)

    def _lower(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return constant(self.traced, node)
        if node.op == "call_module":
            layer = self.traced.layer(node)
            assert layer is not None
            # Why not any base class: a subclass of torch's may compute something else
            kinds = type(layer).__mro__ if is_ours(layer) else (type(layer),)
            rule = next((LAYERS[kind] for kind in kinds if kind in LAYERS), None)
            if rule is None:
                raise self.refuse(node, "has no engine op", _remedy(type(layer).__name__))
            if layer._forward_hooks or layer._forward_pre_hooks:
                raise self.refuse(node, "has forward hooks, which a packed file cannot hold", "Remove them.")
            return rule(self, node, self.value(node, node.all_input_nodes[0]), layer)
        table: dict[Any, Rule] = FUNCTIONS if node.op == "call_function" else METHODS  # type: ignore[assignment]
        if node.target not in table:
            name = getattr(node.target, "__name__", str(node.target))
            raise self.refuse(node, f"calls {name}, which has no engine op", _remedy(name))
        return table[node.target](self, node)

    def take(self, argument: Any) -> Any:
        """What an argument of a node became; a list by its parts."""
        if isinstance(argument, (list, tuple)):
            return [self.take(part) for part in argument]
        return self.values[argument] if isinstance(argument, fx.Node) else argument

    def value(self, node: fx.Node, argument: Any) -> Value:
        """An argument that must be an activation."""
        taken = self.take(argument)
        if not isinstance(taken, Value):
            raise self.refuse(node, f"works on {type(taken).__name__}, not on an activation", "")
        return taken

    def shape(self, node: fx.Node) -> tuple[int, int, int]:
        """[H, W, C] of a node's result; one dimension beside the batch becomes channels."""
        _, channels, *rest = node.meta["shape"]
        height, width = rest or (1, 1)
        return height, width, channels

    def vector(self, node: fx.Node, values: Tensor | np.ndarray, x: Value) -> np.ndarray:
        """Numbers per channel, or one for all, as float64 [C]."""
        array = values.detach().double().numpy() if isinstance(values, Tensor) else values
        if array.size not in (1, x.shape[2]):
            raise self.refuse(
                node,
                f"has {array.size} numbers for maps of {x.shape[2]} channels that were flattened",
                "Put it before the Flatten, or pool to 1x1 first.",
            )
        return np.broadcast_to(array.reshape(-1), (x.shape[2],)).copy()

    def refuse(self, node: fx.Node, why: str, remedy: str) -> ExportError:
        layer = self.traced.layer(node)
        what = f"layer {path_of(node)} ({type(layer).__name__})" if layer is not None else f"node {node.name}"
        return ExportError(f"export: {what} {why}. {remedy}".rstrip())


def _remedy(name: str) -> str:
    known = sorted({kind.__name__ for kind in LAYERS} - {"Int8Layer", "Affine"})
    return f"Known layers: {', '.join(known)}.{nearest(name, known)} Or add a rule in bnnfree/export/lower.py."


# -- activations, signs


def _sign(low: Lowering, node: fx.Node, x: Value, layer: Sign) -> Value:
    shift = low.vector(node, layer.bias, x) if isinstance(layer, RSign) else 0.0
    return low.builder.sign(x.affine(1.0, shift))


def _clip(low: Lowering, node: fx.Node, x: Value, layer: Clip) -> Value:
    shift = 0.0 if layer.bias is None else low.vector(node, layer.bias, x)
    return low.builder.activate(x.affine(1.0, shift), low=-1.0, high=1.0)


def _rprelu(low: Lowering, node: fx.Node, x: Value, layer: RPReLU) -> Value:
    if layer.input_shift is not None:
        x = x.affine(1.0, low.vector(node, layer.input_shift, x))
    y = low.builder.activate(x, slope=low.vector(node, layer.slope, x))
    return y.affine(1.0, low.vector(node, layer.output_shift, x))


def _clamp(low: Lowering, x: Value, least: float | None, most: float | None) -> Value:
    bounds = {name: float(v) for name, v in (("low", least), ("high", most)) if v is not None}
    return low.builder.activate(x, **bounds) if bounds else x


def _prelu(low: Lowering, node: fx.Node, x: Value, slope: Tensor | float) -> Value:
    return low.builder.activate(x, slope=low.vector(node, slope, x) if isinstance(slope, Tensor) else float(slope))


def _softmax(low: Lowering, node: fx.Node, x: Value, dim: int | None) -> Value:
    rank = len(node.meta["shape"])
    if dim not in (1, 1 - rank):
        raise low.refuse(node, f"takes softmax along dimension {dim}, expected the channels (1)", "Use dim=1.")
    x = low.builder.settle(x)
    return low.builder.emit("softmax", x, x.shape)


# -- joining


def _concat(low: Lowering, node: fx.Node) -> Value:
    parts, dim = _arguments(node, ("tensors", "dim"), (None, 0))
    values = [low.value(node, part) for part in parts]
    if dim not in (1, 1 - len(node.meta["shape"])):
        raise low.refuse(node, f"joins along dimension {dim}, expected the channels (1)", "")
    return low.builder.concat(values)


def _flatten(low: Lowering, node: fx.Node, x: Value, *_: Any) -> Value:
    """Only what comes to [N, values]; the order of values is the reader's business."""
    if len(node.meta["shape"]) != 2 or node.meta["shape"][1] != int(np.prod(x.shape)):
        if node.meta["shape"] == node.args[0].meta["shape"]:  # type: ignore[union-attr]
            return x
        raise low.refuse(node, f"makes {list(node.meta['shape'])} of it", "Only flattening to [N, values] is known.")
    return x


# -- functions and methods


def _arguments(node: fx.Node, names: tuple[str, ...], defaults: tuple) -> list[Any]:
    """The arguments of a call by name or position, with defaults."""
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return [given.get(name, default) for name, default in zip(names, defaults, strict=True)]


def _per_channel(low: Lowering, node: fx.Node, value: Any, x: Value) -> np.ndarray | float:
    """A number, or an array of one per channel."""
    if not isinstance(value, Tensor):
        return float(value)
    array = value.detach().double().numpy()
    rank = len(node.meta["shape"])
    if array.size == 1:
        return float(array.reshape(-1)[0])
    padded = (1,) * (rank - array.ndim) + array.shape
    if padded != (1, x.shape[2]) + (1,) * (rank - 2):
        raise low.refuse(
            node, f"combines an activation with a constant of shape {list(array.shape)}", "One per channel."
        )
    return array.reshape(-1)


def _arithmetic(kind: str) -> Rule:
    def rule(low: Lowering, node: fx.Node) -> Any:
        a, b = (low.take(argument) for argument in node.args[:2])
        if node.kwargs:
            raise low.refuse(node, f"has {', '.join(node.kwargs)}", "")
        if not isinstance(a, Value) and not isinstance(b, Value):
            return None  # sizes and other plain numbers
        if isinstance(a, Value) and isinstance(b, Value):
            if kind not in ("add", "sub") or a.shape != b.shape:
                raise low.refuse(node, f"combines two activations by {kind}", "The engine adds maps of one shape.")
            return low.builder.add(a, b if kind == "add" else b.affine(-1.0))
        x, other, swapped = (a, b, False) if isinstance(a, Value) else (b, a, True)
        c = _per_channel(low, node, other, x)
        if kind == "add":
            return x.affine(1.0, c)
        if kind == "sub":
            return x.affine(-1.0, c) if swapped else x.affine(1.0, -c)
        if kind == "div" and swapped:
            raise low.refuse(node, "divides by an activation", "")
        return x.affine(c if kind == "mul" else 1 / c)

    return rule


def _on(function: Callable[..., Any], names: tuple[str, ...] = (), defaults: tuple = ()) -> Rule:
    """A rule for a call whose first argument is the activation."""

    def rule(low: Lowering, node: fx.Node) -> Any:
        x, *rest = _arguments(node, ("input", *names), (None, *defaults))
        return function(low, node, low.value(node, x), *(low.take(value) for value in rest))

    return rule


def _mean(low: Lowering, node: fx.Node, x: Value, dim: Any, keepdim: Any) -> Value:
    if dim is None or sorted(d % 4 for d in (dim if isinstance(dim, (list, tuple)) else [dim])) != [2, 3]:
        raise low.refuse(node, f"averages over dimensions {dim}", "Over rows and columns: mean((2, 3)).")
    return lower_pool(low, node, x, "avg_pool2d", x.shape[:2], x.shape[:2], 0, 1, False)


def _maximum(low: Lowering, node: fx.Node) -> Value:
    a, b = (low.take(argument) for argument in node.args[:2])
    x, other = (a, b) if isinstance(a, Value) else (b, a)
    if not isinstance(x, Value) or isinstance(other, Value):
        raise low.refuse(node, "takes the larger of two activations", "")
    return low.builder.activate(x, low=_per_channel(low, node, other, x))


def _plain(low: Lowering, node: fx.Node) -> None:
    """Sizes, shapes and other numbers that only say how to reshape."""


_POOL = ("kernel_size", "stride", "padding")
_relu = _on(lambda low, node, x, *_: _clamp(low, x, 0.0, None), ("inplace",), (False,))
_relu6 = _on(lambda low, node, x, *_: _clamp(low, x, 0.0, 6.0), ("inplace",), (False,))
_clamp_call = _on(lambda low, node, x, least, most: _clamp(low, x, least, most), ("min", "max"), (None, None))
_pass = _on(lambda low, node, x: x)
_flatten_call = _on(_flatten)
_mean_call = _on(_mean, ("dim", "keepdim"), (None, False))
_softmax_call = _on(_softmax, ("dim",), (None,))

LAYERS: dict[type, Rule] = {
    **dict.fromkeys(
        (BinaryConv2d, BinaryLinear, ScaledStdConv2d, CentredLinear, Int8Layer, nn.Conv2d, nn.Linear), lower_linear
    ),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm), lower_batch_norm),
    **dict.fromkeys((nn.GroupNorm, GroupNorm), lower_group_norm),
    FilterResponseNorm: lower_response_norm,
    Affine: lower_affine,
    ThresholdedLinear: lambda low, node, x, layer: low.builder.activate(x, low=low.vector(node, layer.tau, x)),
    Sign: _sign,
    Clip: _clip,
    RPReLU: _rprelu,
    nn.PReLU: lambda low, node, x, layer: _prelu(low, node, x, layer.weight),
    nn.LeakyReLU: lambda low, node, x, layer: _prelu(low, node, x, layer.negative_slope),
    nn.ReLU: lambda low, node, x, layer: _clamp(low, x, 0.0, None),
    nn.ReLU6: lambda low, node, x, layer: _clamp(low, x, 0.0, 6.0),
    nn.Hardtanh: lambda low, node, x, layer: _clamp(low, x, layer.min_val, layer.max_val),
    nn.MaxPool2d: lower_max_pool,
    nn.AvgPool2d: lower_avg_pool,
    nn.AdaptiveAvgPool2d: lower_adaptive("avg_pool2d"),
    nn.AdaptiveMaxPool2d: lower_adaptive("max_pool2d"),
    nn.Softmax: lambda low, node, x, layer: _softmax(low, node, x, layer.dim),
    nn.Flatten: _flatten,
    **{getattr(nn, name): lambda low, node, x, layer: x for name in PASSING},
}

FUNCTIONS: dict[Any, Rule] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add), _arithmetic("add")),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub), _arithmetic("sub")),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul), _arithmetic("mul")),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div), _arithmetic("div")),
    operator.neg: _on(lambda low, node, x: x.affine(-1.0)),
    **dict.fromkeys((operator.getitem, operator.floordiv, getattr), _plain),
    **dict.fromkeys((F.relu, torch.relu), _relu),
    F.relu6: _relu6,
    **dict.fromkeys((torch.clamp, torch.clip), _clamp_call),
    F.hardtanh: _on(lambda low, node, x, a, b: _clamp(low, x, a, b), ("min_val", "max_val"), (-1.0, 1.0)),
    **dict.fromkeys((F.prelu, torch.prelu), _on(_prelu, ("weight",), (None,))),
    F.leaky_relu: _on(_prelu, ("negative_slope",), (0.01,)),
    **dict.fromkeys((torch.maximum, torch.max), _maximum),
    **dict.fromkeys((torch.flatten, torch.reshape), _flatten_call),
    **dict.fromkeys((F.dropout, F.dropout2d), _on(lambda low, node, x, *_: x)),
    F.max_pool2d: _on(
        lambda low, node, x, k, s, p, d, ceil, _: lower_pool(low, node, x, "max_pool2d", k, s, p, d, ceil),
        (*_POOL, "dilation", "ceil_mode", "return_indices"),
        (None, None, 0, 1, False, False),
    ),
    F.avg_pool2d: _on(
        lower_average,
        (*_POOL, "ceil_mode", "count_include_pad", "divisor_override"),
        (None, None, 0, False, True, None),
    ),
    F.adaptive_avg_pool2d: _on(lower_adaptive("avg_pool2d"), ("output_size",), (None,)),
    F.adaptive_max_pool2d: _on(lower_adaptive("max_pool2d"), ("output_size",), (None,)),
    torch.mean: _mean_call,
    **dict.fromkeys((torch.cat, torch.concat), _concat),
    **dict.fromkeys((F.softmax, torch.softmax), _softmax_call),
}

METHODS: dict[str, Rule] = {
    **dict.fromkeys(("flatten", "view", "reshape"), _flatten_call),
    **dict.fromkeys(("contiguous", "detach", "float"), _pass),
    **dict.fromkeys(("size", "dim"), _plain),
    **{name: _arithmetic(name.strip("_")) for name in ("add", "add_", "sub", "mul", "mul_", "div")},
    **dict.fromkeys(("relu", "relu_"), _relu),
    **dict.fromkeys(("clamp", "clip", "clamp_"), _clamp_call),
    "mean": _mean_call,
    "softmax": _softmax_call,
}
