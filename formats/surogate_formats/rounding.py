"""Rounding of float32 arrays onto the small floating-point types, to nearest with ties to even."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from surogate_formats.tables import E2M1_MAX, E2M1_VALUES, E4M3_MAX

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]


def to_e4m3(x: F32) -> NDArray[ml_dtypes.float8_e4m3fn]:
    """Rounds to E4M3fn, saturating at ±448.

    The cast of ml_dtypes gives NaN beyond 464, hence the clamp before it.
    """
    return np.clip(x, -E4M3_MAX, E4M3_MAX).astype(ml_dtypes.float8_e4m3fn)


def to_e2m1_codes(x: F32) -> U8:
    """Rounds to E2M1, saturating at ±6, and gives the codes (sign << 3 | index), one a byte.

    A tie goes to the neighbour with the even mantissa bit (0.25 to 0, 0.75 to 1, 2.5 to 2, 3.5 to 4, 5 to 4); a
    negative value that rounds to zero keeps its sign (code 8).
    """
    magnitude = np.minimum(np.abs(x), E2M1_MAX)
    index = (magnitude > 0.25).astype(np.uint8)
    for threshold, tie_goes_up in (
        (0.75, True),
        (1.25, False),
        (1.75, True),
        (2.5, False),
        (3.5, True),
        (5.0, False),
    ):
        index += magnitude >= threshold if tie_goes_up else magnitude > threshold
    sign = np.signbit(x).astype(np.uint8) << np.uint8(3)
    return index | sign


def from_e2m1_codes(codes: U8) -> F32:
    """The float32 values of E2M1 codes 0..15, one a byte."""
    return E2M1_VALUES[codes]


def bfloat16_up(x: F32) -> F32:
    """The smallest bfloat16 that is at least `x` (x finite, not negative), as float32."""
    bits = x.view(np.uint32)
    return ((bits + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)


def pack_nibbles(codes: U8, *, first_high: bool, pad: int = 0) -> U8:
    """Packs codes 0..15 two to a byte along the last axis.

    Args:
        codes: uint8 [..., n].
        first_high: element 2i goes to the high nibble (NF4), else to the low one (E2M1).
        pad: the code that fills the last nibble when n is odd.

    Returns:
        uint8 [..., ceil(n/2)].
    """
    if codes.shape[-1] % 2:
        tail = np.full((*codes.shape[:-1], 1), pad, dtype=np.uint8)
        codes = np.concatenate([codes, tail], axis=-1)
    even, odd = codes[..., 0::2], codes[..., 1::2]
    shift = np.uint8(4)
    return (even << shift) | odd if first_high else even | (odd << shift)


def unpack_nibbles(packed: U8, count: int, *, first_high: bool) -> U8:
    """The inverse of `pack_nibbles`: uint8 [..., count] from uint8 [..., ceil(count/2)]."""
    high, low = packed >> 4, packed & 15
    pair = (high, low) if first_high else (low, high)
    return np.stack(pair, axis=-1).reshape(*packed.shape[:-1], -1)[..., :count]
