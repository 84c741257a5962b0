"""From a module to a graph of its layers: torch.fx with our layers kept whole. Imports torch and bnnfree.nn.

Why torch.fx and not torch.export: the exporter needs to see a BinaryConv2d as a BinaryConv2d, with its path in the
module, to fold its parts and to name it in an error. torch.export takes every layer apart into tensor operations,
among them the weight standardisation and the custom backward of the signs, which would have to be recognised
again. What fx cannot trace (control flow that looks at values) is no feed-forward network and is an error here.
"""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from bnnfree.errors import BnnfreeError
from bnnfree.export.errors import ExportError
from bnnfree.export.norms import Affine, freeze_proxies
from bnnfree.nn import (
    BatchRenorm2d,
    FilterResponseNorm,
    GhostBatchNorm2d,
    GroupNorm,
    KalmanNorm2d,
    RPReLU,
    Sign,
    ThresholdedLinear,
    WeightLayer,
)
from bnnfree.nn.block import Clip

PASSING = ("Identity", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout")  # in eval mode: nothing


NORM_LAYERS = (BatchRenorm2d, GhostBatchNorm2d, KalmanNorm2d, GroupNorm, FilterResponseNorm)
OURS = (WeightLayer, Sign, RPReLU, Clip, *NORM_LAYERS, ThresholdedLinear, Affine)


def is_ours(layer: nn.Module) -> bool:
    """A layer of bnnfree whose forward is its own or torch's; a subclass that has another is traced through."""
    owner = next(kind for kind in type(layer).__mro__ if "forward" in vars(kind))
    return isinstance(layer, OURS) and owner.__module__.startswith(("bnnfree.nn.", "bnnfree.export.", "torch.nn."))


class _Tracer(fx.Tracer):
    """Our layers are leaves, like torch's own. `inside` are the modules being traced, for an error to name."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[str] = []

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self.inside.append(f"{self.path_of_module(m)} ({type(m).__name__})")
        result = super().call_module(m, forward, args, kwargs)
        self.inside.pop()  # Why not in a finally: after an error it says where
        return result

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_ours(m) or super().is_leaf_module(m, module_qualified_name)


@dataclass(frozen=True)
class Traced:
    """A module's graph with the shape of every value in node.meta["shape"] (batch of 2), and where it starts."""

    module: fx.GraphModule
    image: fx.Node
    output: fx.Node

    def layer(self, node: fx.Node) -> nn.Module | None:
        """The layer that a node calls, if it calls one."""
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None


def trace(module: nn.Module, image_size: tuple[int, int], channels: int) -> Traced:
    """The graph of a copy of `module` in eval mode and float32, for images [N, channels, *image_size]."""
    name, tracer = type(module).__name__, _Tracer()
    try:
        twin = freeze_proxies(copy.deepcopy(module).cpu().float().eval().requires_grad_(False))
        graph = tracer.trace(twin)
    except BnnfreeError:
        raise
    except Exception as error:  # Why: tracing runs the module's own code, which may raise anything
        reason = " ".join(str(error).split())[:200]
        where = f", layer {tracer.inside[-1]}," if tracer.inside else ""
        raise ExportError(
            f"export: {name}{where} cannot be traced ({reason}). Its forward must be a fixed sequence of layers: no "
            "branches or loops that look at values."
        ) from error
    traced = fx.GraphModule(twin, graph, name)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    graph = traced.graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise ExportError(f"export: {name} takes {len(inputs)} inputs, expected one: the image.")
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            ShapeProp(traced).propagate(torch.zeros(2, channels, *image_size))
    except Exception as error:  # as above
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        size = "x".join(map(str, (channels, *image_size)))
        raise ExportError(f"export: {name} fails on an image of {size}: {reason}") from error
    for node in graph.nodes:
        meta = node.meta.get("tensor_meta")
        node.meta["shape"] = tuple(meta.shape) if hasattr(meta, "shape") else None
    output = next(node for node in graph.nodes if node.op == "output").args[0]
    if not isinstance(output, fx.Node):
        raise ExportError(f"export: {name} gives {type(output).__name__}, expected one tensor: the logits.")
    if output is inputs[0]:
        raise ExportError(f"export: {name} gives its image back; there is nothing to export.")
    return Traced(traced, inputs[0], output)


def path_of(node: fx.Node) -> str:
    """How messages and tensors name a node: the layer's path in the module, or the node's own name."""
    return str(node.target) if node.op == "call_module" else node.name


def is_passing(traced: Traced, node: fx.Node) -> bool:
    """Does the node leave every value as it is (in eval mode)? Flattening counts."""
    layer = traced.layer(node)
    if layer is not None:
        return type(layer).__name__ in (*PASSING, "Flatten")
    if node.op == "call_method":
        return node.target in ("flatten", "view", "reshape", "contiguous", "detach")
    names = {torch.flatten, torch.reshape, nn.functional.dropout, nn.functional.dropout2d}
    return node.op == "call_function" and node.target in names


def first_layers(traced: Traced) -> list[fx.Node]:
    """The layers that read the image itself."""
    found, queue = [], list(traced.image.users)
    while queue:
        node = queue.pop()
        if is_passing(traced, node):
            queue += list(node.users)
        elif node.op == "call_module":
            found.append(node)
    return found


def last_layer(traced: Traced) -> fx.Node | None:
    """The layer whose output the logits are, up to flattening and softmax."""
    node = traced.output
    while is_passing(traced, node) or _is_softmax(traced, node):
        node = node.all_input_nodes[0]
    return node if node.op == "call_module" else None


def _is_softmax(traced: Traced, node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in (torch.softmax, nn.functional.softmax)
    return isinstance(traced.layer(node), nn.Softmax) or (node.op == "call_method" and node.target == "softmax")


def constant(traced: Traced, node: fx.Node) -> Tensor:
    """The parameter or buffer that a get_attr node reads."""
    return operator.attrgetter(str(node.target))(traced.module)
