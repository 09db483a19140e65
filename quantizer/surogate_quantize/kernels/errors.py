"""Errors of a piece, summed in integers: the same on every machine, thread count and vector width.

Differences and values are counted in units of the tensor's largest magnitude / 2^21 (rounded to a power of two). A unit
is far below the error of any format, the squares of a piece of 2^20 values fit 63 bits, and integer sums don't depend
on their order, so loops may vectorize as they like.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from surogate_quantize.kernels.compiling import inner

_MAGNITUDE = np.uint32(0x7FFFFFFF)


@inner
def squared_sum(x: NDArray[np.float32], unit: np.float32) -> np.int64:
    """Sum of x^2 in squared units; `unit` is how many there are in 1."""
    total = np.int64(0)
    for i in range(x.size):
        k = np.int32(np.rint(x[i] * unit))
        total += np.int64(k) * np.int64(k)
    return total


@inner
def largest_magnitude_bits(x: NDArray[np.float32]) -> np.uint32:
    """The float32 bits of the largest |x|: magnitudes order as their bits do."""
    largest = np.uint32(0)
    for i in range(x.size):
        largest = np.uint32(max(largest, np.uint32(np.float32(x[i]).view(np.uint32) & _MAGNITUDE)))
    return largest
