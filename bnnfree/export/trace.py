"""From a module to a graph of its layers: torch.fx with our layers kept whole. Imports torch and bnnfree.nn.

Why torch.fx and not torch.export: the exporter needs to see a BinaryConv2d as a BinaryConv2d, with its path in the
module, to fold its parts and to name it in an error. torch.export takes every layer apart into tensor operations,
among them the weight standardisation and the custom backward of the signs, which would have to be recognised
again. What fx cannot trace (control flow that looks at values) is no feed-forward network and is an error here.
"""

from __future__ import annotations

import copy
import operator
import traceback
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from bnnfree.errors import BnnfreeError
from bnnfree.export.errors import ExportError
from bnnfree.export.mutation import (
    NOT_THE_USERS,
    Proxy,
    check_state,
    described,
    state_of,
    state_versions,
    without_mutation,
)
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

BATCH = 2  # images that a network is traced with
PASSING = ("Identity", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout")  # in eval mode: nothing


NORM_LAYERS = (BatchRenorm2d, GhostBatchNorm2d, KalmanNorm2d, GroupNorm, FilterResponseNorm)
OURS = (WeightLayer, Sign, RPReLU, Clip, *NORM_LAYERS, ThresholdedLinear, Affine)


def is_ours(layer: nn.Module) -> bool:
    """A layer of bnnfree whose forward is its own or torch's; a subclass that has another is traced through."""
    owner = next(kind for kind in type(layer).__mro__ if "forward" in vars(kind))
    return isinstance(layer, OURS) and owner.__module__.startswith(("bnnfree.nn.", "bnnfree.export.", "torch.nn."))


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

    def between_sign_and(self, node: fx.Node) -> str | None:
        """What stands between the signs that `node` reads and `node`; None where no sign is that near.

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
    name, tracer = type(module).__name__, _Tracer()
    twin = _twin(module)
    check_finite(twin)
    before = state_versions(twin)
    try:
        graph = tracer.trace(twin)
    except BnnfreeError:
        raise
    except Exception as error:  # Why: tracing runs the module's own code, which may raise anything
        where = f", layer {tracer.inside[-1]}," if tracer.inside else ""
        raise ExportError(
            f"export: {name}{where} cannot be traced at {_users_line(error)} ({_reason(error)}). {_untraceable(error)}"
        ) from None
    check_state(name, twin, before)
    traced = fx.GraphModule(twin, graph, name)
    graph = traced.graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise ExportError(f"export: {name} takes {len(inputs)} inputs, expected one: the image.")
    output = next(node for node in graph.nodes if node.op == "output").args[0]
    if not isinstance(output, fx.Node):
        raise ExportError(f"export: {name} gives {type(output).__name__}, expected one tensor: the logits.")
    if output is inputs[0]:
        raise ExportError(f"export: {name} gives its image back; there is nothing to export.")
    for node in graph.nodes:
        if _drops_at_random(traced, node):
            raise ExportError(
                f"export: {described(node)} drops values at random in eval mode too. Pass training=self.training."
            )
    generator = torch.Generator().manual_seed(0)  # Why random: of an image of zeros wrong orders are not seen
    image = torch.randn(BATCH, channels, *image_size, generator=generator)
    try:
        without_mutation(name, traced, image.clone())
        graph.eliminate_dead_code()
        traced.recompile()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            ShapeProp(traced).propagate(image)
    except BnnfreeError:
        raise
    except Exception as error:  # as above
        size = "x".join(map(str, (channels, *image_size)))
        raise ExportError(f"export: {name} fails on an image of {size}: {_reason(error.__cause__ or error)}") from None
    for node in graph.nodes:
        meta = node.meta.get("tensor_meta")
        node.meta["shape"] = tuple(meta.shape) if hasattr(meta, "shape") else None
    output = next(node for node in graph.nodes if node.op == "output").args[0]
    assert isinstance(output, fx.Node)
    _check_same(name, module, traced, image)
    return Traced(traced, inputs[0], output)


def _twin(module: nn.Module) -> nn.Module:
    """A copy of `module` as it is exported, out of the wrappers for training that hold it."""
    while isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel) or hasattr(module, "_orig_mod"):
        module = module.module if hasattr(module, "module") else module._orig_mod  # type: ignore[assignment]
    try:
        twin = copy.deepcopy(module)
    except Exception as error:  # Why: a copy runs the module's own code too, and tensors with a history have none
        raise ExportError(f"export: {type(module).__name__} cannot be copied ({_reason(error)}).") from None
    return freeze_proxies(twin.cpu().float().eval().requires_grad_(False))


def check_finite(module: nn.Module) -> None:
    """Errors: ExportError that names a parameter or buffer which holds NaN or an infinity."""
    for path, tensor in state_of(module):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = tensor[~torch.isfinite(tensor)]
            raise ExportError(
                f"export: {path}: got {bad[0].item()} in {len(bad):,} of {tensor.numel():,} values, expected finite "
                "numbers. Has the training diverged?"
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
    """Errors: ExportError where the graph does not give what the module itself gives in eval mode.

    Where the two round differently (proxies that became constants), float64 decides.
    """
    for dtype, limit in ((torch.float32, 0.0), (torch.float64, 1e-9)):
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            mine = copy.deepcopy(traced).to(dtype)(image.to(dtype))
            expected = _twin(module).to(dtype)(image.to(dtype))
        if mine.shape == expected.shape and (mine - expected).abs().max() <= limit * expected.abs().max():
            return
    raise ExportError(
        f"export: {name} computes something else than the graph that was traced of it: its forward depends on what "
        "tracing cannot see (a global, a counter, random numbers). Make it a fixed sequence of layers."
    )


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _users_line(error: BaseException) -> str:
    """FILE:LINE of the innermost code that is neither torch's nor the exporter's."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(NOT_THE_USERS)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "an unknown line"


def _untraceable(error: BaseException) -> str:
    """The remedy for an error of tracing."""
    text = str(error)
    if "cannot be iterated" in text or "unpack" in text:
        return "It loops over a tensor or unpacks one. The engine has no slices: give each part a layer of its own."
    if "control flow" in text or "bool" in text:
        return "It decides by a value of the image. Its forward must be a fixed sequence of layers."
    return "Its forward must be a fixed sequence of layers: no branches or loops that look at values."


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
