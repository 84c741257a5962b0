"""A session takes the memory that bnnf_info says, a run allocates nothing and stays within the arena; and the arena is
what the lifetimes of the activations ask for."""

import sys

import pytest
from cc import HERE, compiler, engine_sources, objects, output_of
from damage import bases
from helpers import ROOT
from packed import random_net

from bnnfree.bench.kernels import Shape, model_of
from bnnfree.engine import BACKENDS, Engine, backends
from bnnfree.engine.binding import NativeModel, isa_names, load_library
from bnnfree.export import pack_network
from bnnfree.format import from_bytes, to_bytes
from bnnfree.models import MODELS
from bnnfree.train import open_source

WRAPPED = ("malloc", "calloc", "realloc", "aligned_alloc", "posix_memalign", "free")
SHAPES = [
    Shape("binary_conv2d", 56, 64, 64, 3, 1, 1, epilogue="block"),
    Shape("binary_conv2d", 14, 256, 256, 3, 1, 1, epilogue="float"),
    Shape("pixel_conv2d", 56, 3, 64, 7, 2, 3, "i8"),
    Shape("conv2d", 14, 64, 96),
]


EXAMPLES = {
    **{f"base {i}": lambda i=i: from_bytes(bases()[i]) for i in range(3)},
    **{f"{shape.op} {shape.text}": lambda shape=shape: model_of(shape)[0] for shape in SHAPES},
}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """native/memory.c with the engine, whose calls of malloc and the like it counts."""
    if sys.platform != "linux":
        pytest.skip("needs the linker's --wrap")
    if not isa_names():
        pytest.skip(load_library()[1])
    folder = tmp_path_factory.mktemp("memory")
    made = objects(folder, compiler(), [*engine_sources(), HERE / "memory.c"], "-O1", "-pthread")
    wrap = [f"-Wl,--wrap={name}" for name in WRAPPED]
    output_of(*compiler(), "-pthread", *wrap, *made, "-o", folder / "program", "-lm")
    return folder / "program"


def aligned(size):
    return size + -size % 64


def activations(model):
    return [tensor for tensor in model.tensors if tensor.place == "activation"]


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_session_takes_what_is_said_and_a_run_nothing(program, name, tmp_path):
    """With every instruction set, 1 to 3 threads, activations that share memory and that are kept (`keep`), memory of
    the session's own and the caller's (`given`)."""
    model = EXAMPLES[name]()
    (tmp_path / "m.bnnf").write_bytes(to_bytes(model))
    sizes = [aligned(tensor.bytes) for tensor in activations(model)]
    plans = (model.arena_bytes, sum(sizes))
    ends = (
        max(tensor.offset + tensor.bytes for tensor in activations(model)),
        sum(sizes) - sizes[-1] + activations(model)[-1].bytes,
    )
    words = [line.split() for line in output_of(program, tmp_path / "m.bnnf", *plans, timeout=60).splitlines()]
    rows = [{k: v if k == "isa" else int(v) for k, v in zip(w[::2], w[1::2], strict=True)} for w in words]
    assert len(rows) == 12 * len(isa_names())
    scratch = {isa: Engine(model, isa).info()["scratch_bytes"] for isa in isa_names()}
    for row in rows:
        isa, threads, keep = row["isa"], row["threads"], row["keep"]
        info = NativeModel(to_bytes(model), isa, threads, keep=bool(keep)).info
        assert {key: getattr(info, key) for key in row if hasattr(info, key) and key != "isa"}.items() <= row.items()
        assert row["peak"] == row["session_bytes"] - row["arena_bytes"] * row["given"], row
        assert row["arena_bytes"] == plans[keep] + threads * scratch[isa], row
        assert row["create_calls"] > 0 == row["run_calls"] == row["left"] == row["outside"], row
        assert row["same"], row  # whatever the memory held before
        if row["given"]:
            assert row["activations_end"] == ends[keep] and row["end"] <= row["arena_bytes"], row
        if row["given"] and threads == 1:  # with more threads than work, some have no use for their scratch
            assert (row["end"] > plans[keep]) == (scratch[isa] > 0), row


@pytest.mark.parametrize("backend", backends())
def test_info_says_what_memory_a_native_run_takes(backend):
    model = from_bytes(bases()[0])
    one, two = Engine(model, backend, 1).info(), Engine(model, backend, 2).info()
    if backend in BACKENDS:
        assert one["session_bytes"] is one["scratch_bytes"] is one["packed_bytes"] is None
        return
    assert one["packed_bytes"] == two["packed_bytes"] > 0 and two["scratch_bytes"] == 2 * one["scratch_bytes"] > 0
    for info in (one, two):
        rest = info["session_bytes"] - info["arena_bytes"] - info["scratch_bytes"]
        assert 0 < rest < 2000  # the session and its threads


# -- the plan


def most_alive(model):
    """Most bytes of activations that are alive at one time, each from the op that writes it to the last that reads it,
    but for an `other` whose place `real` may take: in no way can the arena be smaller."""
    first = {index: number for number, op in enumerate(model.ops) for index in op.writes()}
    last = {index: number for number, op in enumerate(model.ops) for index in op.reads()}
    last[model.output] = len(model.ops)
    for number, op in enumerate(model.ops):
        other = op.other if op.name != "concat" and op.other != op.input else None
        same = op.real is not None and other in first and model.tensors[other].shape == model.tensors[op.real].shape
        if same and last[other] == number:
            last[other] -= 1
    spans = [(first[index], last[index], aligned(model.tensors[index].bytes)) for index in first]
    return max(sum(size for begin, end, size in spans if begin <= n <= end) for n in range(len(model.ops) + 1))


def check_arena(model):
    assert most_alive(model) <= model.arena_bytes
    assert max(tensor.offset + aligned(tensor.bytes) for tensor in activations(model)) == model.arena_bytes


@pytest.mark.parametrize("seed", range(300, 340))
def test_the_arena_holds_what_is_alive_at_one_time_and_ends_with_it(seed):
    check_arena(random_net(seed))


@pytest.mark.parametrize("recipe", ["cifar10_reactnet20", "imagenet_reactnet_a"])
def test_of_these_networks_the_arena_is_not_larger_than_what_is_alive_at_one_time(recipe):
    network = open_source(ROOT / "recipes" / f"{recipe}.yaml", MODELS, ("model.width=0.25",))
    model = from_bytes(to_bytes(pack_network(network).model))
    check_arena(model)
    assert most_alive(model) == model.arena_bytes
