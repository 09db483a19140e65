"""The search for the absmax of NF4's blocks under which their error is least: see `surogate_formats.search`.

Blocks are worked on a chunk at a time; arrays of blocks have a place for each block of a chunk.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from surogate_formats.dynamic_absmax import NESTED_STEPS
from surogate_formats.nf4 import ABSMAX_FLOOR, BLOCKS_PER_GROUP
from surogate_formats.search import NF4_BIN_ERRORS, NF4_BINS, NF4_COARSE, NF4_MULTIPLIERS
from surogate_quantize.kernels.compiling import inner, kernel
from surogate_quantize.kernels.nf4_absmax import (
    AFFINE,
    DYNAMIC,
    NONE,
    affine_step,
    dynamic_code,
    group_absmax,
    inverses,
    nest_absmax,
    quantize_absmax,
)
from surogate_quantize.kernels.nf4_values import CHUNK, nearest_value
from surogate_quantize.kernels.source import spread, widen
from surogate_quantize.kernels.sums import pairwise_sums

_ZERO, _ONE, _STEPS = np.float32(0), np.float32(1), np.float32(NESTED_STEPS)
_HALF, _LAST = np.float32(NF4_BINS // 2), np.int32(NF4_BINS - 1)
_MULTIPLIERS = NF4_MULTIPLIERS.size
_X, _INVERSE, _ABSMAX, _TERMS, _SCRATCH = 0, 1, 2, 3, 4
FLOATS = 5
"""Rows of `CHUNK` floats that `search_chunk` works in."""


@kernel
def search_nf4(
    raw: NDArray[Any],
    kind: int,
    mask: Any,
    block: int,
    double: int,
    absmax_q: NDArray[np.uint8],
    absmax_f: NDArray[np.float32],
    scale: NDArray[np.float32],
    offset: NDArray[np.float32],
) -> None:
    """Finds the absmax of the blocks of a flat piece `raw` that starts a group; writes all but the codes.

    Outputs are those of `kernels.nf4.quantize_nf4`, which then takes them as given.
    """
    span = BLOCKS_PER_GROUP * block
    per_chunk = CHUNK // block
    absmax, own = np.empty(BLOCKS_PER_GROUP, np.float32), np.empty(BLOCKS_PER_GROUP, np.float32)
    bits, absmax_bits = np.empty((2, span), raw.dtype), np.empty(BLOCKS_PER_GROUP, raw.dtype)
    stored, bins = np.empty(BLOCKS_PER_GROUP, np.uint8), np.empty(CHUNK, np.uint8)
    floats = np.empty((FLOATS, CHUNK), np.float32)
    for group in range((raw.size + span - 1) // span):
        part = raw[group * span : (group + 1) * span]
        blocks = (part.size + block - 1) // block
        group_absmax(part, kind, mask, block, bits, absmax_bits, own)
        absmax[:] = own
        group_scale, group_offset = _ZERO, _ZERO
        if double == AFFINE:
            group_scale, group_offset = quantize_absmax(absmax[:blocks], stored[:blocks])
            scale[group], offset[group] = group_scale, group_offset
        elif double == DYNAMIC:
            group_offset = offset[0]
            group_scale = nest_absmax(absmax[:blocks], group_offset, stored[:blocks])
            scale[group] = group_scale
        for start in range(0, part.size, CHUNK):
            chunk, here = part[start : min(start + CHUNK, part.size)], slice(start // block, start // block + per_chunk)
            what = (block, double, group_scale, group_offset)
            search_chunk(chunk, kind, *what, own[here], absmax[here], stored[here], floats, bins)
        first = group * BLOCKS_PER_GROUP
        if double == NONE:
            absmax_f[first : first + blocks] = absmax[:blocks]
        else:
            absmax_q[first : first + blocks] = stored[:blocks]


@inner
def search_chunk(
    part: NDArray[Any],
    kind: int,
    block: int,
    double: int,
    scale: np.float32,
    offset: np.float32,
    own: NDArray[np.float32],
    absmax: NDArray[np.float32],
    stored: NDArray[np.uint8],
    floats: NDArray[np.float32],
    bins: NDArray[np.uint8],
) -> None:
    """Replaces `absmax`, what the reader restores, and `stored` where a legal value leaves a smaller error.

    `own` are the blocks' largest magnitudes, `scale` and `offset` what reverses a group's double quantization.
    `floats` [`FLOATS`, `CHUNK`] and `bins` [`CHUNK`] are scratch.
    """
    blocks = own.size
    widen(part, kind, floats[_X])
    error, wanted, grain = np.empty(blocks, np.float32), np.empty(blocks, np.float32), _ZERO
    if double == AFFINE:
        grain = scale
    elif double == DYNAMIC:
        grain = scale / _STEPS
    _errors(absmax, block, floats, error)
    _find_bins(own, block, floats, bins)
    _best_multiples(own, block, bins, wanted)
    _take_better(wanted, own, grain, False, block, double, scale, offset, absmax, stored, error, floats)
    if _any_coarse(own, grain):
        for m in range(_MULTIPLIERS):
            for b in range(blocks):
                wanted[b] = NF4_MULTIPLIERS[m] * own[b]
            _take_better(wanted, own, grain, True, block, double, scale, offset, absmax, stored, error, floats)


@inner
def _errors(absmax: NDArray[np.float32], block: int, floats: NDArray[np.float32], error: NDArray[np.float32]) -> None:
    """The squared error of each block, rounded to nearest under `absmax`."""
    x, inverse, factor, terms = floats[_X], floats[_INVERSE], floats[_ABSMAX], floats[_TERMS]
    each = np.empty(absmax.size, np.float32)
    inverses(absmax, each)
    spread(each, block, inverse)
    spread(absmax, block, factor)
    for i in range(x.size):
        miss = nearest_value(x[i] * inverse[i]) * factor[i] - x[i]
        terms[i] = miss * miss
    pairwise_sums(terms, block, floats[_SCRATCH], error)


@inner
def _find_bins(own: NDArray[np.float32], block: int, floats: NDArray[np.float32], bins: NDArray[np.uint8]) -> None:
    x, inverse = floats[_X], floats[_INVERSE]
    each = np.empty(own.size, np.float32)
    for b in range(own.size):
        each[b] = _ONE / max(own[b], ABSMAX_FLOOR)
    spread(each, block, inverse)
    for i in range(x.size):
        place = np.int32(x[i] * inverse[i] * _HALF + _HALF)
        bins[i] = np.uint8(min(place, _LAST))


@inner
def _best_multiples(own: NDArray[np.float32], block: int, bins: NDArray[np.uint8], wanted: NDArray[np.float32]) -> None:
    """The multiple of each block's own absmax that its bins say is best; all multipliers' sums grow together."""
    total = np.empty(_MULTIPLIERS, np.int32)
    for b in range(own.size):
        for m in range(_MULTIPLIERS):
            total[m] = 0
        for i in range(b * block, (b + 1) * block, 8):
            i0, i1, i2, i3 = bins[i], bins[i + 1], bins[i + 2], bins[i + 3]
            i4, i5, i6, i7 = bins[i + 4], bins[i + 5], bins[i + 6], bins[i + 7]
            for m in range(_MULTIPLIERS):
                low = NF4_BIN_ERRORS[i0, m] + NF4_BIN_ERRORS[i1, m] + NF4_BIN_ERRORS[i2, m] + NF4_BIN_ERRORS[i3, m]
                high = NF4_BIN_ERRORS[i4, m] + NF4_BIN_ERRORS[i5, m] + NF4_BIN_ERRORS[i6, m] + NF4_BIN_ERRORS[i7, m]
                total[m] += low + high
        best = 0
        for m in range(_MULTIPLIERS):
            best = m if total[m] < total[best] else best
        wanted[b] = NF4_MULTIPLIERS[best] * own[b]


@inner
def _any_coarse(own: NDArray[np.float32], grain: np.float32) -> bool:
    """Whether all multiples have to be tried; not for blocks of zeros, which nothing improves."""
    found = False
    for b in range(own.size):
        found = found or (grain * NF4_COARSE > own[b] and own[b] > _ZERO)
    return found


@inner
def _take_better(
    wanted: NDArray[np.float32],
    own: NDArray[np.float32],
    grain: np.float32,
    coarse: bool,
    block: int,
    double: int,
    scale: np.float32,
    offset: np.float32,
    absmax: NDArray[np.float32],
    stored: NDArray[np.uint8],
    error: NDArray[np.float32],
    floats: NDArray[np.float32],
) -> None:
    """Tries the legal values next to `wanted` in the blocks where they are coarse, or in those where they are not."""
    blocks = wanted.size
    code, legal, missed = np.zeros(blocks, np.uint8), np.empty(blocks, np.float32), np.empty(blocks, np.float32)
    for b in range(blocks):
        legal[b] = wanted[b]
        if double == AFFINE:
            code[b], legal[b] = affine_step(wanted[b], scale, offset)
        elif double == DYNAMIC:
            code[b], legal[b] = dynamic_code(wanted[b], scale, offset)
    _errors(legal, block, floats, missed)
    for b in range(blocks):
        if (grain * NF4_COARSE > own[b]) == coarse and missed[b] < error[b]:
            absmax[b], stored[b], error[b] = legal[b], code[b], missed[b]
