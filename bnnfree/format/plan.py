"""Memory plan of the activations: lifetimes and arena offsets. Standard library and bnnfree.format only.

An activation is alive from the op that writes it to the last op that reads it, both included; the output lives
to the end. Two that are alive at one time share no byte, but for one case: `real` of an op may take the place of its
`other`, which each value of it is added to just before it is written. Offsets are for one image.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from bnnfree.format.errors import PlanError
from bnnfree.format.packed import PackedModel
from bnnfree.format.schema import ALIGN


def lifetimes(model: PackedModel) -> dict[int, tuple[int, int]]:
    """Activation -> (op that writes it, last op that reads it)."""
    spans: dict[int, tuple[int, int]] = {}
    for number, op in enumerate(model.ops):
        for tensor in op.writes():
            spans[tensor] = (number, number)
        for tensor in op.reads():
            if tensor in spans:
                spans[tensor] = (spans[tensor][0], number)
    if model.output in spans:
        spans[model.output] = (spans[model.output][0], len(model.ops))
    return spans


def replaced(model: PackedModel, number: int, spans: dict[int, tuple[int, int]]) -> int | None:
    """The activation whose place `real` of op `number` may take: its `other`, which nothing reads afterwards, which is
    not its input too, and which has the shape of `real`; None where there is none."""
    op = model.ops[number]
    if op.real is None or op.other is None or op.name == "concat" or op.other in (op.input, op.factor, model.input):
        return None
    if op.other not in spans or spans[op.other][1] != number:
        return None
    other, real = model.tensors[op.other], model.tensors[op.real]
    return op.other if (other.dtype, other.shape) == (real.dtype, real.shape) else None


def plan(model: PackedModel) -> None:
    """Give every activation an offset and the model its arena: the largest first, each as low as it fits; `real` takes
    the place of `other` where it may."""
    spans = lifetimes(model)
    head = {tensor: tensor for tensor in spans}  # who was the first in its place
    whole = dict(spans)  # of a first one: how long its place is taken
    for number, op in enumerate(model.ops):
        before = replaced(model, number, spans)
        if before is not None and op.real is not None:
            first = head[op.real] = head[before]
            whole[first] = (whole[first][0], spans[op.real][1])
            del whole[op.real]
    placed: list[tuple[int, int, int, int]] = []  # offset, end, first, last
    for tensor in sorted(whole, key=lambda t: (-model.tensors[t].bytes, whole[t])):
        size = _aligned(model.tensors[tensor].bytes)
        first, last = whole[tensor]
        at = 0
        for offset, end, begin, finish in placed:  # by offset
            if begin <= last and first <= finish:
                if at + size <= offset:
                    break
                at = max(at, end)
        model.tensors[tensor].offset = at
        insort(placed, (at, at + size, first, last))
    for tensor, first in head.items():
        model.tensors[tensor].offset = model.tensors[first].offset
    model.arena_bytes = max((end for _, end, _, _ in placed), default=0)


def check_plan(model: PackedModel) -> None:
    """PlanError where living activations overlap, lie outside the arena, are not aligned, or the arena is larger
    than they need. Takes time in proportion to n log n."""
    spans = lifetimes(model)
    starts: dict[int, list[int]] = {}
    ends: dict[int, list[int]] = {}
    top = 0
    for tensor, (first, last) in spans.items():
        starts.setdefault(first, []).append(tensor)
        ends.setdefault(last, []).append(tensor)
    alive: list[tuple[int, int]] = []  # (offset, tensor), disjoint
    for number in range(len(model.ops) + 1):
        before = replaced(model, number, spans) if number < len(model.ops) else None
        real = None if before is None else model.ops[number].real
        if before is not None and real is not None and model.tensors[before].offset == model.tensors[real].offset:
            ends[number].remove(before)
            del alive[bisect_left(alive, (model.tensors[before].offset, before))]
        for tensor in starts.get(number, []):
            record = model.tensors[tensor]
            offset, end = record.offset, record.offset + _aligned(record.bytes)
            if offset % ALIGN or end > model.arena_bytes:
                raise PlanError(
                    f"{record.name}: got offset {offset}, expected a multiple of {ALIGN} with {record.bytes} bytes "
                    f"inside the arena of {model.arena_bytes}."
                )
            at = bisect_left(alive, (offset, -1))
            below = alive[at - 1][1] if at else None
            above = alive[at][1] if at < len(alive) else None
            if above is not None and model.tensors[above].offset < end:
                raise PlanError(f"{record.name} and {model.tensors[above].name} overlap in the arena.")
            if below is not None and model.tensors[below].offset + _aligned(model.tensors[below].bytes) > offset:
                raise PlanError(f"{record.name} and {model.tensors[below].name} overlap in the arena.")
            alive.insert(at, (offset, tensor))
            top = max(top, end)
        for tensor in ends.get(number, []):
            del alive[bisect_left(alive, (model.tensors[tensor].offset, tensor))]
    if top != model.arena_bytes:
        raise PlanError(f"got an arena of {model.arena_bytes} bytes, expected the {top} that are used.")


def _aligned(size: int) -> int:
    return size + -size % ALIGN
