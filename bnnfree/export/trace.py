"""From a module to a graph of its layers: torch.fx with our layers kept whole. Imports torch and bnnfree.nn.

Why torch.fx and not torch.export: the exporter needs to see a BinaryConv2d as a BinaryConv2d, with its path in the
module, to fold its parts and to name it in an error. torch.export takes every layer apart into tensor operations,
among them the weight standardisation and the custom backward of the signs, which would have to be recognised
again. What fx cannot trace (control flow that looks at values) is no feed-forward network and is an error here.
"""

from __future__ import annotations

import copy
import inspect
import operator
import traceback
from dataclasses import dataclass
from keyword import iskeyword
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils import parametrize

from bnnfree.errors import BnnfreeError
from bnnfree.export.errors import ExportError
from bnnfree.export.mutation import (
    NOT_THE_USERS,
    Proxy,
    check_state,
    described,
    state_versions,
    without_mutation,
)
from bnnfree.export.twin import check_finite, check_unchanged, kind_of, methods_put_on, reason, twin_of
from bnnfree.nn import Sign

BATCH = 2  # images that a network is traced with
PASSING = ("Identity", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout")  # in eval mode: nothing


class _Tracer(fx.Tracer):
    """Our layers are leaves, like torch's own. `inside` are the modules being traced, for an error to name."""

    record_stack_traces = True

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[str] = []

    def proxy(self, node: fx.Node) -> Proxy:
        return Proxy(node, self)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self.inside.append(f"{self.path_of_module(m)} ({type(m).__name__})")
        result = super().call_module(m, forward, args, kwargs)
        self.inside.pop()  # Why not in a finally: after an error it says where
        return result

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        check_unchanged(m, module_qualified_name)
        own = methods_put_on(m) or parametrize.is_parametrized(m)
        return kind_of(m) is not None or (not own and super().is_leaf_module(m, module_qualified_name))

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """As fx, with the image as the only input: further arguments of `forward` keep their defaults."""

        def forward(net: nn.Module, image: Any) -> Any:
            return root_fn(net, image)

        return super().create_args_for_root(forward, is_module, concrete_args)


class _Shapes(ShapeProp):
    """Also keeps plain numbers, which come from sizes, in node.meta["number"]: those that are the same in every run."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, int | float) and n.meta.setdefault("number", result) != result:
            n.meta["number"] = None  # it depends on the number of images
        return result


@dataclass(frozen=True)
class Traced:
    """A module's graph with the shape of every value in node.meta["shape"] (batch of 2), and where it starts."""

    module: fx.GraphModule
    image: fx.Node
    output: fx.Node

    def layer(self, node: fx.Node) -> nn.Module | None:
        """The layer that a node calls, if it calls one."""
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def between_sign_and(self, node: fx.Node) -> str | None:
        """The layers between `node` and the signs that it reads; None where no sign is that near.

        Followed back through whatever has no weights.
        """
        source, passed = node.all_input_nodes[0], list[str]()
        while source.op != "placeholder":
            layer = self.layer(source)
            if isinstance(layer, Sign):
                return ", ".join(reversed(passed)) or "its scale or offset"
            if any(True for _ in layer.parameters()) if layer is not None else not source.all_input_nodes:
                return None
            passed.append(path_of(source))
            source = source.all_input_nodes[0]
        return None


def trace(module: nn.Module, image_size: tuple[int, int], channels: int) -> Traced:
    """The graph of a copy of `module` in eval mode and float32, for images [N, channels, *image_size].

    It gives what `module` gives in eval mode, which is tried on an image, and changes no value in place.
    """
    name, twin = type(module).__name__, twin_of(module)
    check_finite(twin)
    traced = _graph_module(name, twin)
    graph = traced.graph
    output = next(node for node in graph.nodes if node.op == "output").args[0]
    if not isinstance(output, fx.Node):
        got = "a dict" if isinstance(output, dict) else f"a {type(output).__name__.removeprefix('immutable_')}"
        raise ExportError(
            f"export: {name} gives {got}, expected one tensor: the logits. Put it into "
            "a module that returns that tensor alone."
        )
    if output.op == "placeholder":
        raise ExportError(f"export: {name} gives its image back; there is nothing to export.")
    for node in graph.nodes:
        _check_node(traced, node)
    generator = torch.Generator().manual_seed(0)  # Why random: of an image of zeros wrong orders are not seen
    try:
        image = torch.randn(BATCH, channels, *image_size, generator=generator)
        without_mutation(name, traced, image.clone())
        graph.eliminate_dead_code()
        traced.recompile()
        with torch.random.fork_rng(devices=[]):
            _Shapes(traced).propagate(torch.cat([image, image[:1]]))
            _Shapes(traced).propagate(image)
    except BnnfreeError:
        raise
    except Exception as error:  # as above
        size = "x".join(map(str, (channels, *image_size)))
        raise ExportError(f"export: {name} fails on an image of {size}: {reason(error.__cause__ or error)}") from None
    for node in graph.nodes:
        meta = node.meta.get("tensor_meta")
        node.meta["shape"] = tuple(meta.shape) if hasattr(meta, "shape") else None
    output = next(node for node in graph.nodes if node.op == "output").args[0]
    assert isinstance(output, fx.Node)
    if output.meta["shape"] is None:
        raise ExportError(f"export: {name} gives no tensor ({described(output)}), expected one: the logits.")
    _check_same(name, module, traced, image)
    return Traced(traced, next(node for node in graph.nodes if node.op == "placeholder"), output)


def _graph_module(name: str, twin: nn.Module) -> fx.GraphModule:
    """`twin` as a graph of the calls that its forward makes for one image."""
    forward = list(inspect.signature(type(twin).forward).parameters.values())[1:]
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p for p in forward if p.default is p.empty and p.kind not in several]
    if len(needed) > 1 or not any(p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in forward):
        raise ExportError(f"export: {name} takes {len(needed)} inputs, expected one, by place: the image.")
    tracer, before = _Tracer(), state_versions(twin)
    try:
        graph = tracer.trace(twin)
    except BnnfreeError:
        raise
    except Exception as error:  # Why: tracing runs the module's own code, which may raise anything
        where = f", layer {tracer.inside[-1]}," if tracer.inside else ""
        raise ExportError(
            f"export: {name}{where} cannot be traced at {_users_line(error)} ({reason(error)}). {_untraceable(error)}"
        ) from None
    check_state(name, twin, before)
    try:
        return fx.GraphModule(twin, graph, name)
    except SyntaxError:
        odd = (path for path, _ in twin.named_modules() if iskeyword(path.split(".")[-1]) or not path.isprintable())
        path = next(odd, "a quote or backslash in it")
        raise ExportError(f"export: {name} has a layer with a name that torch.fx cannot write ({path!r}).") from None


