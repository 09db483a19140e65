"""NF4 of a piece: whole groups of 256 blocks, worked on in chunks that fit the first cache.

Factors of a block are spread over its values first: a long flat loop vectorizes, many short ones with a factor each
don't.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from surogate_formats.nf4 import BLOCKS_PER_GROUP
from surogate_quantize.kernels.compiling import inner, kernel
from surogate_quantize.kernels.errors import count_units, in_units, magnitude_bits, sum_of_squares
from surogate_quantize.kernels.nf4_absmax import (
    AFFINE,
    DYNAMIC,
    NONE,
    group_absmax,
    inverses,
    nest_absmax,
    quantize_absmax,
    restore_absmax,
)
from surogate_quantize.kernels.nf4_values import CHUNK, nearest_value
from surogate_quantize.kernels.source import spread, widen

_ZERO = np.float32(0)
_A0, _A1, _A3 = np.float32(7.75), np.float32(11.36), np.float32(3.86)
"""A cubic, 0.1 to 0.9 above the code at each of the 16 values: cheaper than putting the code together from bits."""


@inner
def _round_chunk(
    x: NDArray[np.float32],
    inverse: NDArray[np.float32],
    absmax: NDArray[np.float32],
    unit: np.float32,
    values: NDArray[np.float32],
    units: NDArray[np.int32],
) -> np.uint32:
    """Writes values of the table, and errors in units; returns the bits of the largest error."""
    worst = np.uint32(0)
    for i in range(x.size):
        value = nearest_value(x[i] * inverse[i])
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
    given: bool,
    unit: np.float32,
    codes: NDArray[np.uint8],
    absmax_q: NDArray[np.uint8],
    absmax_f: NDArray[np.float32],
    scale: NDArray[np.float32],
    offset: NDArray[np.float32],
) -> tuple[int, int, int]:
    """Quantizes a flat piece `raw` that starts a group; the output arrays are the piece's own slices.

    `double` is one of `nf4_absmax.DOUBLE_QUANT`. With `given` all but the codes is there already. Else, with `affine`
    `absmax_q`, `scale` and `offset` are written; with `dynamic` `absmax_q` and, as `scale`, the nested absmax, while
    `offset` [1] is given; without `absmax_f`.

    Returns:
        Squared error and squared sum in units, and the bits of the largest error (see `errors`).
    """
    span = BLOCKS_PER_GROUP * block
    per_chunk = CHUNK // block
    x, factors, absmaxes = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    values, units, nibbles = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.int32), np.empty(CHUNK, np.uint8)
    absmax, inverse = np.empty(BLOCKS_PER_GROUP, np.float32), np.empty(BLOCKS_PER_GROUP, np.float32)
    bits, absmax_bits = np.empty((2, span), raw.dtype), np.empty(BLOCKS_PER_GROUP, raw.dtype)
    error, square, worst = np.int64(0), np.int64(0), np.uint32(0)
    for group in range((raw.size + span - 1) // span):
        part = raw[group * span : (group + 1) * span]
        blocks = (part.size + block - 1) // block
        first = group * BLOCKS_PER_GROUP
        group_offset = offset[group if double == AFFINE else 0] if double != NONE else _ZERO
        if given:
            group_scale = scale[group] if double != NONE else _ZERO
            restore_absmax(absmax_q, absmax_f, first, blocks, double, group_scale, group_offset, absmax)
            inverses(absmax, inverse)
        else:
            group_absmax(part, kind, mask, block, bits, absmax_bits, absmax)
            if double == AFFINE:
                scale[group], offset[group] = quantize_absmax(absmax[:blocks], absmax_q[first : first + blocks])
            inverses(absmax, inverse)
            if double == DYNAMIC:
                scale[group] = nest_absmax(absmax[:blocks], group_offset, absmax_q[first : first + blocks])
            elif double == NONE:
                for b in range(blocks):
                    absmax_f[first + b] = absmax[b]
        for start in range(0, part.size, CHUNK):
            count = min(CHUNK, part.size - start)
            b = start // block
            widen(part[start : start + count], kind, x)
            spread(inverse[b : b + per_chunk], block, factors)
            spread(absmax[b : b + per_chunk], block, absmaxes)
            worst = max(worst, _round_chunk(x, factors, absmaxes, unit, values, units))
            error += sum_of_squares(units)
            _codes(values, nibbles)
            _pack(nibbles, codes[(group * span + start) // 2 : (group * span + start + count + 1) // 2])
            count_units(x, unit, units)
            square += sum_of_squares(units)
    return int(error), int(square), int(worst)
