"""Reading source values: exact widening to float32, and the largest magnitude."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from surogate_quantize.kernels.compiling import inner, kernel

_ZERO, _HALF_WORD = np.float32(0), np.uint32(16)
_F16_MAGNITUDE, _F16_SIGN, _F16_SHIFT = np.uint32(0x7FFF), np.uint32(0x8000), np.uint32(23 - 10)
_F16_REBIAS = np.float32(2.0**112)


@inner
def widen(raw: NDArray[Any], kind: int, out: NDArray[np.float32]) -> None:
    """Writes the values of `raw` to the first places of float32 `out`, exactly, and zeros to the rest.

    A half's exponent is 112 below that of a float32 with the same bits; the multiplication also normalizes subnormals.
    """
    if kind == 1:
        for i in range(raw.size):
            out[i] = np.uint32(np.uint32(raw[i]) << _HALF_WORD).view(np.float32)
    elif kind == 0:
        for i in range(raw.size):
            out[i] = np.uint32(raw[i]).view(np.float32)
    else:
        for i in range(raw.size):
            half = np.uint32(raw[i])
            bits = np.uint32(((half & _F16_MAGNITUDE) << _F16_SHIFT) | ((half & _F16_SIGN) << _HALF_WORD))
            out[i] = bits.view(np.float32) * _F16_REBIAS
    for i in range(raw.size, out.size):
        out[i] = _ZERO


@kernel
def largest_bits(raw: NDArray[Any], mask: Any) -> Any:
    """The largest magnitude bits (value & mask) in a flat `raw`: magnitudes order as their bits do."""
    largest = raw.dtype.type(0)
    for i in range(raw.size):
        # Without the casts these are 64-bit integers, and the loop does a quarter of the work at a time.
        largest = raw.dtype.type(max(largest, raw.dtype.type(raw[i] & mask)))
    return largest


@inner
def magnitudes(raw: NDArray[Any], mask: Any, out: NDArray[Any]) -> None:
    """Writes the magnitude bits of `raw` to the first places of `out` of the same dtype, and zeros to the rest."""
    for i in range(raw.size):
        out[i] = raw[i] & mask
    for i in range(raw.size, out.size):
        out[i] = 0


@inner
def _fold(raw: NDArray[Any], mask: Any, out: NDArray[Any]) -> None:
    """The larger one of each two magnitudes."""
    for i in range(out.size):
        left, right = raw.dtype.type(raw[2 * i] & mask), raw.dtype.type(raw[2 * i + 1] & mask)
        out[i] = left if left > right else right


@inner
def largest_of_each(raw: NDArray[Any], mask: Any, width: int, scratch: NDArray[Any], out: NDArray[Any]) -> None:
    """The largest magnitude bits of each `width` (a power of two) values; `scratch` is as long as `raw`.

    Folded in halves: each round is one long loop that vectorizes.
    """
    place = 0
    while width > 2:
        half = scratch[place : place + raw.size // 2]
        _fold(raw, mask, half)
        raw = half
        place += half.size
        width //= 2
    _fold(raw, mask, out)


@inner
def spread(values: NDArray[np.float32], width: int, out: NDArray[np.float32]) -> None:
    """Repeats each of `values` `width` times."""
    for b in range(values.size):
        value, part = values[b], out[b * width : (b + 1) * width]
        for i in range(part.size):
            part[i] = value
