"""One rule per kind of layer: from a node of the torch graph to ops. Imports torch, numpy, bnnfree.nn, format.

To make a layer of your own exportable: a function (Lowering, node, value, layer) -> Value and a line in LAYERS
(for a function of torch: FUNCTIONS), or write its forward in terms of what is there. A rule works on float64
numbers in the engine's order [H, W, C]; what `Value` means stands in build.py.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bnnfree.errors import BnnfreeError
from bnnfree.export import functions, maps, rules
from bnnfree.export.build import Builder
from bnnfree.export.convolve import lower_linear
from bnnfree.export.errors import ExportError
from bnnfree.export.mutation import line_of
from bnnfree.export.norms import Affine, lower_affine, lower_batch_norm, lower_group_norm, lower_response_norm
from bnnfree.export.pool import lower_adaptive, lower_avg_pool, lower_max_pool
from bnnfree.export.quantize import Int8Layer
from bnnfree.export.rules import Rule
from bnnfree.export.trace import BATCH, PASSING, Traced, constant, is_passing, path_of
from bnnfree.export.twin import OURS, kind_of
from bnnfree.export.value import Value
from bnnfree.format import PackedModel
from bnnfree.nn import (
    BinaryConv2d,
    BinaryLinear,
    CentredLinear,
    FilterResponseNorm,
    GroupNorm,
    RPReLU,
    ScaledStdConv2d,
    Sign,
    ThresholdedLinear,
)
from bnnfree.nn.block import Clip


class Lowering:
    """Walks the nodes of a traced module in order and keeps what each became."""

    def __init__(self, traced: Traced, mean: np.ndarray, std: np.ndarray):
        self.traced = traced
        _, channels, height, width = traced.image.meta["shape"]
        self.builder = Builder((height, width, channels))
        self.values: dict[fx.Node, Any] = {}
        self.fixed: set[fx.Node] = set()  # nodes that no image changes: their values are those of torch
        self.slow: list[str] = []
        self.meaning: dict[int, tuple[fx.Node, Value]] = {}  # activation -> the node it stands for
        self.builder.on_settle = self._settled
        self.values[traced.image] = self.builder.image(1 / (255 * std), -mean / std)

    def model(self) -> PackedModel:
        """The packed model, its activations named after the nodes they stand for."""
        for node in self.traced.module.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            try:
                value = self._lower(node)
                if node.op == "get_attr" or (node.all_input_nodes and self.fixed.issuperset(node.all_input_nodes)):
                    self.fixed.add(node)
            except BnnfreeError:
                raise
            except Exception as error:  # Why: no graph of a user's may end in an error of Python's own
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
                raise self.refuse(
                    node, f"is called in a way that the exporter does not know ({reason})", _known()
                ) from error
            if isinstance(value, list):
                value = [self.builder.share(part) if isinstance(part, Value) else part for part in value]
            if isinstance(value, maps.Padded) and len(node.users) > 1:
                value = self.builder.pad(value.value, value.around, 0, value.fill)
            if isinstance(value, Value):
                self._check_shape(node, value)
                signs = value.kind == "bits" and value.tensor in self.meaning  # they stand for the sign, scaled or not
                if not (is_passing(self.traced, node) or signs):  # flattened values have another order
                    self.meaning[value.tensor] = (node, value)
                value = self.builder.share(value) if len(node.users) > 1 else value
            self.values[node] = value
        output = self.value(self.traced.output, self.traced.output)
        if self.is_flat(self.traced.output, output):
            rows, columns, channels = output.shape
            raise self.refuse(
                self.traced.output,
                f"gives flattened maps of {channels} channels and {rows}x{columns} positions as the network's output, "
                "in torch's order of values, which is not the engine's",
                "Return the maps themselves, or pool them to 1x1 first.",
            )
        names = {"image"}

        def name_of(index: int) -> str:
            path = path_of(self.meaning[index][0]) if index in self.meaning else "inner"
            name, count = path, 1
            while name in names:
                count += 1
                name = f"{path}#{count}"
            names.add(name)
            return name

        return self.builder.finish(output, name_of)

    def _check_shape(self, node: fx.Node, value: Value) -> None:
        """Errors: ExportError where torch gives `node` another shape than that of its value: [N, C, H, W] or flat."""
        rows, columns, channels = value.shape
        given = node.meta["shape"]
        if given not in ((BATCH, channels, rows, columns), (BATCH, channels * rows * columns)):
            raise self.refuse(
                node, f"gives a tensor of shape {list(given)}, expected [N, C, H, W] or [N, values]", "Keep to maps."
            )

    def _settled(self, value: Value) -> None:
        """`value.tensor` becomes scale * itself + shift: what a node means is said by it anew."""
        if value.tensor not in self.meaning:
            return
        node, meant = self.meaning.pop(value.tensor)
        if (value.scale != 0).all():
            scale = meant.scale / value.scale
            self.meaning[value.tensor] = (node, replace(meant, scale=scale, shift=meant.shift - scale * value.shift))

    def _lower(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return constant(self.traced, node)
        if node.all_input_nodes and self.fixed.issuperset(node.all_input_nodes):
            args, kwargs = (fx.node.map_arg(part, self.values.__getitem__) for part in (node.args, node.kwargs))
            return getattr(fx.Interpreter(self.traced.module), node.op)(node.target, args, kwargs)
        if node.op == "call_module":
            layer = self.traced.layer(node)
            assert layer is not None
            kind = kind_of(layer) or type(layer)
            kinds = kind.__mro__ if issubclass(kind, OURS) else (kind,)  # Why: a subclass of torch's computes its own
            rule = next((LAYERS[kind] for kind in kinds if kind in LAYERS), None)
            if rule is None:
                raise self.refuse(node, "has no engine op", _remedy(type(layer).__name__))
            if len(node.all_input_nodes) != 1:
                raise self.refuse(node, f"is given {len(node.all_input_nodes)} values, expected one", "")
            given = self.take(node.all_input_nodes[0])
            if isinstance(given, maps.Padded) and rule is lower_linear:
                return rule(self, node, given, layer)
            if isinstance(given, maps.Last) and kind in CHANNELS_LAST:
                return maps.Last(rule(self, node, given.value, layer))
            return rule(self, node, self.value(node, node.all_input_nodes[0]), layer)
        table: dict[Any, Rule] = FUNCTIONS if node.op == "call_function" else METHODS  # type: ignore[assignment]
        if node.target not in table:
            name = getattr(node.target, "__name__", str(node.target))
            raise self.refuse(node, f"calls {name}, which has no engine op", _remedy(name))
        return table[node.target](self, node)

    def number(self, argument: Any) -> Any:
        """An argument with the plain numbers that sizes gave, in slices and lists too."""
        if isinstance(argument, slice):
            return slice(*map(self.number, (argument.start, argument.stop, argument.step)))
        if isinstance(argument, list | tuple):
            parts = [self.number(part) for part in argument]
            return tuple(parts) if isinstance(argument, tuple) else parts
        number = argument.meta.get("number") if isinstance(argument, fx.Node) else None
        return argument if number is None else number

    def take(self, argument: Any) -> Any:
        """Return the lowered value of a node's argument (element by element for a list)."""
        if isinstance(argument, (list, tuple)):
            return [self.take(part) for part in argument]
        return self.values[argument] if isinstance(argument, fx.Node) else argument

    def value(self, node: fx.Node, argument: Any) -> Value:
        """An argument that must be an activation."""
        taken = self.take(argument)
        if isinstance(taken, maps.Padded):
            taken = self.values[argument] = self.builder.share(
                self.builder.pad(taken.value, taken.around, 0, taken.fill)
            )
        if not isinstance(taken, Value):
            views = {
                maps.Grouped: "channels in two dimensions",
                maps.Last: "a map with its channels last ([N, H, W, C])",
            }
            views |= {Tensor: "a constant", list: "several parts"}
            what = next((text for kind, text in views.items() if isinstance(taken, kind)), "a plain number or a shape")
            raise self.refuse(node, f"works on {what}, not on an activation", "")
        return taken

    def is_padded(self, argument: Any) -> bool:
        """True where the argument is a map with a padding that nothing has taken up."""
        return isinstance(argument, fx.Node) and isinstance(self.values.get(argument), maps.Padded)

    def is_flat(self, node: fx.Node, x: Value) -> bool:
        """True where x, the value of `node`, is one vector per image made of maps larger than 1x1.

        Its values then stand position by position, in torch channel by channel.
        """
        return len(node.meta["shape"]) == 2 and x.shape[:2] != (1, 1)

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
        layer, line = self.traced.layer(node), line_of(node)
        what = f"layer {path_of(node)} ({type(layer).__name__})" if layer is not None else f"node {node.name}"
        return ExportError(f"export: {what}{f' at {line}' if line else ''} {why}. {remedy}".rstrip())


