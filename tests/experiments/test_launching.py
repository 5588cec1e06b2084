"""What every program does around its work, where it takes a process of its own to see it."""

import ctypes
import os
import pathlib
import subprocess
import sys

import pytest

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"
# Touches each page of a large array, twice: what is freed is there again.
PROGRAM = """
import resource
import launching
import numpy as np

def touch():
    np.empty(2**28, np.uint8)[::4096] = 1

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def main():
    touch()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    touch()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    kept = resident()
    launching.return_memory()
    print(kept - resident())

launching.launch(main)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_memory_is_not_mapped_anew_until_it_is_returned():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": str(EXPERIMENTS), "NUMPY_MADVISE_HUGEPAGE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    faults, returned = map(int, done.stdout.split())
    # 65,536 pages of 4 KiB; fewer, where pages are larger, but never this few.
    assert faults < 64
    assert returned > 2**27
