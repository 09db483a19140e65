"""Errors of a piece, summed in integers: the same on every machine, thread count and vector width.

Differences and values are counted in units of the tensor's largest magnitude / 2^21. A unit is far below the error of any format, the
squares of a piece of 2^20 values fit 63 bits, and integer sums don't depend on their order, so loops may vectorize as they like.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

UNITS = np.float32(2.0**21)
"""Units in the largest magnitude of a tensor."""

LARGEST_PIECE = 2**20
"""Values that a piece may have so that its sums can't overflow."""

_MAGNITUDE = np.uint32(0x7FFFFFFF)


@njit(nogil=True, cache=True, error_model="numpy")
def squared_error(values: NDArray[np.float32], x: NDArray[np.float32], unit: np.float32) -> np.int64:
    """Sum of (value - x)^2 in squared units; `unit` is how many there are in 1."""
    total = np.int64(0)
    for i in range(x.size):
        k = np.int32(np.rint((values[i] - x[i]) * unit))
        total += np.int64(k) * np.int64(k)
    return total


@njit(nogil=True, cache=True, error_model="numpy")
def squared_sum(x: NDArray[np.float32], unit: np.float32) -> np.int64:
    """Sum of x^2 in squared units."""
    total = np.int64(0)
    for i in range(x.size):
        k = np.int32(np.rint(x[i] * unit))
        total += np.int64(k) * np.int64(k)
    return total


@njit(nogil=True, cache=True, error_model="numpy")
def largest_error_bits(values: NDArray[np.float32], x: NDArray[np.float32], scratch: NDArray[np.float32]) -> np.uint32:
    """The float32 bits of the largest |value - x|."""
    bits = scratch.view(np.uint32)
    largest = np.uint32(0)
    for i in range(x.size):
        scratch[i] = values[i] - x[i]
    for i in range(x.size):
        largest = max(largest, bits[i] & _MAGNITUDE)
    return largest