def _check_node(traced: fx.GraphModule, node: fx.Node) -> None:
    """Errors: ExportError for a call that is random in eval mode, and for a layer with hooks."""
    if _drops_at_random(traced, node):
        raise ExportError(
            f"export: {described(node)} drops values at random in eval mode too. Pass training=self.training."
        )
    layer = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
    if layer is not None and (layer._forward_hooks or layer._forward_pre_hooks):
        raise ExportError(
            f"export: layer {node.target} ({type(layer).__name__}) has forward hooks, which a packed file cannot hold. "
            "Remove them (weight_norm and prune of torch are hooks too)."
        )


def _drops_at_random(traced: fx.GraphModule, node: fx.Node) -> bool:
    """True for a call of torch's dropout that is active although the network is in eval mode."""
    called = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    if "dropout" not in called:
        return False
    default = called in ("dropout", "dropout1d", "dropout2d", "dropout3d")
    given = dict(zip(("input", "p", "training"), node.args, strict=False)) | dict(node.kwargs)
    return bool(given.get("training", default)) and bool(given.get("p", 0.5) != 0)


def _check_same(name: str, module: nn.Module, traced: fx.GraphModule, image: Tensor) -> None:
    """Errors: ExportError where the graph does not give what the module itself gives in eval mode, call after call.

    Where the two round differently (proxies that became constants), float64 decides.
    """
    for dtype, limit in ((torch.float32, 0.0), (torch.float64, 1e-9)):
        try:
            with torch.random.fork_rng(devices=[]):
                mine = copy.deepcopy(traced).to(dtype)(image.to(dtype))
                twin = twin_of(module).to(dtype)
                expected = [twin(image.to(dtype)) for _ in range(2)]  # Why two: state that forward changes shows then
        except Exception:  # Why: code that does not run in float64 has no second chance; it differed in float32
            break
        if all(mine.shape == e.shape and (mine - e).abs().max() <= limit * e.abs().max() for e in expected):
            return
    raise ExportError(
        f"export: {name} computes something else than the graph that was traced of it: its forward depends on what "
        "tracing cannot see (a global, a counter or other state that changes from call to call, random numbers, .data, "
        "autocast, a hook or a __call__ of the whole network, a method put on an object). Make it a fixed sequence of "
        "layers."
    )


def _users_line(error: BaseException) -> str:
    """FILE:LINE of the innermost code that is neither torch's nor the exporter's."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(NOT_THE_USERS)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "an unknown line"


def _untraceable(error: BaseException) -> str:
    """The remedy for an error of tracing."""
    text = str(error)
    if "not installed as a submodule" in text:
        return "It calls a layer from a plain list or dict. Keep layers in nn.ModuleList or nn.ModuleDict."
    if "cannot be iterated" in text or "unpack" in text:
        return "It loops over a tensor or unpacks one. Take its parts by slices: x[:, :n], x[:, n:]."
    if "argument of type" in text:
        return "It computes with that. Use a number, or a tensor that is a buffer or parameter."
    if "control flow" in text or "bool" in text or "Proxy" in text or "'len'" in text:
        return (
            "It decides by a value of the image, or counts by its size. Its forward must be a fixed sequence of layers."
        )
    return "Its forward must be a fixed sequence of layers: no branches or loops that look at values."


def path_of(node: fx.Node) -> str:
    """Name of a node in messages and tensors: the layer's path in the module, or the node's own name."""
    return str(node.target) if node.op == "call_module" else node.name


def is_passing(traced: Traced, node: fx.Node) -> bool:
    """Does the node leave every value as it is (in eval mode)? Flattening counts."""
    layer = traced.layer(node)
    if layer is not None:
        return getattr(kind_of(layer), "__name__", "") in (*PASSING, "Flatten")
    if node.op == "call_method":
        return node.target in ("flatten", "view", "reshape", "contiguous", "clone", "detach")
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
