"""Settings of the whole process: as asked within, as they were after, whatever happens in between."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from bnnfree.train.process_settings import settings


def state():
    return torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize("deterministic", [True, False])
def test_they_are_set_back_after_an_error_too(deterministic):
    before = state()
    with pytest.raises(KeyError), settings(deterministic):
        assert state() == (deterministic, False)
        raise KeyError
    assert state() == before


PROGRAM = """
import resource, torch
from bnnfree.train.process_settings import settings

def held():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(25_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with settings(True):
    pass  # imports what it needs
outside, start = faults(), held()
with settings(True):
    faults()
    inside, kept = faults(), held()
print(outside, inside, kept - start, held() - start)
"""


@pytest.mark.thorough
@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs the allocator of glibc"
)
def test_large_blocks_are_kept_within_and_given_back_after():
    """100 MB, written again and again: without page faults where they are kept, and no longer held after."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    outside, inside, kept, after = map(int, done.stdout.split())
    assert inside < 0.2 * outside
    assert kept > 90e6 and after < 30e6
