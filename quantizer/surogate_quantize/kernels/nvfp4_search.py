"""The search for the E4M3 scales of NVFP4's blocks under which their error is least: see `surogate_formats.search`.

Values are turned over first, so that neighbours in memory are of neighbouring blocks: each has its own step, and sums
over a block are then sums of whole rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from surogate_formats.nvfp4 import BLOCK
from surogate_formats.search import NVFP4_CLIPPING, NVFP4_NORMAL, NVFP4_OFFSETS
from surogate_formats.tables import F32_MIN_NORMAL
from surogate_quantize.kernels.compiling import inner, kernel
from surogate_quantize.kernels.e2m1 import round_magnitude
from surogate_quantize.kernels.e4m3 import LEAST_NORMAL, value_of_e4m3
from surogate_quantize.kernels.nvfp4_scales import block_amax, block_scales, columns_of_strip, store
from surogate_quantize.kernels.source import widen

_OFFSETS = np.array(NVFP4_OFFSETS, np.int32)
_ONE, _EMPTY, _FIRST, _LAST = np.float32(1), np.int32(0), np.int32(1), np.int32(126)


@kernel
def search_nvfp4(raw: NDArray[Any], kind: int, mask: Any, height: int, g: np.float32, scale: NDArray[np.uint8]) -> None:
    """Finds the E4M3 codes `scale` [rows, K/16] of `raw` [rows, K] by tiles of `height` x 16."""
    rows, columns = raw.shape
    strip = columns_of_strip(columns)
    blocks = strip // BLOCK
    x, peaks = np.empty(strip, np.float32), np.empty((3, strip), raw.dtype)
    amax, step, codes = np.empty(blocks, np.float32), np.empty(blocks, np.float32), np.empty(blocks, np.uint8)
    turned = np.empty(((height + 1) * BLOCK, blocks), np.float32)
    floats, ints = np.empty((3 + 2 * height, blocks), np.float32), np.empty((3, blocks), np.int32)
    for top in range(0, rows, height):
        band = raw[top : min(top + height, rows)]
        for first in range(0, columns, strip):
            last = min(first + strip, columns)
            block_amax(band, first, last, kind, mask, peaks, amax)
            block_scales(amax, g, _ONE, codes, step)
            _search_strip(band, first, last, kind, g, codes, step, x, turned, floats, ints)
            for r in range(top, top + band.shape[0]):
                store(codes, scale[r, first // BLOCK : last // BLOCK])


@inner
def _search_strip(
    raw: NDArray[Any],
    first: int,
    last: int,
    kind: int,
    g: np.float32,
    codes: NDArray[np.uint8],
    step: NDArray[np.float32],
    x: NDArray[np.float32],
    turned: NDArray[np.float32],
    floats: NDArray[np.float32],
    ints: NDArray[np.int32],
) -> None:
    """Replaces E4M3 codes of scales and steps, those of rounding to nearest, where others leave a smaller error.

    Tiles are the rows of `raw` in the columns `first` to `last`. Scratch are `x`, a float for each column, `turned` [16
    for each row of a tile and 16 more, blocks], `floats` [3 and twice the height, blocks] and `ints` [3, blocks].
    """
    blocks = codes.size
    error, missed, other = floats[0], floats[1], floats[2]
    nearest, best, tried = ints[0], ints[1], ints[2]
    turned, scratch = turned[:-BLOCK], turned[-BLOCK:]
    for r in range(turned.shape[0] // BLOCK):
        line = raw[r, first:last] if r < raw.shape[0] else raw[0, :0]
        _turn(line, kind, x, scratch, turned[r * BLOCK : (r + 1) * BLOCK])
    for b in range(blocks):
        nearest[b] = best[b] = np.int32(codes[b])
    _tile_errors(turned, step, floats[3:], error)
    first_tried = 0 if turned.shape[0] == BLOCK else NVFP4_CLIPPING
    for k in range(first_tried, _OFFSETS.size if _any_subnormal(nearest) else NVFP4_NORMAL):
        limit = _LAST if k < NVFP4_NORMAL else LEAST_NORMAL - _FIRST
        _shift(nearest, _OFFSETS[k], limit, g, step, tried, other)
        _tile_errors(turned, other, floats[3:], missed)
        _take_better(missed, other, tried, error, step, best)
    for b in range(blocks):
        codes[b] = np.uint8(best[b])


@inner
def _shift(
    nearest: NDArray[np.int32],
    offset: np.int32,
    limit: np.int32,
    g: np.float32,
    step: NDArray[np.float32],
    tried: NDArray[np.int32],
    other: NDArray[np.float32],
) -> None:
    """Codes of scales at an offset, and their steps; where the nearest is 0 or above `limit`, the steps of the best."""
    for b in range(nearest.size):
        code, old = nearest[b], step[b]
        shifted = np.int32(min(max(np.int32(code + offset), _FIRST), _LAST))
        wide = value_of_e4m3(shifted) / g
        low = wide if code <= limit else old
        other[b] = old if code == _EMPTY else low
        tried[b] = shifted


@inner
def _take_better(
    missed: NDArray[np.float32],
    other: NDArray[np.float32],
    tried: NDArray[np.int32],
    error: NDArray[np.float32],
    step: NDArray[np.float32],
    best: NDArray[np.int32],
) -> None:
    """Everything is loaded before it is chosen, so that nothing branches."""
    for b in range(error.size):
        new, old, new_step, old_step, new_code, old_code = missed[b], error[b], other[b], step[b], tried[b], best[b]
        better = new < old
        error[b] = new if better else old
        step[b] = new_step if better else old_step
        best[b] = new_code if better else old_code


@inner
def _any_subnormal(codes: NDArray[np.int32]) -> bool:
    found = False
    for b in range(codes.size):
        found = found or codes[b] < LEAST_NORMAL
    return found


@inner
def _turn(
    raw: NDArray[Any], kind: int, x: NDArray[np.float32], scratch: NDArray[np.float32], out: NDArray[np.float32]
) -> None:
    """Magnitudes of a row to [16, blocks], zeros where the row is empty: dealt out to four lines, and those again."""
    widen(raw, kind, x)
    half = scratch.reshape(4, 4 * out.shape[1])
    _deal(x, half[0], half[1], half[2], half[3])
    for j in range(4):
        _deal(half[j], out[j], out[4 + j], out[8 + j], out[12 + j])


@inner
def _deal(
    x: NDArray[np.float32],
    first: NDArray[np.float32],
    second: NDArray[np.float32],
    third: NDArray[np.float32],
    fourth: NDArray[np.float32],
) -> None:
    """Magnitudes to four lines by turns: with so few strides the loop vectorizes."""
    for i in range(first.size):
        first[i], second[i], third[i], fourth[i] = (
            abs(x[4 * i]),
            abs(x[4 * i + 1]),
            abs(x[4 * i + 2]),
            abs(x[4 * i + 3]),
        )


@inner
def _square(x: np.float32, step: np.float32, inverse: np.float32) -> np.float32:
    _, value = round_magnitude(x * inverse)
    miss = value * step - x
    return miss * miss


@inner
def _tile_errors(
    turned: NDArray[np.float32], step: NDArray[np.float32], lines: NDArray[np.float32], error: NDArray[np.float32]
) -> None:
    """The squared error of each tile by neighbours: of values first, then of rows; `lines` is scratch."""
    start, count = 0, turned.shape[0] // BLOCK
    if count == 1:
        _line_errors(turned, step, error)
        return
    for r in range(count):
        _line_errors(turned[r * BLOCK : (r + 1) * BLOCK], step, lines[r])
    while count > 1:
        end = start + count
        for r in range(count // 2):
            above, below, total = lines[start + 2 * r], lines[start + 2 * r + 1], lines[end + r]
            for b in range(error.size):
                total[b] = above[b] + below[b]
        start, count = end, count // 2
    error[:] = lines[start]


@inner
def _line_errors(x: NDArray[np.float32], step: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """The squared error of each block of a row."""
    for b in range(out.size):
        s = step[b]
        i = _ONE / max(s, F32_MIN_NORMAL)
        first = _square(x[0, b], s, i) + _square(x[1, b], s, i)
        first = first + (_square(x[2, b], s, i) + _square(x[3, b], s, i))
        second = _square(x[4, b], s, i) + _square(x[5, b], s, i)
        second = second + (_square(x[6, b], s, i) + _square(x[7, b], s, i))
        third = _square(x[8, b], s, i) + _square(x[9, b], s, i)
        third = third + (_square(x[10, b], s, i) + _square(x[11, b], s, i))
        fourth = _square(x[12, b], s, i) + _square(x[13, b], s, i)
        fourth = fourth + (_square(x[14, b], s, i) + _square(x[15, b], s, i))
        out[b] = (first + second) + (third + fourth)
