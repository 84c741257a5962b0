"""In-place changes taken out of a traced graph, so that every value is written once. Imports torch, never numpy.

A graph that holds `relu(x, inplace=True)` or `x += 1` runs right, but only in its order: whoever reads x later reads
what was changed. Here each change becomes a value of its own, and all later readers of the changed memory read that.

What changes what is seen by running the graph once: torch counts the changes of each tensor's memory (`_version`), and
tensors that share memory have one address. So an operation need not be known by name to be noticed. Where a reader
looks at another part or shape of the changed memory (a slice, a view), or where a parameter or buffer is changed,
there is no such value, and an ExportError names the line. So it does where a call gives its tensor itself or a copy of
it, whichever the order of its memory, its type or its device asks for (`contiguous`, `float`, `reshape`), one of
the two is changed, and the other is read: the network then computes this or that by what it is given.
"""

from __future__ import annotations

import inspect
import operator
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from bnnfree.export.errors import ExportError

NOT_THE_USERS = tuple(str(Path(file).parent) + os.sep for file in (torch.__file__, __file__))  # folders of code
IN_PLACE = {  # what Python's own in-place operators compute
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
    operator.imatmul: operator.matmul,
}
# What gives its tensor, a view of it, or a copy, by the tensor's order in memory, its type, device or shape
PERHAPS_COPIES = {
    *("contiguous", "reshape", "reshape_as", "flatten", "Flatten", "ravel", "resolve_conj", "resolve_neg", "to_dense"),
    *("to", "type", "type_as", "float", "double", "half", "bfloat16", "int", "long", "short", "bool", "char", "byte"),
    *("cpu", "cuda", "xpu", "pin_memory", "asarray", "as_tensor", "PixelShuffle", "PixelUnshuffle", "pixel_shuffle"),
    *("pixel_unshuffle", "einsum"),
}


