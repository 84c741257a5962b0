"""Damaged files by the thousand: each is refused by a named error, or runs within bounds.

On one core of a 2-core x86-64 virtual machine, one image a file: 2,000 cases in 3 s; the 100,000 of
`python -m pytest -m slow tests/test_fuzz.py -n 1` in 93 s, about 10,000 of which run.
"""

import signal
import sys
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
from damage import File, bases, sealed

from bnnfree.engine import Engine
from bnnfree.format import FormatError, check_model, from_bytes
from bnnfree.format.schema import HEADER_TYPE, OP_TYPE, TENSOR_TYPE

SECONDS = 5  # for one file
MEMORY = 2 << 30  # bytes that this process may grow by
WORDS = [
    0,
    1,
    2,
    3,
    63,
    64,
    65,
    255,
    1 << 16,
    1 << 18,
    1 << 20,
    1 << 24,
    1 << 30,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
]


@contextmanager
def bounds():
    """A time limit per file by `signal`, a limit of the address space; where the system has them."""
    if sys.platform != "linux":
        yield
        return
    import resource

    def late(*_):
        raise TimeoutError(f"more than {SECONDS} s")

    pages = int(open("/proc/self/statm").read().split()[0])
    before, old = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        resource.setrlimit(resource.RLIMIT_AS, before)


# -- ways to damage: (random, file) -> file


def flip_bits(random, blob):
    for _ in range(random.integers(1, 9)):
        blob[random.integers(len(blob))] ^= 1 << random.integers(8)
    return blob


def flip_bits_of_tables(random, blob):
    """In the first half of the file: header, tables, texts."""
    for _ in range(random.integers(1, 4)):
        blob[random.integers(len(blob) // 2)] ^= 1 << random.integers(8)
    return blob


def truncate(random, blob):
    return blob[: random.integers(len(blob))]


def append(random, blob):
    return blob + random.bytes(int(random.choice([1, 63, 64, 500])))


def random_bytes(random, blob):
    at, size = random.integers(len(blob)), random.integers(1, 65)
    blob[at : at + size] = random.bytes(len(blob[at : at + size]))
    return blob


def splice(random, blob):
    """The start of another valid file, or one of its sections in the place of this file's."""
    other = bases()[random.integers(len(bases()))]
    if random.random() < 0.3:
        size = int(random.choice([16, 32, 64, 128, random.integers(1, min(len(blob), len(other)))]))
        return bytearray(other[:size]) + blob[size:]
    section = random.integers(6)
    theirs = File(other).sections[section]
    ours = File(bytes(blob)).sections[section]
    return blob[: ours.start] + other[theirs] + blob[ours.stop :]


def write_words(random, blob):
    """Telling values, neighbours and values from elsewhere over fields of the header and of records."""
    counts = np.frombuffer(bytes(blob[32:40]), "<u4").tolist()
    tables = [(0, HEADER_TYPE, 1), (128, TENSOR_TYPE, counts[0])]
    tables += [(-(-(128 + counts[0] * TENSOR_TYPE.itemsize) // 64) * 64, OP_TYPE, counts[1])]
    for _ in range(random.choice([1, 1, 1, 2, 4])):
        start, record, count = tables[random.choice([0, 1, 1, 2, 2, 2])]
        name = str(random.choice(record.names))
        at = start + int(random.integers(count)) * record.itemsize + record.fields[name][1]
        size = min(4, record[name].itemsize)
        at += 4 * int(random.integers(max(1, record[name].itemsize // 4)))
        old = int.from_bytes(blob[at : at + size], "little")
        near = [old - 1, old + 1, 2 * old, old // 2, old ^ 1, -old]
        value = int(random.choice([*WORDS, *near, *range(8), int(random.integers(1 << 32))]))
        blob[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    return blob


def swap_records(random, blob):
    file = File(bytes(blob))
    table = file.tensors if random.random() < 0.5 else file.ops
    a, b = random.integers(len(table), size=2)
    name = random.choice([None, *table.dtype.names])
    part = table if name is None else table[name]
    part[[a, b]] = part[[b, a]]
    return file.blob


def reshape(random, blob):
    """Another size of a tensor, and the bytes to go with it."""
    file = File(bytes(blob))
    index = random.integers(len(file.tensors))
    shape = file.tensors["shape"][index, : file.tensors["rank"][index]].tolist()
    axis = random.integers(len(shape))
    shape[axis] = int(random.choice([1, 2, shape[axis] + 1, 2 * shape[axis], 1 << 12, 1 << 20]))
    if np.prod(shape, dtype=float) < 2**60:
        file.reshape(index, *shape)
    return file.blob


KINDS = [flip_bits, flip_bits_of_tables, truncate, append, random_bytes, splice, write_words, write_words, write_words,
         swap_records, reshape]  # fmt: skip


def damage(seed: int) -> bytes:
    """The file of a seed: one of the valid files, damaged in one way or two; every second one sealed again."""
    random = np.random.default_rng(seed)
    blob = bytearray(bases()[random.integers(len(bases()))])
    blob = KINDS[random.integers(len(KINDS))](random, blob)
    if random.random() < 0.2 and len(blob) > 128:
        blob = KINDS[random.integers(2)](random, blob)  # these two need no valid file
    return sealed(blob) if seed % 2 else bytes(blob)


def attempt(blob: bytes) -> str:
    """Name of the error that refuses the file, or "ran"."""
    try:
        model = from_bytes(blob)
        check_model(model)
    except FormatError as error:
        assert len(str(error)) < 2000
        return type(error).__name__
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (1, *model.image_shape), np.uint8)
    result = Engine(model, "numpy").run(images)
    assert result.dtype == np.float32 and result.size == np.prod(model.tensors[model.output].shape)
    return "ran"


def fuzz(seeds) -> Counter:
    outcomes: Counter = Counter()
    with bounds():
        for seed in seeds:
            blob = damage(seed)
            if sys.platform == "linux":
                signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                outcomes[attempt(blob)] += 1
            except Exception as error:
                pytest.fail(f"seed {seed}: {type(error).__name__}: {error}")
            finally:
                if sys.platform == "linux":
                    signal.setitimer(signal.ITIMER_REAL, 0)
    return outcomes


def test_two_thousand_damaged_files_are_refused_by_name_or_run():
    outcomes = fuzz(range(2000))
    assert outcomes["ran"] > 50 and len(outcomes) == 13, outcomes  # every error, and a run


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_a_hundred_thousand_damaged_files_are_refused_by_name_or_run(part):
    outcomes = fuzz(range(10_000 * part, 10_000 * (part + 1)))
    assert outcomes["ran"] > 500, outcomes