def _remedy(name: str) -> str:
    """The remedy for a layer or function that has no op."""
    return f"{REMEDIES[name]} {_known()}" if name in REMEDIES else _known()


def _known() -> str:
    layers = sorted({kind.__name__ for kind in LAYERS} - {"Int8Layer", "Affine"})
    calls = sorted({str(getattr(known, "__name__", known)) for known in (*FUNCTIONS, *METHODS)})
    return (
        f"Layers that export: {', '.join(layers)}. Functions: {', '.join(calls)}. "
        "Another needs a rule in bnnfree/export/lower.py."
    )


_CURVE = "Use ReLU, PReLU, RPReLU, Hardtanh, SiLU, GELU or ELU in its place."
REMEDIES = {
    **dict.fromkeys(("Mish", "Softplus", "Softsign", "Softmin", "mish", "softplus", "log", "log1p"), _CURVE),
    **dict.fromkeys(
        ("sign", "bernoulli", "round", "floor", "ceil"), "Use bnnfree.nn.Sign, or an activation of the list."
    ),
    **dict.fromkeys(("to", "half", "double", "bfloat16", "type_as"), "Leave it out: what is exported is float32."),
    **dict.fromkeys(("conv2d", "linear", "batch_norm", "group_norm"), "Use the layer: nn.Conv2d, nn.Linear, a norm."),
    **dict.fromkeys(("forward", "DataParallel"), "Put the module in it in its place."),
    **dict.fromkeys(("unbind", "narrow", "index_select"), "Use slices, chunk or split."),
    **dict.fromkeys(("instance_norm", "layer_norm"), "Use the layer: nn.InstanceNorm2d, nn.LayerNorm."),
    **dict.fromkeys(("eq", "ne", "_assert"), "Leave checks of the image (torch._assert) out."),
    **dict.fromkeys(
        ("MultiheadAttention", "matmul", "bmm", "scaled_dot_product_attention"), "The engine has no attention."
    ),
    **dict.fromkeys(("LogSoftmax", "log_softmax"), "Return the logits: their order is the same."),
}


