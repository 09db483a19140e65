"""Rounding to E2M1, free of branches, so that loops that call it vectorize."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from surogate_formats.nvfp4 import BLOCK
from surogate_formats.tables import E2M1_MAX
from surogate_quantize.kernels.compiling import inner
from surogate_quantize.kernels.errors import in_units, magnitude_bits

_ZERO, _SIGN, _SIGN_TO_CODE, _INDEX = np.float32(0), np.uint32(0x80000000), np.uint32(28), np.uint32(7)
_LOW, _MIDDLE = np.float32(2), np.float32(4)
_MAGIC_LOW, _MAGIC_MIDDLE, _MAGIC_HIGH = np.float32(2.0**22), np.float32(2.0**23 + 2), np.float32(2.0**24 + 8)


@inner
def round_e2m1(x: np.float32, step: np.float32) -> tuple[np.uint32, np.float32]:
    """Index and value of the E2M1 magnitude nearest to |x| / step, ties to even, at most 6."""
    return round_magnitude(abs(x) / step)


@inner
def round_magnitude(y: np.float32) -> tuple[np.uint32, np.float32]:
    """Index and value of the E2M1 magnitude nearest to y, ties to even, at most 6.

    Adding 2^22 rounds a small float32 to a multiple of 0.5, 2^23 to one of 1, 2^24 to one of 2: E2M1's steps up to 2, 4
    and 6. Adding 2^23 + 2 and 2^24 + 8 besides leaves the index in the last three bits.
    """
    y = E2M1_MAX if y > E2M1_MAX else y
    magic = _MAGIC_MIDDLE if y >= _LOW else _MAGIC_LOW
    magic = _MAGIC_HIGH if y >= _MIDDLE else magic
    total = np.float32(y + magic)
    return np.uint32(total.view(np.uint32) & _INDEX), np.float32(total - magic)


@inner
def error_terms(x: NDArray[np.float32], step: NDArray[np.float32], squared: bool, terms: NDArray[np.float32]) -> None:
    """|dequantized - source| of each value, or its square."""
    for i in range(x.size):
        _, value = round_e2m1(x[i], step[i])
        missed = value * step[i] - abs(x[i])
        terms[i] = missed * missed if squared else abs(missed)


@inner
def round_line(
    x: NDArray[np.float32],
    step: NDArray[np.float32],
    unit: np.float32,
    codes: NDArray[np.uint8],
    units: NDArray[np.int32],
) -> np.uint32:
    """Writes codes, one a byte, and errors in units; returns the bits of the largest error."""
    worst = np.uint32(0)
    for i in range(x.size):
        index, value = round_e2m1(x[i], step[i])
        sign = np.uint32(np.float32(x[i]).view(np.uint32) & _SIGN)
        codes[i] = np.uint8(index | np.uint32(sign >> _SIGN_TO_CODE))
        miss = value * step[i] - abs(x[i])
        units[i] = in_units(miss, unit)
        worst = np.uint32(max(worst, magnitude_bits(miss)))
    return worst


@inner
def pack(codes: NDArray[np.uint8], amax: NDArray[np.float32], out: NDArray[np.uint8]) -> None:
    """The first of two codes goes to the low nibble; blocks without magnitude are 0, whatever their signs."""
    for i in range(out.size):
        out[i] = np.uint8(codes[2 * i] | (codes[2 * i + 1] << 4))
    for b in range(out.size // (BLOCK // 2)):
        if amax[b] == _ZERO:
            for j in range(BLOCK // 2):
                out[b * (BLOCK // 2) + j] = np.uint8(0)
