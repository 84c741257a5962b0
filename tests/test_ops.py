"""Meaning of each operation, against loops over single values; float results equal to the bit."""

import itertools

import numpy as np
import pytest
from packed import GEOMETRIES

from bnnfree import ops
from bnnfree.errors import BnnfreeError
from bnnfree.ops.real import border_classes

F32 = np.float32
SEED = 7767


def window_of(geometry):
    height, width, *rest = geometry
    return height, width, ops.Window(*rest)


def positions(window, height, width):
    """(r, q, [(i, j, row, column, inside)]) of every output position, from the definition."""
    rows, columns = window.output(height, width)
    for r, q in itertools.product(range(rows), range(columns)):
        taps = []
        for i, j in itertools.product(range(window.size[0]), range(window.size[1])):
            row = r * window.stride[0] - window.padding[0] + i * window.dilation[0]
            column = q * window.stride[1] - window.padding[1] + j * window.dilation[1]
            taps.append((i, j, row, column, 0 <= row < height and 0 <= column < width))
        yield r, q, taps


def bits_equal(a, b):
    assert a.dtype == b.dtype == F32 and a.shape == b.shape
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


def test_a_sign_bit_is_set_for_negatives_only_and_never_for_a_zero():
    x = np.array([1.5, 0.0, -0.0, -1e-45, 1e-45, -np.inf, np.inf, np.nan], F32)
    assert ops.sign_bits(x).tolist() == [False, False, False, True, False, True, False, True]
    np.testing.assert_array_equal(ops.signs(ops.sign_bits(x)), [1, 1, 1, -1, 1, -1, 1, -1])


def test_a_threshold_is_the_sign_of_the_shifted_value_to_the_bit():
    random = np.random.default_rng(SEED)
    exponents = random.integers(-140, 120, (500, 9))
    x = (random.choice([-1.0, 1.0], (500, 9)) * 2.0**exponents * random.integers(1, 9, (500, 9))).astype(F32)
    b = -x[random.permutation(500)[0]]  # some sums are exactly 0
    np.testing.assert_array_equal(ops.sign_bits(x + b), ops.threshold_bits(x, -b))


