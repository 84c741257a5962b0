"""Every test process and its children compute with one thread: the suite runs one process per core."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
