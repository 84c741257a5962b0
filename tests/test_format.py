"""The packed file: its two generated companions, round trips, the plan of its memory, and writing it."""

import shutil
import subprocess

import numpy as np
import pytest
from damage import bases, every_op, residual
from helpers import ROOT
from packed import Net, images, random_net
from test_tools import tool  # noqa: F401

from bnnfree.engine import Engine
from bnnfree.engine.kernels import FAST
from bnnfree.engine.run import run_op
from bnnfree.errors import BnnfreeError
from bnnfree.files import OutputError
from bnnfree.format import (
    GraphError,
    LimitError,
    PackedModel,
    PlanError,
    Tensor,
    TextError,
    check_model,
    from_bytes,
    lifetimes,
    make_op,
    plan,
    read,
    schema,
    to_bytes,
    write,
)
from bnnfree.format.file import read_with_bytes
from bnnfree.format.packed import storage_shape
from bnnfree.format.plan import check_plan
from bnnfree.format.schema import ALIGN, DTYPES, HEADER_TYPE, OP_TYPE, OPS, TENSOR_TYPE
from bnnfree.format.text import join_numbers, metadata_bytes, read_metadata, split_numbers

NATIVE = ROOT / "bnnfree" / "engine" / "native"
TYPES = {"header": HEADER_TYPE, "tensor": TENSOR_TYPE, "op": OP_TYPE}


# -- what is generated


def test_header_and_tables_are_what_the_schema_says(tool):  # noqa: F811
    code, _, errors = tool("gen_format", "--check")
    assert code == 0, errors


def test_a_stale_file_is_found_and_a_run_prints_what_it_wrote(tool, monkeypatch):  # noqa: F811
    monkeypatch.setitem(schema.ERRORS, "MagicError", "something new")
    code, _, errors = tool("gen_format", "--check")
    assert code == 1 and "bnnfree/format/FORMAT.md" in errors and "format.h" not in errors
    monkeypatch.undo()
    before = (NATIVE / "format.h").read_bytes()
    code, printed, _ = tool("gen_format")
    assert code == 0 and printed.splitlines() == ["bnnfree/engine/native/format.h", "bnnfree/format/FORMAT.md"]
    assert (NATIVE / "format.h").read_bytes() == before


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (cc)")
def test_the_c_structs_have_the_offsets_of_the_numpy_records(tmp_path):
    lines = ['#include "format.h"', "#include <stdio.h>", "int main(void) {", '    printf("%s", BNNF_MAGIC);']
    expected = []
    for name, record in TYPES.items():
        struct = f"struct bnnf_{name}_record"
        lines += [f'    printf(" %zu", sizeof({struct}));']
        expected += [record.itemsize]
        for field in record.names:
            lines += [f'    printf(" %zu %zu", offsetof({struct}, {field}), sizeof((({struct} *)0)->{field}));']
            expected += [record.fields[field][1], record.fields[field][0].itemsize]
    codes = [*(f"DTYPE_{n}" for n in DTYPES), *(f"PLACE_{n}" for n in schema.PLACES), *(f"OP_{n}" for n in OPS)]
    expected += [*(d.code for d in DTYPES.values()), *schema.PLACES.values(), *(op.code for op in OPS.values())]
    lines += [f'    printf(" %d", (int)BNNF_{code.upper()});' for code in codes]
    lines += [f'    printf(" %llu", (unsigned long long)BNNF_{name});' for name in ("ALIGN", "NONE", *schema.LIMITS)]
    expected += [getattr(schema, name) for name in ("ALIGN", "NONE", *schema.LIMITS)]
    (tmp_path / "main.c").write_text("\n".join([*lines, "    return 0;", "}", ""]))
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{NATIVE}"]
    subprocess.run(["cc", *flags, tmp_path / "main.c", "-o", tmp_path / "main"], check=True)
    printed = subprocess.run([tmp_path / "main"], capture_output=True, check=True).stdout
    assert printed[:8] == schema.MAGIC
    assert printed[8:].split() == [str(n).encode() for n in expected]