@pytest.mark.parametrize("channels", [1, 3, 31, 32, 33, 63, 64, 65, 130])
def test_packing_round_trips_and_places_channel_c_at_bit_c_mod_64(channels):
    bits = np.random.default_rng(SEED).random((3, 2, channels)) < 0.5
    words = ops.pack_bits(bits)
    assert words.dtype == np.uint64 and words.shape == (3, 2, -(-channels // 64))
    np.testing.assert_array_equal(ops.unpack_bits(words, channels), bits)
    for c in range(channels):
        assert bool(int(words[1, 1, c // 64]) >> (c % 64) & 1) == bits[1, 1, c]
    assert int(words[0, 0, -1]) >> ((channels - 1) % 64 + 1) == 0  # above the last channel: nothing


def test_unpacking_refuses_a_wrong_channel_count():
    with pytest.raises(BnnfreeError, match="2 words for 64"):
        ops.unpack_bits(np.zeros((1, 2), np.uint64), 64)


@pytest.mark.parametrize("channels", [1, 33, 65])
def test_binary_linear_is_the_sum_of_products_of_signs(channels):
    random = np.random.default_rng(SEED)
    a, w = random.random((4, channels)) < 0.5, random.random((5, channels)) < 0.5
    got = ops.binary_linear(ops.pack_bits(a), ops.pack_bits(w), channels)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, ops.signs(a) @ ops.signs(w).T)


@pytest.mark.parametrize("pad_value", [0, 1, -1])
@pytest.mark.parametrize(
    "channels,outputs,groups", [(1, 2, 1), (3, 1, 1), (31, 3, 1), (65, 2, 1), (66, 4, 2), (6, 6, 3)]
)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_binary_conv2d_is_the_sum_over_taps_and_channels(geometry, channels, outputs, groups, pad_value):
    height, width, window = window_of(geometry)
    random = np.random.default_rng(SEED)
    size = channels // groups
    a = random.random((2, height, width, channels)) < 0.5
    w = random.random((outputs, *window.size, size)) < 0.5
    got = ops.binary_conv2d(ops.pack_bits(a), ops.pack_bits(w), channels, window, groups=groups, pad_value=pad_value)
    sa, sw = ops.signs(a), ops.signs(w)
    for r, q, taps in positions(window, height, width):
        for o in range(outputs):
            group = slice(o // (outputs // groups) * size, (o // (outputs // groups) + 1) * size)
            expected = np.zeros(2, np.int64)
            for i, j, row, column, inside in taps:
                values = sa[:, row, column, group] if inside else np.full((2, size), pad_value)
                expected += (values * sw[o, i, j]).sum(1)
            np.testing.assert_array_equal(got[:, r, q, o], expected)


def chain(terms):
    """Sum in order from +0, each step rounded to float32."""
    total = F32(0)
    for term in terms:
        total = F32(total + term)
    return total


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_conv2d_sums_rows_then_columns_then_channels_rounding_each_step(geometry, groups):
    height, width, window = window_of(geometry)
    random = np.random.default_rng(SEED)
    x = (random.standard_normal((1, height, width, 3)) * 10.0 ** random.integers(-4, 5, 3)).astype(F32)
    w = random.standard_normal((6, *window.size, 3 // groups)).astype(F32)
    bias = random.standard_normal(6).astype(F32)
    got = ops.conv2d(x, w, bias, window, groups=groups)
    expected = np.empty_like(got)
    for r, q, taps in positions(window, height, width):
        for o in range(6):
            first = o // (6 // groups) * (3 // groups)
            terms = [
                F32(x[0, row, column, first + c] * w[o, i, j, c])
                for i, j, row, column, inside in taps
                if inside
                for c in range(3 // groups)
            ]
            expected[0, r, q, o] = F32(chain(terms) + bias[o])
    bits_equal(got, expected)


@pytest.mark.parametrize("dtype", [F32, np.int8])
def test_linear_sums_inputs_in_order_then_scales_then_adds_the_bias(dtype):
    random = np.random.default_rng(SEED)
    x = (random.standard_normal((3, 17)) * 10.0 ** random.integers(-4, 5, 17)).astype(F32)
    w = (random.standard_normal((5, 17)) * 50).astype(dtype)
    scale, bias = random.random((2, 5)).astype(F32)
    got = ops.linear(x, w, bias, scale)
    expected = [
        [F32(F32(chain(F32(v * F32(u)) for v, u in zip(row, weights, strict=True)) * s) + b)
         for weights, s, b in zip(w, scale, bias, strict=True)]
        for row in x
    ]  # fmt: skip
    bits_equal(got, np.array(expected, F32))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_border_classes_say_which_taps_are_inside(geometry):
    height, _, window = window_of(geometry)
    index, patterns = border_classes(window.sides(height, height)[0])
    assert sorted(set(index.tolist())) == list(range(len(patterns)))
    for r, _, taps in positions(window, height, 1 + 2 * window.dilation[1] * window.size[1]):
        inside = [0 <= row < height for i, j, row, _, _ in taps if j == 0]
        assert patterns[index[r]].tolist() == inside


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_pixel_conv2d_equals_a_convolution_of_normalised_pixels_padded_with_zero(geometry):
    """In float64: pixel - 255 mean, weights q s, zeros around; the bias table made as documented."""
    height, width, window = window_of(geometry)
    random = np.random.default_rng(SEED)
    pixels = random.integers(0, 256, (2, height, width, 3), np.uint8)
    mean = random.random(3)
    q = random.integers(-127, 128, (4, *window.size, 3), np.int8)
    scale, bias = random.random(4) / 100, random.standard_normal(4)
    (_, rows), (_, columns) = map(border_classes, window.sides(height, width))
    table = np.empty((len(rows), len(columns), 4))
    for (a, row), (b, column) in itertools.product(enumerate(rows), enumerate(columns)):
        inside = np.outer(row, column)[..., None] * 255 * mean
        table[a, b] = bias - scale * (q * inside).sum((1, 2, 3))
    got = ops.pixel_conv2d(pixels, q, scale.astype(F32), table.astype(F32), window)
    x = window.pad((pixels - 255 * mean), 0)
    expected = np.zeros((*got.shape,))
    for i, j, values in window.taps(x, height, width):
        expected += values @ (q[:, i, j] * scale[:, None]).T
    np.testing.assert_allclose(got, expected + bias, rtol=1e-4, atol=2e-3)
    assert got.dtype == F32


def test_pixel_conv2d_is_exact_at_the_largest_accumulator_and_refuses_more():
    window = ops.Window((1, 1))
    most = 2**31 // (255 * 128) - 1
    pixels, w = np.full((1, 1, 1, most), 255, np.uint8), np.full((1, 1, 1, most), -127, np.int8)
    one, none = np.ones(1, F32), np.zeros((1, 1, 1), F32)
    assert ops.pixel_conv2d(pixels, w, one, none, window)[0, 0, 0, 0] == F32(-255 * 127 * most)
    with pytest.raises(BnnfreeError, match="int32"):
        ops.pixel_conv2d(np.repeat(pixels, 2, 3), np.repeat(w, 2, 3), one, none, window)


@pytest.mark.parametrize("parts", list(itertools.product([False, True], repeat=6)))
def test_epilogue_rounds_after_every_step_in_the_stated_order(parts):
    random = np.random.default_rng(SEED)
    acc = random.integers(-(2**26), 2**26, (2, 3, 6), np.int32)
    scale, bias, slope = random.standard_normal((3, 6)).astype(F32)
    low, high = np.sort(random.standard_normal((2, 6)).astype(F32) * 2e7, axis=0)
    other = random.standard_normal((2, 3, 2)).astype(F32)  # its 2 channels repeat three times
    given = [v if there else None for v, there in zip((scale, bias, other, slope, low, high), parts, strict=True)]
    got = ops.epilogue(acc, *given)
    expected = np.empty_like(got)
    for at in np.ndindex(acc.shape):
        c, v = at[-1], F32(acc[at])
        v = F32(v * scale[c]) if parts[0] else v
        v = F32(v + bias[c]) if parts[1] else v
        v = F32(v + other[(*at[:-1], c % 2)]) if parts[2] else v
        v = F32(v * slope[c]) if parts[3] and not v >= 0 else v
        v = low[c] if parts[4] and not v > low[c] else v
        expected[at] = high[c] if parts[5] and not v < high[c] else v
    bits_equal(got, expected)


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("geometry", [(5, 7, (2, 2), (2, 2)), (7, 5, (3, 3), (2, 2), (1, 1)), (4, 6, (3, 2), (3, 3)),
                                      (1, 1, (2, 2), (2, 2), (1, 1)), (6, 6, (3, 3), (1, 1))])  # fmt: skip
def test_pooling_is_torchs(geometry, ceil_mode):
    torch = pytest.importorskip("torch")
    height, width, window = window_of(geometry)
    x = np.random.default_rng(SEED).standard_normal((2, height, width, 3)).astype(F32)
    options = dict(stride=window.stride, padding=window.padding, ceil_mode=ceil_mode)
    t = torch.from_numpy(x).permute(0, 3, 1, 2)
    if ceil_mode is False and min(n + 2 * p - k for n, p, k in zip((height, width), window.padding, window.size)) < 0:  # noqa: B905
        with pytest.raises(BnnfreeError):
            ops.max_pool2d(x, window)
        return
    largest = torch.nn.functional.max_pool2d(t, window.size, **options).permute(0, 2, 3, 1).numpy()
    bits_equal(ops.max_pool2d(x, window, ceil_mode=ceil_mode), np.ascontiguousarray(largest))
    mean = torch.nn.functional.avg_pool2d(t.double(), window.size, count_include_pad=False, **options)
    got = ops.avg_pool2d(x, window, ceil_mode=ceil_mode)
    np.testing.assert_allclose(got, mean.permute(0, 2, 3, 1).numpy(), rtol=1e-5, atol=1e-6)


def test_global_average_sums_positions_row_by_row():
    x = (np.random.default_rng(SEED).standard_normal((2, 5, 3, 4)) * 1e3).astype(F32)
    expected = [[F32(chain(image[..., c].ravel()) / F32(15)) for c in range(4)] for image in x]
    bits_equal(ops.global_avg_pool(x), np.array(expected, F32))


def norm_of(image, eps, centred):
    """From the definition in FORMAT.md, value by value. Shapes: [H, W, C], [groups] -> [H, W, C]."""
    height, width, channels = image.shape
    size, made = channels // len(eps), np.empty_like(image)

    def mean(value):  # of the values value(row, column, channel) of the group
        of_channels = [
            chain(chain(value(r, q, c) for q in range(width)) for r in range(height))
            for c in range(first, first + size)
        ]
        return F32(chain(of_channels) / F32(height * width * size))

    for group, added in enumerate(eps):
        first = group * size
        m = mean(lambda r, q, c: image[r, q, c]) if centred else F32(0)
        d = image - m
        factor = F32(F32(1) / np.sqrt(F32(mean(lambda r, q, c, d=d: F32(d[r, q, c] * d[r, q, c])) + added)))
        made[..., first : first + size] = d[..., first : first + size] * factor
    return made


SPECIAL = np.array([0, -0.0, 1e-45, -3e-39, 1.1e-38, 3e38, -3e38, 1e20, np.inf, -np.inf, np.nan], F32)


@pytest.mark.parametrize("values", ["tame", "offset", "wild", "special"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (1, 1, 6, 6), (1, 1, 6, 2), (3, 1, 4, 1), (1, 5, 9, 3), (4, 3, 5, 5), (5, 7, 4, 2)]
)
def test_norms_sum_columns_then_rows_then_channels_rounding_each_step(shape, values):
    *sizes, groups = shape
    random = np.random.default_rng(SEED)
    x = random.standard_normal((3, *sizes)).astype(F32)
    x[1] = x[1, :1, :1]  # constant channels
    if values == "offset":
        x += F32(1000)
    if values in ("wild", "special"):
        some = SPECIAL[:8] if values == "wild" else SPECIAL
        x = np.where(random.random(x.shape) < 0.3, random.choice(some, x.shape), x)
    eps = np.resize(np.array([1e-5, 0, 1e-45, 3e38, -1e-3], F32), groups)
    with np.errstate(all="ignore"):
        for norm, centred in ((ops.group_norm, True), (ops.rms_norm, False)):
            got, expected = norm(x, eps), np.stack([norm_of(image, eps, centred) for image in x])
            assert got.dtype == F32
            for array in (got, expected):
                array[np.isnan(array)] = np.nan
            bits_equal(got, expected)


@pytest.mark.parametrize("groups", [1, 3, 12])
def test_norms_are_torchs(groups):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(SEED).standard_normal((2, 7, 5, 12)).astype(F32) * 3 + F32(2)
    t = torch.from_numpy(x).permute(0, 3, 1, 2).double()
    expected = torch.nn.functional.group_norm(t, groups, eps=1e-3).permute(0, 2, 3, 1)
    np.testing.assert_allclose(ops.group_norm(x, np.full(groups, 1e-3, F32)), expected, rtol=1e-5, atol=1e-6)
    root = (t.reshape(2, groups, -1).square().mean(2) + 1e-3).sqrt().repeat_interleave(12 // groups, 1)
    expected = (t / root[..., None, None]).permute(0, 2, 3, 1)
    np.testing.assert_allclose(ops.rms_norm(x, np.full(groups, 1e-3, F32)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", [ops.group_norm, ops.rms_norm])
def test_norms_of_an_image_depend_on_no_other_and_of_one_value_are_what_they_must_be(norm):
    x = np.random.default_rng(SEED).standard_normal((5, 3, 4, 6)).astype(F32)
    eps = np.full(3, 1e-5, F32)
    order = [3, 0, 4, 1, 2]
    bits_equal(norm(x[order], eps), norm(x, eps)[order])
    bits_equal(norm(x[2:3], eps), norm(x, eps)[2:3])
    one = norm(np.array([2.0, -0.5, 0.0], F32).reshape(1, 1, 1, 3), np.zeros(3, F32) + F32(1e-12))
    expected = [0, 0, 0] if norm is ops.group_norm else [1, -1, 0]
    np.testing.assert_allclose(one.ravel(), expected, rtol=1e-6)


def test_simple_activations_at_their_corners():
    x = np.array([-2.0, -0.5, -0.0, 0.0, 0.5, 2.0], F32)[:, None]
    tau = np.array([0.25], F32)
    assert ops.relu(x).ravel().tolist() == [0, 0, 0, 0, 0.5, 2]
    assert ops.hardtanh(x).ravel().tolist() == [-1, -0.5, 0, 0, 0.5, 1]
    assert ops.tlu(x, tau).ravel().tolist() == [0.25] * 4 + [0.5, 2]
    assert ops.prelu(x, tau).ravel().tolist() == [-0.5, -0.125, 0, 0, 0.5, 2]
    assert not np.signbit(ops.relu(x)).any()
    assert ops.add(x, x).ravel().tolist() == (2 * x).ravel().tolist()
    assert ops.concat([x, x + 1]).shape == (6, 2)


def test_exp_is_within_two_ulp_and_softmax_sums_to_one():
    x = np.concatenate([np.linspace(-87, 88, 200001), [0.0, -0.0]]).astype(F32)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(ops.exp(x) - exact) / np.spacing(exact.astype(F32))).max() <= 2
    assert ops.exp(np.zeros(1, F32))[0] == 1
    z = np.random.default_rng(SEED).standard_normal((5, 1000)).astype(F32) * 30
    p = ops.softmax(z)
    np.testing.assert_allclose(p.sum(1, dtype=np.float64), 1, rtol=1e-5)
    np.testing.assert_array_equal(p.argmax(1), z.argmax(1))


WORDS, ONE, TWO = np.zeros((1, 1, 1, 1), np.uint64), np.zeros((1, 1, 1, 3), F32), np.zeros((2, 1, 1, 1), F32)


@pytest.mark.parametrize(
    "bad",
    [
        lambda: ops.Window((0, 1)),
        lambda: ops.Window((3, 3), stride=(0, 1)),
        lambda: ops.Window((3, 3)).output(2, 5),
        lambda: ops.relu(np.zeros(3)),
        lambda: ops.binary_conv2d(WORDS, WORDS, 1, ops.Window((1, 1)), pad_value=2),
        lambda: ops.binary_conv2d(WORDS, WORDS, 3, ops.Window((1, 1)), groups=2),
        lambda: ops.conv2d(ONE, TWO, None, ops.Window((1, 1))),
        lambda: ops.group_norm(ONE, np.ones(2, F32)),
        lambda: ops.rms_norm(ONE, np.ones(0, F32)),
        lambda: ops.rms_norm(ONE.astype(np.float64), np.ones(1, F32)),
    ],
)
def test_what_has_no_meaning_is_refused(bad):
    with pytest.raises(BnnfreeError):
        bad()