class Proxy(fx.Proxy):
    """fx's stand-in for a tensor, which also records `x += y` and `x[...] = y` as changes of x."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _record(changed: Any) -> Any:
    return lambda self, other: self.tracer.create_proxy("call_function", changed, (self, other), {})


for _changed in IN_PLACE:
    setattr(Proxy, f"__{_changed.__name__}__", _record(_changed))


class _Watch(fx.Interpreter):
    """Runs a graph and notes which nodes changed the memory of which earlier values."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module, garbage_collect_values=False)
        self.changes: list[tuple[fx.Node, list[fx.Node]]] = []
        self.values: dict[fx.Node, list[Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        before = {node: [t._version for t in tensors] for node, tensors in self.values.items()}
        result = super().run_node(n)
        changed = [node for node, counts in before.items() if [t._version for t in self.values[node]] != counts]
        if changed:
            self.changes.append((n, changed))
        self.values[n] = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return result


def state_versions(module: nn.Module) -> dict[str, int]:
    """The number of changes of each parameter and buffer of `module`."""
    return {name: tensor._version for name, tensor in state_of(module)}


def state_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by path, those that no checkpoint holds too."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def check_state(name: str, module: nn.Module, before: dict[str, int]) -> None:
    """Errors: ExportError where a parameter or buffer of `module` was changed since `before`."""
    for path, version in state_versions(module).items():
        if version != before.get(path, version):
            raise ExportError(
                f"export: {name} changes its {path} in forward, and a packed file holds constants. "
                "Change it in training only (if self.training), or write the change as a new value: y = x + 1."
            )


def without_mutation(name: str, traced: fx.GraphModule, image: Tensor) -> None:
    """Rewrite the graph so that it computes the same without changing any value in place."""
    before, watch = state_versions(traced), _Watch(traced)
    with torch.random.fork_rng(devices=[]):
        watch.run(image)
    check_state(name, traced, before)
    for node, tensors in watch.values.items():
        if any(t.is_floating_point() and not torch.isfinite(t).all() for t in tensors):
            raise ExportError(
                f"export: {described(node)} gives NaN or infinity for a random image. It divides by 0, takes the root "
                "of a negative variance, or its numbers are too large."
            )
    place = {node: i for i, node in enumerate(traced.graph.nodes)}
    memory = _Memory(traced, watch, place)
    for node, _ in watch.changes:
        memory.check_certain(node)
    for node, changed in watch.changes:
        _rewrite(traced, node, changed, watch.values, place)
    traced.graph.lint()
    traced.recompile()


class _Memory:
    """Nodes that share memory for certain, and those that do by what their tensors are like."""

    def __init__(self, traced: fx.GraphModule, watch: _Watch, place: dict[fx.Node, int]):
        values, changes = watch.values, dict(watch.changes)
        self.values, self.place = values, place
        self.block: dict[fx.Node, int] = {}  # nodes of one block share memory, whatever the image
        self.perhaps: list[tuple[fx.Node, fx.Node]] = []  # of these blocks it is not known
        for node in values:
            self.block[node] = place[node]
            for source in [_changed_by(node)] if node in changes else node.all_input_nodes:
                if _may_copy(traced, node):
                    self.perhaps.append((source, node))
                elif _addresses(values[source]) & _addresses(values[node]):
                    self._join(self.block[source], self.block[node])

    def _join(self, old: int, new: int) -> None:
        self.block = {node: old if block == new else block for node, block in self.block.items()}

    def check_certain(self, node: fx.Node) -> None:
        """Errors: ExportError where `node` changes a tensor of which a later reader reads what may be a copy."""
        reached, by = {self.block[_changed_by(node)]}, dict[int, fx.Node]()
        links = [pair for pair in self.perhaps if self.place[pair[1]] < self.place[node]]
        for _ in links:  # as often as a chain of them may be long
            for source, copy in links:
                pair = {self.block[source], self.block[copy]}
                for block in pair - reached if pair & reached else ():
                    reached, by[block] = reached | {block}, copy
        for other in (other for other in self.block if self.block[other] in by):
            later = [u for u in other.users if self.place[u] > self.place[node] and self.values.get(u, True)]
            if later and self.place[other] < self.place[node]:
                raise ExportError(
                    f"export: {described(node)} changes a value in place, and {described(later[0])} reads what is the "
                    f"same tensor or a copy of it, by what tensor {described(by[self.block[other]])} is given. Write "
                    "it without the change: y = x + 1, relu(x, inplace=False). Or copy with x.clone()."
                )


def _changed_by(node: fx.Node) -> fx.Node:
    """The argument that a call changes: its `out`, else its first; the other arguments may be the same memory."""
    out = node.kwargs.get("out")
    return out if isinstance(out, fx.Node) else node.all_input_nodes[0]


def _may_copy(traced: fx.GraphModule, node: fx.Node) -> bool:
    """True for a call that gives its tensor or a copy of it."""
    layer = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
    called = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return (called if layer is None else type(layer).__name__) in PERHAPS_COPIES and not node.kwargs.get("copy")


def _addresses(tensors: list[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


def _rewrite(
    traced: fx.GraphModule,
    node: fx.Node,
    changed: list[fx.Node],
    values: dict[fx.Node, list[Tensor]],
    place: dict[fx.Node, int],
) -> None:
    """Let whoever reads changed memory after `node` read its result, and have it change nothing."""
    result = values[node][0] if len(values[node]) == 1 else None
    for other in changed:
        later = [user for user in other.users if place[user] > place[node]]
        if not later:
            continue
        if result is None or len(values[other]) != 1 or not _same_view(result, values[other][0]):
            raise ExportError(
                f"export: {described(node)} changes a value in place, and {described(later[0])} reads another view of "
                "it (a slice, or the whole of which this is a part). Write it without the change: y = x + 1, "
                "relu(x, inplace=False)."
            )
        other.replace_all_uses_with(node, delete_user_cb=lambda user: place[user] > place[node])
    _make_pure(traced, node)


def _same_view(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _make_pure(traced: fx.GraphModule, node: fx.Node) -> None:
    """The operation of `node` in the form that changes nothing. Errors: ExportError where torch has none."""
    node.kwargs = {key: value for key, value in node.kwargs.items() if key not in ("inplace", "out")}
    if node.op == "call_module":
        layer = traced.get_submodule(str(node.target))
        if hasattr(layer, "inplace"):  # False where the same layer was called before
            layer.inplace = False  # type: ignore[assignment]
            return
    elif node.op == "call_method":
        pure = str(node.target).removesuffix("_")
        if pure != node.target and hasattr(Tensor, pure):
            node.target = pure
            return
    elif node.op == "call_function" and (made := _pure_function(node)) is not None:
        node.target = made
        return
    raise ExportError(
        f"export: {described(node)} changes a value in place in a way that has no other form. "
        "Write it without the change: y = x + 1."
    )


def _pure_function(node: fx.Node) -> Any:
    """The function that computes what that of `node` does and changes nothing; None where there is none."""
    target: Any = node.target
    if target in IN_PLACE:
        return IN_PLACE[target]
    called = getattr(target, "__name__", "")
    if called.endswith("_") and not called.endswith("__"):
        pure = called.removesuffix("_")
        return getattr(F, pure, None) or getattr(torch, pure, None)
    try:
        names = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return target if called else None  # one of torch's own, whose `out` is gone by now
    if "inplace" in names and len(node.args) > names.index("inplace"):
        node.args = tuple(False if name == "inplace" else value for name, value in zip(names, node.args, strict=False))
    return None if target is operator.setitem else target


def described(node: fx.Node) -> str:
    """The name of a node in messages: the layer's path, or the call, and the line of the user's code."""
    called = getattr(node.target, "__name__", str(node.target))
    what = f"layer {node.target}" if node.op == "call_module" else f"node {node.name} ({called})"
    where = line_of(node)
    return f"{what} at {where}" if where else what


def line_of(node: fx.Node) -> str:
    """FILE:LINE of the user's code that made the node; empty where it is not known."""
    frames = re.findall(r'File "(.*)", line (\d+)', node.stack_trace or "")
    users = [f"{file}:{line}" for file, line in frames if not file.startswith(NOT_THE_USERS)]
    return users[-1] if users else ""
