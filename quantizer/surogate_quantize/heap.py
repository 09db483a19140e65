"""What the C library does with memory that is free again."""

from __future__ import annotations

import ctypes
import sys

_M_MMAP_THRESHOLD = -3
_LARGE = 1 << 20


def return_large_blocks() -> None:
    """Has glibc give blocks from 1 MiB on back to the system as soon as they are free; for a process of our own.

    By itself it raises that bound to the largest block freed so far, 32 MiB at most, and keeps what is smaller in heaps
    with holes: peak memory then grows by a tenth with the number of tensors.
    """
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none, and no such heaps
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _LARGE)
