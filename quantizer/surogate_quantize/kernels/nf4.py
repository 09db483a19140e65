"""NF4 of a piece: whole groups of 256 blocks, worked on in chunks that fit the first cache.

Factors of a block are spread over its values first: a long flat loop vectorizes, many short ones with a factor each
don't.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from surogate_formats.nf4 import ABSMAX_FLOOR, BLOCKS_PER_GROUP
from surogate_formats.tables import NF4_CODEBOOK, NF4_MIDPOINTS
from surogate_quantize.kernels.compiling import inner, kernel
from surogate_quantize.kernels.errors import count_units, in_units, magnitude_bits, sum_of_squares
from surogate_quantize.kernels.nf4_absmax import group_absmax, nest_absmax, quantize_absmax
from surogate_quantize.kernels.source import spread, widen

CHUNK = 1024
"""Values that are worked on together; block sizes divide it."""

_T1, _T3, _T5, _T7, _T9, _T11, _T13 = map(np.float32, NF4_MIDPOINTS[1::2])
_C0, _C1, _C2, _C3, _C4, _C5, _C6, _C7, _C8, _C9, _C10, _C11, _C12, _C13, _C14, _C15 = map(np.float32, NF4_CODEBOOK)
_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)
_A0, _A1, _A3 = np.float32(7.75), np.float32(11.36), np.float32(3.86)
"""A cubic, 0.1 to 0.9 above the code at each of the 16 values: cheaper than putting the code together from bits."""

_NO_SIGN = np.int32(0)

_NONE, _AFFINE, _DYNAMIC = 0, 1, 2
DOUBLE_QUANT = {"none": _NONE, "affine": _AFFINE, "dynamic": _DYNAMIC}
"""The format's double quantization as kernels get it."""


@inner
def _less(a: np.float32, b: np.float32) -> Any:
    """Whether a < b, by the sign of a - b: vector selects go by a sign, and subtracting is cheap beside them."""
    return np.float32(a - b).view(np.int32) < _NO_SIGN


@inner
def _round_chunk(
    x: NDArray[np.float32],
    inverse: NDArray[np.float32],
    absmax: NDArray[np.float32],
    unit: np.float32,
    values: NDArray[np.float32],
    units: NDArray[np.int32],
) -> np.uint32:
    """Writes values of the table, and errors in units; returns the bits of the largest error.

    A binary search down to a pair of values and their midpoint, as the format defines it; written out, since single
    selects vectorize.
    """
    worst = np.uint32(0)
    for i in range(x.size):
        v = x[i] * inverse[i]
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
        value = c1 if b0 else c0
        values[i] = value
        miss = value * absmax[i] - x[i]
        units[i] = in_units(miss, unit)
        worst = np.uint32(max(worst, magnitude_bits(miss)))
    return worst


@inner
def _codes(values: NDArray[np.float32], codes: NDArray[np.uint8]) -> None:
    """The codes of values of the table, one a byte."""
    for i in range(values.size):
        value = values[i]
        codes[i] = np.uint8(np.int32(_A0 + value * (_A1 - _A3 * value * value)))


@inner
def _inverses(absmax: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """What to multiply a block's values by. 0 where absmax is: every value then gets code 7."""
    for b in range(absmax.size):
        inverse = _ONE / max(absmax[b], ABSMAX_FLOOR)
        out[b] = _ZERO if absmax[b] == _ZERO else inverse


@inner
def _pack(codes: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """The first of two codes goes to the high nibble."""
    for i in range(out.size):
        out[i] = np.uint8((codes[2 * i] << 4) | codes[2 * i + 1])


@kernel
def quantize_nf4(
    raw: NDArray[Any],
    kind: int,
    mask: Any,
    block: int,
    double: int,
    unit: np.float32,
    codes: NDArray[np.uint8],
    absmax_q: NDArray[np.uint8],
    absmax_f: NDArray[np.float32],
    scale: NDArray[np.float32],
    offset: NDArray[np.float32],
) -> tuple[int, int, int]:
    """Quantizes a flat piece `raw` that starts a group; the output arrays are the piece's own slices.

    `double` is one of `DOUBLE_QUANT`. With `affine` `absmax_q`, `scale` and `offset` are written; with `dynamic`
    `absmax_q` and, as `scale`, the nested absmax, while `offset` [1] is given; without `absmax_f`.

    Returns:
        Squared error and squared sum in units, and the bits of the largest error (see `errors`).
    """
    span = BLOCKS_PER_GROUP * block
    per_chunk = CHUNK // block
    x, inverses, absmaxes = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    values, units, nibbles = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.int32), np.empty(CHUNK, np.uint8)
    absmax, inverse = np.empty(BLOCKS_PER_GROUP, np.float32), np.empty(BLOCKS_PER_GROUP, np.float32)
    bits, absmax_bits = np.empty((2, span), raw.dtype), np.empty(BLOCKS_PER_GROUP, raw.dtype)
    error, square, worst = np.int64(0), np.int64(0), np.uint32(0)
    for group in range((raw.size + span - 1) // span):
        part = raw[group * span : (group + 1) * span]
        blocks = (part.size + block - 1) // block
        group_absmax(part, kind, mask, block, bits, absmax_bits, absmax)
        first = group * BLOCKS_PER_GROUP
        if double == _AFFINE:
            scale[group], offset[group] = quantize_absmax(absmax[:blocks], absmax_q[first : first + blocks])
        _inverses(absmax, inverse)
        if double == _DYNAMIC:
            scale[group] = nest_absmax(absmax[:blocks], offset[0], absmax_q[first : first + blocks])
        elif double == _NONE:
            for b in range(blocks):
                absmax_f[first + b] = absmax[b]
        for start in range(0, part.size, CHUNK):
            count = min(CHUNK, part.size - start)
            b = start // block
            widen(part[start : start + count], kind, x)
            spread(inverse[b : b + per_chunk], block, inverses)
            spread(absmax[b : b + per_chunk], block, absmaxes)
            worst = max(worst, _round_chunk(x, inverses, absmaxes, unit, values, units))
            error += sum_of_squares(units)
            _codes(values, nibbles)
            _pack(nibbles, codes[(group * span + start) // 2 : (group * span + start + count + 1) // 2])
            count_units(x, unit, units)
            square += sum_of_squares(units)
    return int(error), int(square), int(worst)
