"""FP8 of a piece: whole rows, with block scaling whole bands of 128 rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from surogate_formats.fp8 import TILE
from surogate_quantize.kernels.compiling import inner, kernel
from surogate_quantize.kernels.e4m3 import round_e4m3
from surogate_quantize.kernels.errors import count_units, in_units, magnitude_bits, sum_of_squares
from surogate_quantize.kernels.source import largest_bits, spread, widen

CHUNK = 1024
"""Values of a row that are worked on together; a multiple of `TILE`."""

_MAGNITUDE, _SIGN, _SIGN_TO_CODE = np.uint32(0x7FFFFFFF), np.uint32(0x80000000), np.uint32(24)


@kernel
def tile_amax_bits(raw: NDArray[Any], height: int, width: int, mask: Any, out: NDArray[Any]) -> None:
    """The largest magnitude bits of each `height` x `width` tile of `raw` [rows, K], clipped at the edges.

    `out` [row tiles, column tiles] has the dtype of `raw`, and is 0. A channel is a tile of one row and K columns.
    """
    rows, columns = raw.shape
    for r in range(rows):
        line = out[r // height]
        for tile in range(line.size):
            part = raw[r, tile * width : min((tile + 1) * width, columns)]
            line[tile] = max(line[tile], largest_bits(part, mask))


@inner
def _round_chunk(
    x: NDArray[np.float32],
    scale: NDArray[np.float32],
    unit: np.float32,
    codes: NDArray[np.uint8],
    units: NDArray[np.int32],
) -> np.uint32:
    """Writes codes, and errors in units; returns the bits of the largest error."""
    worst = np.uint32(0)
    for i in range(codes.size):
        bits = np.float32(x[i] / scale[i]).view(np.uint32)
        code, value = round_e4m3(np.uint32(bits & _MAGNITUDE))
        codes[i] = np.uint8(code | np.uint32(np.uint32(bits & _SIGN) >> _SIGN_TO_CODE))
        miss = value * scale[i] - abs(x[i])
        units[i] = in_units(miss, unit)
        worst = np.uint32(max(worst, magnitude_bits(miss)))
    return worst


@kernel
def quantize_fp8(
    raw: NDArray[Any],
    kind: int,
    scale: NDArray[np.float32],
    height: int,
    width: int,
    unit: np.float32,
    codes: NDArray[np.uint8],
) -> tuple[int, int, int]:
    """Quantizes `raw` [rows, K] with `scale` [row tiles, column tiles] into `codes` [rows, K].

    A tile is `height` x `width`.

    Returns:
        Squared error and squared sum in units, and the bits of the largest error (see `errors`).
    """
    rows, columns = raw.shape
    x, scales, units = np.empty(CHUNK, np.float32), np.zeros(CHUNK, np.float32), np.empty(CHUNK, np.int32)
    repeats = min(width, CHUNK)
    error, square, worst = np.int64(0), np.int64(0), np.uint32(0)
    for r in range(rows):
        for start in range(0, columns, CHUNK):
            count = min(CHUNK, columns - start)
            widen(raw[r, start : start + count], kind, x)
            first = start // width
            # Most neighbours share their scale, which then stands there already.
            if repeats < CHUNK or scales[0] != scale[r // height, first]:
                spread(scale[r // height, first : first + CHUNK // repeats], repeats, scales)
            worst = max(worst, _round_chunk(x, scales, unit, codes[r, start : start + count], units))
            error += sum_of_squares(units[:count])
            count_units(x, unit, units)
            square += sum_of_squares(units)
    return int(error), int(square), int(worst)


__all__ = ["TILE", "quantize_fp8", "tile_amax_bits"]