# -- the tables

on = rules.on

PADDINGS = {
    "constant": (nn.ZeroPad2d, nn.ConstantPad2d),
    "reflect": (nn.ReflectionPad2d,),
    "replicate": (nn.ReplicationPad2d,),
    "circular": (nn.CircularPad2d,),
}

LAYERS: dict[type, Rule] = {
    **dict.fromkeys(
        (BinaryConv2d, BinaryLinear, ScaledStdConv2d, CentredLinear, Int8Layer, nn.Conv2d, nn.Linear), lower_linear
    ),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm), lower_batch_norm),
    **dict.fromkeys((nn.GroupNorm, GroupNorm), lower_group_norm),
    FilterResponseNorm: lower_response_norm,
    Affine: lower_affine,
    ThresholdedLinear: lambda low, node, x, layer: low.builder.activate(x, low=low.vector(node, layer.tau, x)),
    Sign: rules.sign,
    Clip: rules.clip,
    RPReLU: rules.rprelu,
    nn.PReLU: lambda low, node, x, layer: rules.prelu(low, node, x, layer.weight),
    nn.LeakyReLU: lambda low, node, x, layer: rules.prelu(low, node, x, layer.negative_slope),
    nn.ReLU: lambda low, node, x, layer: rules.clamp(low, x, 0.0, None),
    nn.ReLU6: lambda low, node, x, layer: rules.clamp(low, x, 0.0, 6.0),
    nn.Hardtanh: lambda low, node, x, layer: rules.clamp(low, x, layer.min_val, layer.max_val),
    nn.MaxPool2d: lower_max_pool,
    nn.AvgPool2d: lower_avg_pool,
    nn.AdaptiveAvgPool2d: lower_adaptive("avg_pool2d"),
    nn.AdaptiveMaxPool2d: lower_adaptive("max_pool2d"),
    **{kind: maps.pad_layer(mode) for mode, kinds in PADDINGS.items() for kind in kinds},
    nn.Sigmoid: functions.function("sigmoid"),
    nn.Tanh: functions.function("tanh"),
    nn.SiLU: functions.function("silu"),
    nn.GELU: lambda low, node, x, layer: functions.gelu(low, node, x, layer.approximate),
    nn.ELU: lambda low, node, x, layer: functions.elu(low, node, x, layer.alpha),
    nn.CELU: lambda low, node, x, layer: functions.elu(low, node, x, layer.alpha, 1.0, 1 / layer.alpha),
    nn.SELU: lambda low, node, x, layer: functions.elu(low, node, x, *functions.SELU),
    nn.Hardsigmoid: functions.hard_sigmoid,
    nn.Hardswish: functions.hard_swish,
    nn.InstanceNorm2d: maps.instance_norm,
    nn.LayerNorm: maps.layer_norm,
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), maps.upsample),
    nn.ConvTranspose2d: maps.conv_transpose,
    nn.PixelShuffle: lambda low, node, x, layer: maps.shuffled(low, node, x, layer.upscale_factor),
    nn.PixelUnshuffle: lambda low, node, x, layer: maps.shuffled(low, node, x, layer.downscale_factor, True),
    nn.ChannelShuffle: lambda low, node, x, layer: maps.channel_shuffle(low, node, x, layer.groups),
    nn.Softmax: lambda low, node, x, layer: rules.softmax(low, node, x, layer.dim),
    nn.Flatten: rules.flatten,
    **{getattr(nn, name): rules.passed for name in PASSING},
}

