"""Every test process and its children compute with one thread: the suite runs one process per core.

Where pytest-xdist is missing, it runs in one process alone; -n chooses otherwise."""

import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Before xdist's own: files shared among as many processes as there are cores."""
    if getattr(config.option, "numprocesses", 0) is None and not config.option.usepdb:
        config.option.numprocesses = config.hook.pytest_xdist_auto_num_workers(config=config)
        config.option.dist = "loadfile"
