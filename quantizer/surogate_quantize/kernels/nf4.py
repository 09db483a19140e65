"""NF4 of a piece: whole groups of 256 blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from surogate_formats.nf4 import ABSMAX_FLOOR, BLOCKS_PER_GROUP
from surogate_formats.tables import NF4_CODEBOOK, NF4_MIDPOINTS, NF4_ZERO_CODE
from surogate_quantize.kernels.errors import largest_error_bits, squared_error, squared_sum
from surogate_quantize.kernels.source import largest_bits, widen

_T0, _T1, _T2, _T3, _T4, _T5, _T6, _T7, _T8, _T9, _T10, _T11, _T12, _T13, _T14 = map(np.float32, NF4_MIDPOINTS)
_C0, _C1, _C2, _C3, _C4, _C5, _C6, _C7, _C8, _C9, _C10, _C11, _C12, _C13, _C14, _C15 = map(np.float32, NF4_CODEBOOK)
_ONE, _TWO, _ZERO = np.float32(1), np.float32(2), np.float32(0)
_STEPS, _LIMIT = np.float32(254), np.float32(127)
_MAGNITUDE = np.uint32(0x7FFFFFFF)


@njit(nogil=True, cache=True, error_model="numpy")
def _round_block(
    x: NDArray[np.float32], absmax: np.float32, codes: NDArray[np.int32], values: NDArray[np.float32]
) -> None:
    """Codes and values of one block. Written out, since only selects and sums of compares vectorize."""
    inverse = _ONE / max(absmax, ABSMAX_FLOOR)
    for i in range(x.size):
        v = x[i] * inverse
        codes[i] = (
            np.int32(v > _T0) + np.int32(v > _T1) + np.int32(v > _T2) + np.int32(v > _T3) + np.int32(v > _T4)
            + np.int32(v > _T5) + np.int32(v > _T6) + np.int32(v > _T7) + np.int32(v > _T8) + np.int32(v > _T9)
            + np.int32(v > _T10) + np.int32(v > _T11) + np.int32(v > _T12) + np.int32(v > _T13)
            + np.int32(v > _T14)
        )  # fmt: skip
        q = _C1 if v > _T0 else _C0
        q = _C2 if v > _T1 else q
        q = _C3 if v > _T2 else q
        q = _C4 if v > _T3 else q
        q = _C5 if v > _T4 else q
        q = _C6 if v > _T5 else q
        q = _C7 if v > _T6 else q
        q = _C8 if v > _T7 else q
        q = _C9 if v > _T8 else q
        q = _C10 if v > _T9 else q
        q = _C11 if v > _T10 else q
        q = _C12 if v > _T11 else q
        q = _C13 if v > _T12 else q
        q = _C14 if v > _T13 else q
        q = _C15 if v > _T14 else q
        values[i] = q * absmax


@njit(nogil=True, cache=True, error_model="numpy")
def _quantize_absmax(absmax: NDArray[np.float32], stored: NDArray[np.uint8]) -> tuple[np.float32, np.float32]:
    """Double quantization of one group in place: `absmax` becomes what the reader will restore."""
    low = high = absmax[0]
    for b in range(absmax.size):
        low, high = min(low, absmax[b]), max(high, absmax[b])
    offset = low / _TWO + high / _TWO
    scale = (high - low) / _STEPS
    for b in range(absmax.size):
        step = _ZERO
        if scale != _ZERO:
            step = min(max(np.rint((absmax[b] - offset) / scale), -_LIMIT), _LIMIT)
        stored[b] = np.uint8(np.int32(step) + 128)
        absmax[b] = max(step * scale + offset, _ZERO)
    return scale, offset


@njit(nogil=True, cache=True, error_model="numpy")
def _pack(codes: NDArray[np.int32], out: NDArray[np.uint8]) -> None:
    for i in range(out.size):
        out[i] = np.uint8((codes[2 * i] << 4) | codes[2 * i + 1])


@njit(nogil=True, cache=True, error_model="numpy")
def quantize_nf4(
    raw: NDArray[Any],
    kind: int,
    block: int,
    double: bool,
    unit: np.float32,
    codes: NDArray[np.uint8],
    absmax_q: NDArray[np.uint8],
    absmax_f: NDArray[np.float32],
    scale: NDArray[np.float32],
    offset: NDArray[np.float32],
) -> tuple[int, int, int]:
    """Quantizes a flat piece `raw` that starts a group; the output arrays are the piece's own slices.

    With `double`, `absmax_q`, `scale` and `offset` are written, else `absmax_f`.

    Returns:
        Squared error and squared sum in units, and the bits of the largest error (see `errors`).
    """
    span = BLOCKS_PER_GROUP * block
    x, values, scratch = np.empty(span, np.float32), np.empty(span, np.float32), np.empty(span, np.float32)
    magnitude, nibbles = x.view(np.uint32), np.empty(span, np.int32)
    absmax = np.empty(BLOCKS_PER_GROUP, np.float32)
    absmax_bits = absmax.view(np.uint32)
    error, square, worst = np.int64(0), np.int64(0), np.uint32(0)
    for group in range((raw.size + span - 1) // span):
        start = group * span
        count = min(span, raw.size - start)
        blocks = (count + block - 1) // block
        widen(raw[start : start + count], kind, x)
        x[count:] = _ZERO
        for b in range(blocks):
            absmax_bits[b] = largest_bits(magnitude[b * block : (b + 1) * block], _MAGNITUDE)
        first = group * BLOCKS_PER_GROUP
        if double:
            scale[group], offset[group] = _quantize_absmax(absmax[:blocks], absmax_q[first : first + blocks])
        else:
            absmax_f[first : first + blocks] = absmax[:blocks]
        for b in range(blocks):
            begin, end = b * block, (b + 1) * block
            if absmax[b] == _ZERO:
                nibbles[begin:end] = NF4_ZERO_CODE
                values[begin:end] = _ZERO
            else:
                _round_block(x[begin:end], absmax[b], nibbles[begin:end], values[begin:end])
        error += squared_error(values[:count], x[:count], unit)
        square += squared_sum(x[:count], unit)
        worst = max(worst, largest_error_bits(values[:count], x[:count], scratch))
        if count % 2:
            nibbles[count] = NF4_ZERO_CODE
        _pack(nibbles, codes[start // 2 : start // 2 + (count + 1) // 2])
    return error, square, worst
