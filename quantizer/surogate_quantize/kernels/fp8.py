"""FP8 of a piece: whole rows, with block scaling whole bands of 128 rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from surogate_formats.fp8 import TILE
from surogate_quantize.kernels.e4m3 import round_e4m3
from surogate_quantize.kernels.errors import largest_error_bits, squared_error, squared_sum
from surogate_quantize.kernels.source import largest_bits, widen


@njit(nogil=True, cache=True, error_model="numpy")
def tile_amax_bits(raw: NDArray[Any], height: int, width: int, mask: Any, out: NDArray[Any]) -> None:
    """The largest magnitude bits of each `height` x `width` tile of `raw` [rows, K], clipped at the edges.

    `out` [row tiles, column tiles] has the dtype of `raw`. A channel is a tile of one row and K columns.
    """
    rows, columns = raw.shape
    out[:] = raw.dtype.type(0)
    for r in range(rows):
        line = out[r // height]
        for tile in range(line.size):
            part = raw[r, tile * width : min((tile + 1) * width, columns)]
            line[tile] = max(line[tile], largest_bits(part, mask))


@njit(nogil=True, cache=True, error_model="numpy")
def quantize_fp8(
    raw: NDArray[Any],
    kind: int,
    scale: NDArray[np.float32],
    height: int,
    width: int,
    unit: np.float32,
    codes: NDArray[np.uint8],
) -> tuple[int, int, int]:
    """Quantizes `raw` [rows, K] with `scale` [row tiles, column tiles] of tiles `height` x `width` into `codes` [rows, K].

    Returns:
        Squared error and squared sum in units, and the bits of the largest error (see `errors`).
    """
    rows, columns = raw.shape
    x, scaled = np.empty(columns, np.float32), np.empty(columns, np.float32)
    values, scratch = np.empty(columns, np.float32), np.empty(columns, np.float32)
    error, square, worst = np.int64(0), np.int64(0), np.uint32(0)
    for r in range(rows):
        widen(raw[r], kind, x)
        line = scale[r // height]
        for tile in range(line.size):
            begin, end = tile * width, min((tile + 1) * width, columns)
            _divide(x[begin:end], line[tile], scaled[begin:end])
        round_e4m3(scaled, codes[r], values, scratch)
        for tile in range(line.size):
            begin, end = tile * width, min((tile + 1) * width, columns)
            _multiply(values[begin:end], line[tile])
        error += squared_error(values, x, unit)
        square += squared_sum(x, unit)
        worst = max(worst, largest_error_bits(values, x, scratch))
    return error, square, worst


@njit(nogil=True, cache=True, error_model="numpy")
def _divide(x: NDArray[np.float32], scale: np.float32, out: NDArray[np.float32]) -> None:
    for i in range(x.size):
        out[i] = x[i] / scale


@njit(nogil=True, cache=True, error_model="numpy")
def _multiply(values: NDArray[np.float32], scale: np.float32) -> None:
    for i in range(values.size):
        values[i] = values[i] * scale


__all__ = ["TILE", "quantize_fp8", "tile_amax_bits"]
