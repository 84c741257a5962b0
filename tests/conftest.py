"""Every test process and its children compute with one thread: the suite runs one process per core.

And the cases of the C program native/suite.c, which two files of tests run.
"""

import importlib.util
import os
import zlib

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

# Files of long tests first: one that begins last leaves the other cores idle.
LONG = "throughput dist probe fused export train kill build readme signals suite_c native resume".split()


def pytest_addoption(parser):
    """Without pytest-xdist setup.cfg's options for it mean nothing, and the tests run one after the other."""
    if importlib.util.find_spec("xdist") is None:
        for option in ("--numprocesses", "--dist"):
            parser.addoption(option)
        parser.addoption("--no-loadscope-reorder", action="store_true")


@pytest.hookimpl(tryfirst=True)  # before cases are chosen by their marks
def pytest_collection_modifyitems(items):
    begun = set()
    for item in items:
        sample = item.get_closest_marker("sample")
        if sample and item.function in begun and zlib.crc32(item.nodeid.encode()) % sample.args[0]:
            item.add_marker("thorough")
        begun.add(item.function)
    rank = {f"test_{name}": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session")
def goldens(tmp_path_factory):
    """Cases that run."""
    from cases import write_goldens  # here: torch, which reads the variables above, is imported by it

    return write_goldens(tmp_path_factory.mktemp("goldens"), randoms=18, wides=2)


@pytest.fixture(scope="session")
def hostile(tmp_path_factory):
    """Cases to refuse, and damaged ones."""
    from cases import write_hostile

    return write_hostile(tmp_path_factory.mktemp("hostile"), damages=300)
