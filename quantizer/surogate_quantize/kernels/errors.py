"""Errors of a piece, the same on every machine, thread count and vector width.

Squares are summed in lanes: a lane takes the values at one place of every chunk, in their order, so that the order of
additions is fixed while a loop over the lanes vectorizes. Differences and values are multiplied by a power of two
first, which brings the largest magnitude of the tensor to about 2^21: no square overflows, and only what is far below
any format's error underflows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from surogate_quantize.kernels.compiling import inner

_ZERO, _MAGNITUDE = np.float32(0), np.uint32(0x7FFFFFFF)


@inner
def add_errors(
    miss: NDArray[np.float32],
    x: NDArray[np.float32],
    unit: np.float32,
    error: NDArray[np.float32],
    square: NDArray[np.float32],
) -> np.uint32:
    """Adds the squares of `miss` and `x`, in units, to the lanes; `unit` is how many units there are in 1.

    Returns:
        The float32 bits of the largest |miss|: magnitudes order as their bits do.
    """
    largest = np.uint32(0)
    for i in range(x.size):
        missed, value = miss[i] * unit, x[i] * unit
        error[i] = error[i] + missed * missed
        square[i] = square[i] + value * value
        largest = np.uint32(max(largest, np.uint32(np.float32(miss[i]).view(np.uint32) & _MAGNITUDE)))
    return largest


@inner
def clear(values: NDArray[np.float32]) -> None:
    """Fills lanes with zeros."""
    for i in range(values.size):
        values[i] = _ZERO


@inner
def total(values: NDArray[np.float32]) -> np.float64:
    """The sum of lanes."""
    result = np.float64(0)
    for i in range(values.size):
        result += np.float64(values[i])
    return result
