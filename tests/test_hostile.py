"""Every named error of the format, by edits of a valid file that each break one rule; and what a file cannot do."""

import tracemalloc

import edits_ops  # noqa: F401  adds its rows to EDITS
import numpy as np
import pytest
from edits import EDITS, damaged
from packed import Net, fields_of

from bnnfree.engine import Engine
from bnnfree.engine.kernels import border_index
from bnnfree.errors import BnnfreeError
from bnnfree.format import FormatError, LimitError, check_model, errors, from_bytes, make_op, read, schema
from bnnfree.format.shapes import count_classes
from bnnfree.ops import Side, Window, border_classes

GROUPS = [(error, *group) for error, groups in EDITS.items() for group in groups]
NAMES = [f"{error}-{function.__name__}" for error, function, *_ in GROUPS]


def outcome(blob: bytes) -> str:
    """Name of the error that a file raises."""
    try:
        check_model(from_bytes(blob))
    except FormatError as error:
        assert str(error).isprintable() and len(str(error)) < 500
        return type(error).__name__
    return "none"


@pytest.mark.parametrize(
    ("error", "function", "cases", "seal"), GROUPS, ids=[f"{g[0]}-{g[1].__name__}" for g in GROUPS]
)
def test_an_edit_that_breaks_one_rule_raises_the_error_of_that_rule(error, function, cases, seal):
    found = {str(case)[:80]: outcome(damaged(function, case, seal)) for case in cases}
    assert found == dict.fromkeys(found, error)


def test_every_named_error_has_edits_and_every_error_is_named():
    subclasses = {kind.__name__ for kind in vars(errors).values() if isinstance(kind, type)
                  and issubclass(kind, FormatError) and kind is not FormatError}  # fmt: skip
    assert subclasses == set(schema.ERRORS) == set(EDITS)
    assert all(sum(len(cases) for _, cases, _ in groups) >= 3 for groups in EDITS.values())


def test_an_edit_of_a_file_on_disk_raises_the_same_error_with_its_path(tmp_path):
    for error, function, cases, seal in GROUPS:
        path = tmp_path / "x.bnnf"
        path.write_bytes(damaged(function, cases[-1], seal))
        with pytest.raises(FormatError, match="x.bnnf") as caught:
            read(path)
        assert type(caught.value).__name__ == error


# -- limits that a small file cannot reach by an edit


def one_op(name, side, channels, weights, dtype, window, **fields):
    """A model of one op with its geometry and little else."""
    net = Net(*side, channels)
    random = np.random.default_rng(0)
    source = (
        0 if name == "pixel_conv2d" else net.add("pointwise", 0, writes="bits" if name == "binary_conv2d" else "real")
    )
    rows, columns = Window(*window).output(*side)
    numbers = random.integers(0, 2, weights).astype(DTYPES[dtype])
    fields |= fields_of(*window) | {"input": source, "weights": net.constant(numbers, dtype)}
    if name == "pixel_conv2d":
        bias = [count_classes(s) for s in Window(*window).sides(*side)]
        fields["scale"] = net.constant(np.ones(weights[0], np.float32))
        fields["bias"] = net.constant(random.random((*bias, weights[0]), np.float32))
    net.ops.append(make_op(name, **fields, real=net.activation("f32", (rows, columns, weights[0]))))
    return net


DTYPES = {"bits": bool, "i8": np.int8, "f32": np.float32}
ONE = ((1, 1), (1, 1), (0, 0), (1, 1))


@pytest.mark.parametrize(
    ("allowed", "refused"),
    [
        (("binary_conv2d", (1, 1), 1 << 20, (1, 1, 1, 1 << 20), "bits", ONE),
         ("binary_conv2d", (5, 5), 1 << 20, (1, 5, 5, 1 << 20), "bits", ((5, 5), *ONE[1:]))),
        (("pixel_conv2d", (1, 1), 65793, (1, 1, 1, 65793), "i8", ONE),
         ("pixel_conv2d", (1, 1), 65794, (1, 1, 1, 65794), "i8", ONE)),
        (("conv2d", (700, 700), 1, (1, 512, 512, 1), "i8", ((512, 512), *ONE[1:])),
         ("conv2d", (1100, 1100), 1, (9, 512, 512, 1), "i8", ((512, 512), *ONE[1:]))),
    ],
    ids=["products of signs", "pixel sums", "work"],
)  # fmt: skip
def test_sums_and_work_are_limited(allowed, refused):
    one_op(*allowed).model()
    with pytest.raises(LimitError):
        one_op(*refused).model()


def test_border_positions_are_limited():
    wide = ((1, 3), (1, 1), (0, 1 << 16), (1, 1 << 15))
    with pytest.raises(LimitError, match="border"):
        one_op("pixel_conv2d", (1, 1), 1, (1, 1, 3, 1), "i8", wide)


def test_work_is_limited_over_all_ops_of_a_file_however_small():
    net = Net(1 << 13, 1 << 14, 1)
    value = net.add("pointwise", 0)
    scale = net.constant(np.ones(1, np.float32))
    for _ in range(1 << 12):
        value = net.add("pointwise", value)
        net.ops[-1].fields["scale"] = scale
    with pytest.raises(LimitError, match="products"):
        net.model(value)


