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
def in_units(x: np.float32, unit: np.float32) -> np.int32:
    """The nearest number of units; `unit` is how many there are in 1."""
    return np.int32(np.rint(x * unit))


@inner
def magnitude_bits(x: np.float32) -> np.uint32:
    """The float32 bits of |x|: magnitudes order as their bits do."""
    return np.uint32(np.float32(x).view(np.uint32) & _MAGNITUDE)


@inner
def count_units(x: NDArray[np.float32], unit: np.float32, units: NDArray[np.int32]) -> None:
    """Writes each value in units."""
    for i in range(x.size):
        units[i] = in_units(x[i], unit)


@inner
def sum_of_squares(units: NDArray[np.int32]) -> np.int64:
    """Apart from the loops that count, which would do half the work at a time beside 64-bit sums."""
    total = np.int64(0)
    for i in range(units.size):
        total += np.int64(units[i]) * np.int64(units[i])
    return total
