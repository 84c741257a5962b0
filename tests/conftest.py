"""Every test process and its children compute with one thread: the suite runs one process per core.

And the cases of the C program native/suite.c, which two files of tests run.
"""

import importlib.util
import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

# Files of half a minute and more, longest first: one that begins last leaves the other cores idle.
LONG = "throughput readme dist probe fused kill build train signals suite_c rescale resume".split()


def pytest_addoption(parser):
    """Without pytest-xdist setup.cfg's options for it mean nothing, and the tests run one after the other."""
    if importlib.util.find_spec("xdist") is None:
        for option in ("--numprocesses", "--dist"):
            parser.addoption(option)
        parser.addoption("--no-loadscope-reorder", action="store_true")


def pytest_collection_modifyitems(items):
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