FUNCTIONS: dict[Any, Rule] = {
    **dict.fromkeys((operator.add, torch.add), rules.arithmetic("add")),
    **dict.fromkeys((operator.sub, torch.sub), rules.arithmetic("sub")),
    **dict.fromkeys((operator.mul, torch.mul), rules.arithmetic("mul")),
    **dict.fromkeys((operator.truediv, torch.div), rules.arithmetic("div")),
    operator.neg: rules.negative,
    operator.getitem: maps.item,
    **dict.fromkeys((operator.floordiv, getattr), rules.plain),
    **{
        call: functions.compared(kind)
        for kind in ("ge", "gt", "le", "lt")
        for call in (getattr(operator, kind), getattr(torch, kind))
    },
    torch.where: functions.where,
    F.pad: maps.pad_call,
    torch.chunk: maps.chunked,
    torch.split: maps.divided,
    **dict.fromkeys((torch.transpose, torch.permute, torch.swapaxes), maps.transposed),
    **dict.fromkeys((torch.sigmoid, F.sigmoid), on(functions.function("sigmoid"))),
    **dict.fromkeys((torch.tanh, F.tanh), on(functions.function("tanh"))),
    F.silu: on(functions.function("silu")),
    F.gelu: on(functions.gelu, ("approximate",), ("none",)),
    F.elu: on(functions.elu, ("alpha",), (1.0,)),
    F.hardsigmoid: on(functions.hard_sigmoid),
    F.hardswish: on(functions.hard_swish),
    **dict.fromkeys((torch.abs, operator.abs), on(functions.absolute)),
    torch.square: on(functions.square),
    **dict.fromkeys((torch.pow, operator.pow), functions.power),
    torch.exp: on(functions.function("exp")),
    torch.sqrt: on(functions.function("sqrt")),
    torch.reciprocal: on(functions.function("reciprocal")),
    F.interpolate: maps.interpolate,
    **dict.fromkeys((F.pixel_shuffle, torch.pixel_shuffle), on(maps.shuffled, ("upscale_factor",), (None,))),
    **{call: maps.reduced(name) for name, call in (("sum", torch.sum), ("max", torch.amax), ("min", torch.amin))},
    **dict.fromkeys((F.relu, torch.relu), rules.relu),
    F.relu6: rules.relu6,
    **dict.fromkeys((torch.clamp, torch.clip), rules.clamp_call),
    F.hardtanh: rules.hardtanh,
    **dict.fromkeys((F.prelu, torch.prelu), rules.prelu_call),
    F.leaky_relu: rules.leaky_relu,
    **dict.fromkeys((torch.maximum, torch.max), rules.maximum),
    **dict.fromkeys((torch.flatten, torch.reshape), maps.view),
    **dict.fromkeys((torch.clone, F.dropout, F.dropout2d), rules.pass_call),  # active ones trace has refused
    F.max_pool2d: rules.max_pool_call,
    F.avg_pool2d: rules.avg_pool_call,
    F.adaptive_avg_pool2d: rules.on(lower_adaptive("avg_pool2d"), ("output_size",), (None,)),
    F.adaptive_max_pool2d: rules.on(lower_adaptive("max_pool2d"), ("output_size",), (None,)),
    torch.mean: maps.mean_of,
    **dict.fromkeys((torch.cat, torch.concat), rules.concat),
    **dict.fromkeys((F.softmax, torch.softmax), rules.softmax_call),
}

METHODS: dict[str, Rule] = {
    **dict.fromkeys(("flatten", "view", "reshape"), maps.view),
    **dict.fromkeys(("transpose", "permute", "swapaxes"), maps.transposed),
    "chunk": maps.chunked,
    "split": maps.divided,
    **{name: on(functions.function(name)) for name in ("sigmoid", "tanh", "exp", "sqrt", "reciprocal")},
    "abs": on(functions.absolute),
    "square": on(functions.square),
    "pow": functions.power,
    **{kind: functions.compared(kind) for kind in ("ge", "gt", "le", "lt")},
    **{name: maps.reduced(kind) for name, kind in (("sum", "sum"), ("amax", "max"), ("amin", "min"))},
    **dict.fromkeys(("contiguous", "clone", "detach", "float"), rules.pass_call),
    **dict.fromkeys(("size", "dim"), rules.plain),
    **{name: rules.arithmetic(name) for name in ("add", "sub", "mul", "div")},
    "relu": rules.relu,
    **dict.fromkeys(("clamp", "clip"), rules.clamp_call),
    "mean": maps.mean_of,
    "softmax": rules.softmax_call,
}

CHANNELS_LAST = {
    nn.LayerNorm, nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.ELU, nn.Hardswish,
    nn.Hardsigmoid, *(getattr(nn, name) for name in PASSING),
}  # fmt: skip
"""Layers that know no other layout where their channels are last."""
