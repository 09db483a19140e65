"""Rounding to E4M3 on the bits of a float32, elementwise so that loops over it vectorize."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from surogate_formats.tables import E4M3_MAX

_MAGNITUDE, _SIGN = np.uint32(0x7FFFFFFF), np.uint32(0x80000000)
_HALF_STEP, _STEP_SHIFT = np.uint32(0x7FFFF), np.uint32(20)
_REBIAS = np.uint32((127 - 7) << 3)
_MIN_NORMAL = np.float32(2.0**-6)
_SUBNORMAL_MAGIC = np.float32(2.0**14)
"""Adding it leaves a float32 whose last bit is worth 2^-9, the step of E4M3's subnormals."""

_SUBNORMAL_BITS = _SUBNORMAL_MAGIC.view(np.uint32)
_MAX_BITS = E4M3_MAX.view(np.uint32)
_MIN_NORMAL_BITS = _MIN_NORMAL.view(np.uint32)
_KEPT_BITS = np.uint32(0xFFF00000)


@njit(nogil=True, cache=True, error_model="numpy")
def round_e4m3(
    x: NDArray[np.float32],
    codes: NDArray[np.uint8],
    values: NDArray[np.float32],
    scratch: NDArray[np.float32],
) -> None:
    """E4M3 codes of finite or infinite float32 `x`, saturating at ±448, and the float32 values of the codes."""
    bits, small_bits = x.view(np.uint32), scratch.view(np.uint32)
    for i in range(x.size):
        scratch[i] = min(abs(x[i]), _MIN_NORMAL) + _SUBNORMAL_MAGIC
    value_bits = values.view(np.uint32)
    for i in range(x.size):
        magnitude = min(bits[i] & _MAGNITUDE, _MAX_BITS)
        rounded = magnitude + _HALF_STEP + ((magnitude >> _STEP_SHIFT) & np.uint32(1))
        normal = (rounded >> _STEP_SHIFT) - _REBIAS
        subnormal = small_bits[i] - _SUBNORMAL_BITS
        sign = bits[i] & _SIGN
        is_small = magnitude < _MIN_NORMAL_BITS
        codes[i] = np.uint8((subnormal if is_small else normal) | (sign >> np.uint32(24)))
        value_bits[i] = sign | (np.uint32(0) if is_small else (rounded & _KEPT_BITS))
    for i in range(x.size):
        small = scratch[i] - _SUBNORMAL_MAGIC
        magnitude = bits[i] & _MAGNITUDE
        if magnitude < _MIN_NORMAL_BITS:
            values[i] = -small if bits[i] & _SIGN else small