# -- what a file may cost


def test_reading_takes_memory_in_proportion_to_the_file_whatever_it_claims(tmp_path):
    for error, function, cases, seal in GROUPS:
        for case in cases[:: max(1, len(cases) // 4)]:
            path = tmp_path / "x.bnnf"
            path.write_bytes(blob := damaged(function, case, seal))
            tracemalloc.start()
            with pytest.raises(FormatError):
                read(path)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 500_000 + 30 * len(blob), f"{error} {function.__name__} {str(case)[:80]}: {peak}"


@pytest.mark.parametrize(("name", "dtype"), [("binary_conv2d", "bits"), ("pixel_conv2d", "i8"), ("conv2d", "i8")])
def test_a_large_kernel_takes_no_memory_for_each_of_its_taps(name, dtype):
    """4,096 taps at 37,249 positions: 1.2 GB if every position's taps were copied."""
    engine = Engine(one_op(name, (256, 256), 1, (1, 64, 64, 1), dtype, ((64, 64), *ONE[1:])).model(), "numpy")
    tracemalloc.start()
    engine.run(np.zeros((1, 256, 256, 1), np.uint8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


def test_large_padding_of_a_small_image_takes_memory_of_a_few_images_only():
    window = ((1, 1), (500, 500), (1000, 1000), (1, 1))
    engine = Engine(one_op("conv2d", (1, 1), 1, (1, 1, 1, 1), "f32", window).model(), "numpy")
    tracemalloc.start()
    engine.run(np.zeros((50, 1, 1, 1), np.uint8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400e6  # one is 16 MB, 50 are 800 MB


@pytest.mark.parametrize("side", [
    (7, 3, 1, 1, 1), (7, 3, 2, 1, 1), (5, 5, 1, 4, 1), (9, 3, 1, 4, 4), (1, 3, 1, 20, 9), (6, 4, 3, 5, 2),
    (2, 7, 1, 3, 1), (8, 1, 3, 2, 1), (50, 9, 2, 30, 3), (3, 2, 1, 7, 5), (1, 1, 1, 0, 1), (64, 7, 2, 3, 1),
    (2, 2, 5, 9, 11),
])  # fmt: skip
def test_border_classes_are_counted_and_numbered_as_the_reference_does(side):
    side = Side(*side, after=side[3] + side[0] % 2)
    index, patterns = border_classes(side)
    assert count_classes(side) == len(patterns)
    numbers, first, behind = border_index(side)
    taps = np.arange(side[1])
    assert np.array_equal(numbers, index)
    assert np.array_equal((first[:, None] <= taps) & (taps < behind[:, None]), patterns)


@pytest.mark.parametrize("name", ["max_pool2d", "avg_pool2d"])
@pytest.mark.parametrize("side", [(3, 3), (3, 9), (1, 3)])
def test_a_pooling_with_ceil_may_be_larger_than_the_image(name, side):
    """Its count of positions is 0 before the one more."""
    net = Net(*side, 3)
    net.add(name, net.real(2), ceil=1, **fields_of((4 if side[0] > 1 else 1, 5), (2, 3)))
    model = net.model()
    pixels = np.random.default_rng(1).integers(0, 256, (2, *side, 3), np.uint8)
    assert np.array_equal(Engine(model, "numpy").run(pixels), Engine(model, "reference").run(pixels))
    with pytest.raises(BnnfreeError, match="smaller than a kernel"):
        net.add(name, 0, ceil=0, **fields_of((4, 5), (2, 3)))


EXTREMES = [  # height, width; kernel, stride, padding, dilation
    ((1, 1), ((3, 3), (1, 1), (20, 19), (9, 9))),
    ((5, 4), ((5, 4), (1, 1), (4, 3), (1, 1))),
    ((5, 4), ((1, 1), (7, 9), (6, 6), (1, 1))),
    ((2, 3), ((2, 4), (3, 2), (30, 30), (17, 11))),
    ((9, 1), ((2, 1), (8, 1), (0, 0), (8, 1000))),
    ((1, 40), ((1, 40), (1, 1), (0, 39), (1, 1))),
]


@pytest.mark.parametrize("pad_value", [0, -1])
@pytest.mark.parametrize(("side", "window"), EXTREMES)
@pytest.mark.parametrize(("name", "dtype"), [("binary_conv2d", "bits"), ("pixel_conv2d", "i8"), ("conv2d", "bits")])
def test_extreme_windows_give_what_the_reference_gives(name, dtype, side, window, pad_value):
    fields = {} if name == "pixel_conv2d" else {"pad_value": pad_value}
    model = one_op(name, side, 3, (5, *window[0], 3), dtype, window, **fields).model()
    pixels = np.random.default_rng(1).integers(0, 256, (2, *side, 3), np.uint8)
    assert np.array_equal(Engine(model, "numpy").run(pixels), Engine(model, "reference").run(pixels))