def test_op_codes_follow_each_other_and_limits_are_all_named():
    assert [op.code for op in OPS.values()] == list(range(1, len(OPS) + 1))
    limits = {name for name in vars(schema) if name.startswith(("MAX_", "LEAST_"))}
    assert limits == set(schema.LIMITS)


def test_the_base_models_of_these_tests_hold_every_op_dtype_and_field():
    models = [from_bytes(blob) for blob in bases()]
    assert {op.name for model in models for op in model.ops} == set(OPS)
    assert {t.dtype for model in models for t in model.tensors} == set(DTYPES)
    used = {name for model in models for op in model.ops for name, index in op.fields.items() if index is not None}
    assert used >= set(schema.TENSOR_FIELDS)


# -- round trips


def assert_equal(a: PackedModel, b: PackedModel):
    """Equal in every field; constants bit for bit."""
    for name in ("input", "output", "arena_bytes", "classes", "metadata", "producer", "ops"):
        assert getattr(a, name) == getattr(b, name), name
    for x, y in zip(a.tensors, b.tensors, strict=True):
        for name in ("name", "dtype", "place", "shape", "offset"):
            assert getattr(x, name) == getattr(y, name), (x.name, name)
        assert (x.data is None) == (y.data is None) == (x.place != "constant")
        if x.data is not None:
            assert x.data.shape == y.data.shape and x.data.tobytes() == y.data.tobytes()


@pytest.mark.parametrize("build", [every_op, residual, *(lambda s=s: random_net(s, "wild") for s in range(4))])
def test_what_is_written_is_read_and_written_again_to_the_byte(tmp_path, build):
    model = build()
    size = write(model, tmp_path / "a.bnnf")
    again = read(tmp_path / "a.bnnf")
    assert_equal(again, model)
    assert write(again, tmp_path / "b.bnnf") == size == (tmp_path / "a.bnnf").stat().st_size
    assert (tmp_path / "a.bnnf").read_bytes() == (tmp_path / "b.bnnf").read_bytes() == to_bytes(again)


@pytest.mark.parametrize("mapped", [False, True])
def test_constants_are_read_only_views_of_the_files_bytes_at_aligned_offsets(tmp_path, mapped):
    write(every_op(), tmp_path / "a.bnnf")
    blob = (tmp_path / "a.bnnf").read_bytes()
    model, data = read_with_bytes(tmp_path / "a.bnnf", mapped)
    constants = [t for t in model.tensors if t.place == "constant"]
    for tensor in constants:
        assert tensor.offset % ALIGN == 0 and tensor.data.ctypes.data % ALIGN == 0
        assert not tensor.data.flags.writeable and not tensor.data.flags.owndata
        assert np.shares_memory(tensor.data, np.frombuffer(data, np.uint8))
        assert blob[tensor.offset : tensor.offset + tensor.bytes] == tensor.data.tobytes()
    assert max(t.offset + t.bytes for t in constants) == len(blob)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_large_file_is_in_memory_once_and_a_mapped_one_never(tmp_path, mapped):
    import tracemalloc

    net = Net(1, 1, 1)
    wide = net.add("conv2d", net.add("pointwise", 0), outputs=1 << 20, weights="f32", **WINDOW)
    net.add("conv2d", wide, outputs=4, weights="f32", **WINDOW)
    size = write(net.model(), tmp_path / "a.bnnf")
    tracemalloc.start()
    read_with_bytes(tmp_path / "a.bnnf", mapped)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 20e6 and peak < (0.3 if mapped else 1.3) * size  # and a byte per number, to see whether it is finite


