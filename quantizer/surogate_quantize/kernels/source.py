"""Reading source values: exact widening to float32, and the largest magnitude."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

RAW_DTYPES: dict[str, Any] = {"F32": np.uint32, "BF16": np.uint16, "F16": np.uint16}
"""The unsigned integers that hold the bits of each source dtype."""

KINDS = {"F32": 0, "BF16": 1, "F16": 2}
"""How `widen` reads the bits of each source dtype."""

INFINITY_BITS = {"F32": 0x7F800000, "BF16": 0x7F80, "F16": 0x7C00}
"""Magnitude bits from here on are an infinity or a NaN."""

_F16_REBIAS = np.float32(2.0**112)


@njit(nogil=True, cache=True, error_model="numpy")
def widen(raw: NDArray[Any], kind: int, out: NDArray[np.float32]) -> None:
    """Writes the values of `raw` to the first places of float32 `out`, exactly.

    A half's exponent is 112 below that of a float32 with the same bits; the multiplication also normalizes subnormals.
    """
    bits = out.view(np.uint32)
    if kind == 1:
        for i in range(raw.size):
            bits[i] = np.uint32(raw[i]) << np.uint32(16)
    elif kind == 0:
        for i in range(raw.size):
            bits[i] = np.uint32(raw[i])
    else:
        for i in range(raw.size):
            half = np.uint32(raw[i])
            bits[i] = ((half & np.uint32(0x7FFF)) << np.uint32(13)) | ((half & np.uint32(0x8000)) << np.uint32(16))
            out[i] = out[i] * _F16_REBIAS


@njit(nogil=True, cache=True, error_model="numpy")
def largest_bits(raw: NDArray[Any], mask: Any) -> Any:
    """The largest magnitude bits (value & mask) in a flat `raw`: magnitudes order as their bits do."""
    largest = raw[0] & mask
    for i in range(raw.size):
        largest = max(largest, raw[i] & mask)
    return largest
