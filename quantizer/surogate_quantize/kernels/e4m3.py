"""Rounding to E4M3 on the bits of a float32, free of branches, so that loops that call it vectorize."""

from __future__ import annotations

import numpy as np

from surogate_formats.search import E4M3_LEAST_NORMAL
from surogate_formats.tables import E4M3_MAX
from surogate_quantize.kernels.compiling import inner

_EXPONENT = np.uint32(0x7F800000)
_MAX_BITS = E4M3_MAX.view(np.uint32)
_MIN_NORMAL_BITS = np.float32(2.0**-6).view(np.uint32)
_TO_MAGIC = np.uint32(20 << 23)
_LEAST, _BIAS = np.float32(2.0**-9), np.uint32((127 - 7) << 3)
_TO_CODE, _REBIAS = np.uint32(20), np.uint32((127 - 6) << 3)

LEAST_NORMAL = np.int32(E4M3_LEAST_NORMAL)
"""The code of the smallest normal value."""


@inner
def round_e4m3(magnitude: np.uint32) -> tuple[np.uint32, np.float32]:
    """E4M3 code and value nearest to the float32 with the bits `magnitude` (no sign, no NaN), ties to even, up to 448.

    A float32 2^20 times the value's power of two has the step of E4M3 at the value as its last bit: adding it rounds.
    The lowest binade of normals and the subnormals share their step.
    """
    bits = np.uint32(min(magnitude, _MAX_BITS))
    binade = np.uint32(max(bits, _MIN_NORMAL_BITS) & _EXPONENT)
    magic = np.uint32(binade + _TO_MAGIC)
    total = np.float32(bits.view(np.float32) + magic.view(np.float32))
    steps = np.uint32(total.view(np.uint32) - magic)
    code = np.uint32(steps + np.uint32((binade >> _TO_CODE) - _REBIAS))
    return code, np.float32(total - magic.view(np.float32))


@inner
def value_of_e4m3(code: np.int32) -> np.float32:
    """The float32 value of a code without sign, 0 to 126."""
    normal = np.uint32(np.uint32(np.uint32(code) + _BIAS) << _TO_CODE).view(np.float32)
    return normal if code >= LEAST_NORMAL else np.float32(code) * _LEAST
