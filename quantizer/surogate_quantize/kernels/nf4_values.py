"""Rounding to the values of NF4's table, free of branches, so that loops that call it vectorize."""

from __future__ import annotations

from typing import Any

import numpy as np

from surogate_formats.tables import NF4_CODEBOOK, NF4_MIDPOINTS
from surogate_quantize.kernels.compiling import inner

_T1, _T3, _T5, _T7, _T9, _T11, _T13 = map(np.float32, NF4_MIDPOINTS[1::2])
_C0, _C1, _C2, _C3, _C4, _C5, _C6, _C7, _C8, _C9, _C10, _C11, _C12, _C13, _C14, _C15 = map(np.float32, NF4_CODEBOOK)
_HALF = np.float32(0.5)
_NO_SIGN = np.int32(0)

CHUNK = 1024
"""Values that are worked on together; block sizes divide it."""


@inner
def _less(a: np.float32, b: np.float32) -> Any:
    """Whether a < b, by the sign of a - b: vector selects go by a sign, and subtracting is cheap beside them."""
    return np.float32(a - b).view(np.int32) < _NO_SIGN


@inner
def nearest_value(v: np.float32) -> np.float32:
    """The table's value nearest to v.

    A binary search down to a pair of values and their midpoint, as the format defines it; written out, since single
    selects vectorize.
    """
    b3 = _less(_T7, v)
    t = _T11 if b3 else _T3
    b2 = _less(t, v)
    t, t_high = _T9 if b3 else _T1, _T13 if b3 else _T5
    t = t_high if b2 else t
    b1 = _less(t, v)
    c0, c1, c2, c3 = _C8 if b3 else _C0, _C9 if b3 else _C1, _C10 if b3 else _C2, _C11 if b3 else _C3
    c4, c5, c6, c7 = _C12 if b3 else _C4, _C13 if b3 else _C5, _C14 if b3 else _C6, _C15 if b3 else _C7
    c0, c1, c2, c3 = c4 if b2 else c0, c5 if b2 else c1, c6 if b2 else c2, c7 if b2 else c3
    c0, c1 = c2 if b1 else c0, c3 if b1 else c1
    b0 = _less((c0 + c1) * _HALF, v)
    return c1 if b0 else c0
