import subprocess
import sys

import pytest

from surogate_quantize import heap

SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from surogate_quantize.heap import return_large_blocks

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

if sys.argv[1] == "set":
    return_large_blocks()
large = np.ones(30 << 20, np.uint8)
del large  # from here on glibc takes smaller blocks from its heap
before = resident()
blocks = [np.ones(8 << 20, np.uint8) for _ in range(20)]
del blocks[:-1]  # the last one lies above the others
print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_freed_blocks_go_back_although_a_later_one_is_in_use():
    kept = {
        way: int(subprocess.run([sys.executable, "-c", SCRIPT, way], capture_output=True, text=True, check=True).stdout)
        for way in ("unset", "set")
    }
    assert kept["set"] < 20 << 20, kept
    assert kept["unset"] > 100 << 20, "what this mends is gone: heap.py can go, too"


def test_a_libc_without_mallopt(monkeypatch):
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: object())
    heap.return_large_blocks()