WINDOW = {name: 1 for name in schema.WINDOW_FIELDS if name.startswith(("kernel", "stride", "dilation", "groups"))}
WINDOW |= {"padding_h": 0, "padding_w": 0}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.bnnf"
    write(residual(), path)
    before = path.read_bytes()
    broken = every_op()
    broken.tensors[broken.ops[0].scale].data = np.full(4, np.nan, np.float32)
    with pytest.raises(BnnfreeError):
        write(broken, path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OutputError, match="disk full"):
        write(every_op(), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.bnnf"]


@pytest.mark.parametrize("text", ["", "a\nb", "a\x1b[2J", "\x7f", "\x9b", "\ud800"])
@pytest.mark.parametrize("where", ["name", "class"])
def test_a_name_that_could_not_be_read_is_not_written(text, where):
    model = every_op()
    if where == "name":
        model.tensors[1].name = text
    else:
        model.classes[0] = text
    with pytest.raises(TextError):
        to_bytes(model)


@pytest.mark.parametrize(
    "metadata",
    [{"a": 1}, {1: "a"}, {"a": None}, {"a": ""}, {"": "a"}, {"a": "b\nc"}, {"a\n": "b"}, {"a": "\ud800"}, {"a": "\x9b"},
     ["a"]],
)  # fmt: skip
def test_metadata_that_could_not_be_read_is_not_written(metadata):
    model = every_op()
    model.metadata = metadata
    with pytest.raises(TextError):
        to_bytes(model)


def test_metadata_comes_back_as_it_was_written():
    about = {"größe": '日本 = \\ "x" ', " ": "=" * 100_000, **{f"k{i}": str(i) for i in range(1022)}}
    assert read_metadata(metadata_bytes(about)) == about
    assert read_metadata(b"") == {} and metadata_bytes({}) == b""
    with pytest.raises(LimitError, match="1025 keys"):
        metadata_bytes({**about, "more": "x"})
    with pytest.raises(LimitError, match="1025 bytes"):
        metadata_bytes({"k" * 1025: "v"})


def test_numbers_in_metadata_keep_every_digit():
    numbers = [0.1, 1 / 3, -2.5e-300, 255.0, 0.49139968]
    assert split_numbers(join_numbers(numbers), "x") == numbers
    for text in ("", "a", "1  2", "nan", "1e999", "1,2"):
        with pytest.raises(TextError, match="mean: got"):
            split_numbers(text, "mean")


@pytest.mark.parametrize("path", ["missing.bnnf", "", "a\0b"])
def test_what_cannot_be_opened_is_one_readable_error(tmp_path, path):
    with pytest.raises(BnnfreeError, match="cannot be read"):
        read(tmp_path / path)


@pytest.mark.parametrize("groups", [3, 5, 7, 12])
@pytest.mark.parametrize("name", schema.NORMS)
def test_the_groups_of_a_norm_divide_its_channels(name, groups):
    net = Net(2, 3, 1)
    net.add(name, net.real(6), groups=groups)
    if groups == 3:
        check_model(net.model())
        return
    with pytest.raises(GraphError, match=rf"got weights \({groups},\), expected \[groups\], which divides 6"):
        net.model()


# -- the plan


def random_graph(seed) -> PackedModel:
    """Activations of random sizes that random ops read: only what `plan` looks at."""
    random = np.random.default_rng(seed)
    count = int(random.integers(1, 40))
    tensors = [Tensor("image", "u8", "image", (1, 1, 1))]
    ops = []
    for _ in range(count):
        reads = [int(i) for i in random.choice(len(tensors), min(len(tensors), 2))]
        fields = dict(zip(("input", "other"), reads, strict=False))
        for name in random.choice([["real"], ["bits"], ["real", "bits"]][random.integers(3)], 1 + random.integers(2)):
            fields[str(name)] = len(tensors)
            dtype = {"real": "f32", "bits": "bits"}[str(name)]
            shape = tuple(int(n) for n in random.integers(1, 30, 3))
            if name == "real" and len(reads) == 2 and random.random() < 0.5:
                shape = tensors[reads[1]].shape  # of floats or of bits
            tensors.append(Tensor(f"t{len(tensors)}", dtype, "activation", shape))
        ops.append(make_op("pointwise", **fields))
    return PackedModel(tensors, ops, 0, int(random.integers(1, len(tensors))))


@pytest.mark.parametrize("first", range(0, 300, 100))
def test_what_lives_together_never_overlaps(first):
    taken = 0
    for seed in range(first, first + 100):
        model = random_graph(seed)
        plan(model)
        check_plan(model)
        spans = lifetimes(model)
        over = {}
        for number, op in enumerate(model.ops):
            last = op.other is not None and spans.get(op.other, (0, -1))[1] == number and op.other != op.input
            other, real = (model.tensors[i or 0] for i in (op.other, op.real))
            if op.real is not None and last and (other.dtype, other.shape) == ("f32", real.shape):
                assert other.offset == real.offset
                over[op.real] = op.other
        taken += len(over)
        whole = 0
        for a, (begin, end) in spans.items():
            x = model.tensors[a]
            assert x.offset % ALIGN == 0 and x.offset + x.bytes <= model.arena_bytes
            whole += x.bytes + -x.bytes % ALIGN
            for b, (start, stop) in spans.items():
                y = model.tensors[b]
                apart = x.offset + x.bytes <= y.offset or y.offset + y.bytes <= x.offset
                apart = apart or over.get(a) == b or over.get(b) == a
                assert a == b or apart or end < start or stop < begin, f"seed {seed}: {x.name} and {y.name}"
        largest = max(model.tensors[i].bytes for i in spans)
        assert largest <= model.arena_bytes <= whole
    assert taken


def stage(reads_again=False) -> PackedModel:
    """A trunk that two ops add to: each may write over what it adds to, unless that is read again."""
    tensors = [Tensor("image", "u8", "image", (5, 7, 3))]
    tensors += [Tensor(f"t{i}", "f32", "activation", (5, 7, 3)) for i in range(4)]
    ops = [make_op("pointwise", input=0, real=1), make_op("pointwise", input=0, other=1, real=2)]
    ops += [make_op("pointwise", input=0, other=2, real=3)]
    ops += [make_op("pointwise", input=0, other=1 if reads_again else 3, real=4)]
    if reads_again:
        ops.append(make_op("pointwise", input=3, other=4, real=5))
        tensors.append(Tensor("t4", "f32", "activation", (5, 7, 3)))
    model = PackedModel(tensors, ops, 0, len(tensors) - 1, classes=["a", "b", "c"])
    plan(model)
    check_model(model)
    return model


def test_a_sum_is_written_over_what_it_is_added_to():
    model = stage()
    assert model.arena_bytes == 5 * 7 * 3 * 4 + -(5 * 7 * 3 * 4) % ALIGN
    assert stage(reads_again=True).arena_bytes == 2 * model.arena_bytes


@pytest.mark.parametrize(("tensor", "over"), [(2, 1), (4, 3)])
def test_what_is_read_again_or_is_the_input_too_is_not_written_over(tensor, over):
    model = stage(reads_again=True)
    if tensor == 4:
        model.ops[3] = make_op("pointwise", input=3, other=3, real=4)
        model.ops[4] = make_op("pointwise", input=1, other=4, real=5)
    model.tensors[tensor].offset = model.tensors[over].offset
    with pytest.raises(PlanError, match="overlap"):
        check_plan(model)


def run_in_arena(model: PackedModel, pixels: np.ndarray) -> np.ndarray:
    """The output for one image, every activation in one block of arena_bytes at its planned offset."""
    arena = np.full(model.arena_bytes, 0xA5, np.uint8)

    def place(index):
        tensor = model.tensors[index]
        part = arena[tensor.offset : tensor.offset + tensor.bytes].view(DTYPES[tensor.dtype].storage)
        return part.reshape(1, *storage_shape(tensor.dtype, tensor.shape))

    for op in model.ops:
        values = {index: pixels if index == model.input else place(index) for index in op.reads()}
        for index, value in run_op(model, op, FAST, values).items():
            place(index)[...] = value
    return place(model.output).copy()


@pytest.mark.parametrize("build", [every_op, residual, *(lambda s=s: random_net(s) for s in range(12))])
def test_one_shared_arena_gives_what_separate_arrays_give(build):
    model = build()
    check_model(model)
    pixels = images(model, 1)
    assert run_in_arena(model, pixels).ravel().tobytes() == Engine(model).run(pixels).ravel().tobytes()
