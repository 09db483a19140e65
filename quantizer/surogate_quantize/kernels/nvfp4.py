"""NVFP4 of a piece: bands of 16 rows (2-D scales) or single rows (1-D).

A band is worked on in strips of blocks, transposed to [row, column in block, block]: every inner loop runs over blocks, so sums
keep the order that the format fixes within a block while the loop vectorizes over many.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from surogate_formats.nvfp4 import BLOCK
from surogate_formats.tables import E2M1_MAX, E4M3_MAX, E4M3_MIN
from surogate_quantize.kernels.e4m3 import round_e4m3
from surogate_quantize.kernels.errors import largest_error_bits, squared_error, squared_sum
from surogate_quantize.kernels.source import widen

STRIP = 64
"""Blocks that are worked on together."""

METRICS = {"mse": 0, "l1": 1, "absmax": 2}
"""How `quantize_nvfp4` takes the metric of Four-Over-Six."""

_MAGNITUDE, _SIGN = np.uint32(0x7FFFFFFF), np.uint32(0x80000000)
_ZERO, _ONE_AND_A_HALF, _TWO, _FOUR = np.float32(0), np.float32(1.5), np.float32(2), np.float32(4)
_MAGIC_HALF, _MAGIC_ONE, _MAGIC_TWO = np.float32(2.0**22), np.float32(2.0**23), np.float32(2.0**24)
"""Adding 2^22 to a small float32 rounds it to a multiple of 0.5, 2^23 of 1, 2^24 of 2: E2M1's steps up to 2, 4 and 6."""


@njit(nogil=True, cache=True, error_model="numpy")
def _round_line(
    x: NDArray[np.float32], step: NDArray[np.float32], codes: NDArray[np.uint8], values: NDArray[np.float32]
) -> None:
    """E2M1 codes and dequantized values of one value of each block; `step` must not be 0."""
    for b in range(x.size):
        y = min(abs(x[b] / step[b]), E2M1_MAX)
        magic = _MAGIC_HALF if y < _TWO else (_MAGIC_ONE if y < _FOUR else _MAGIC_TWO)
        rounded = (y + magic) - magic
        values[b] = np.copysign(rounded * step[b], x[b])
        index = np.int32(rounded + rounded) if rounded < _TWO else np.int32(rounded) + np.int32(2)
        index = index - np.int32(1) if rounded > _FOUR else index
        codes[b] = np.uint8(index | (np.int32(8) if np.signbit(x[b]) else np.int32(0)))


@njit(nogil=True, cache=True, error_model="numpy")
def _add_error(values: NDArray[np.float32], x: NDArray[np.float32], metric: int, total: NDArray[np.float32]) -> None:
    if metric == 0:
        for b in range(x.size):
            difference = values[b] - x[b]
            total[b] = total[b] + difference * difference
    elif metric == 1:
        for b in range(x.size):
            total[b] = total[b] + abs(values[b] - x[b])
    else:
        for b in range(x.size):
            total[b] = max(total[b], abs(values[b] - x[b]))


@njit(nogil=True, cache=True, error_model="numpy")
def _block_scales(
    wanted: NDArray[np.float32],
    amax: NDArray[np.float32],
    g: np.float32,
    codes: NDArray[np.uint8],
    step: NDArray[np.float32],
    scratch: NDArray[np.float32],
) -> None:
    """E4M3 codes of the scales, and the steps scale / g; 0 and 1 where a block is all zero."""
    for b in range(wanted.size):
        wanted[b] = min(wanted[b], E4M3_MAX)
    round_e4m3(wanted, codes, step, scratch)
    for b in range(wanted.size):
        if amax[b] == _ZERO:
            codes[b], step[b] = np.uint8(0), np.float32(1)
        else:
            if codes[b] == 0:
                codes[b], step[b] = np.uint8(1), E4M3_MIN
            step[b] = step[b] / g


@njit(nogil=True, cache=True, error_model="numpy")
def _round_strip(
    x: NDArray[np.float32],
    step: NDArray[np.float32],
    metric: int,
    codes: NDArray[np.uint8],
    values: NDArray[np.float32],
    error: NDArray[np.float32],
) -> None:
    error[:] = _ZERO
    for r in range(x.shape[0]):
        for j in range(BLOCK):
            _round_line(x[r, j], step, codes[r, j], values[r, j])
            _add_error(values[r, j], x[r, j], metric, error)


@njit(nogil=True, cache=True, error_model="numpy")
def _load_strip(
    raw: NDArray[Any],
    kind: int,
    blocks: int,
    line: NDArray[np.float32],
    x: NDArray[np.float32],
    amax: NDArray[np.float32],
) -> None:
    """Widens `raw` [height, blocks * 16] into `x` [height, 16, blocks], and finds each block's (tile's) amax."""
    amax[:] = _ZERO
    for r in range(raw.shape[0]):
        widen(raw[r], kind, line)
        for j in range(BLOCK):
            column = x[r, j]
            for b in range(blocks):
                column[b] = line[b * BLOCK + j]
            for b in range(blocks):
                amax[b] = max(amax[b], abs(column[b]))


@njit(nogil=True, cache=True, error_model="numpy")
def _store_strip(codes: NDArray[np.uint8], blocks: int, out: NDArray[np.uint8]) -> None:
    """Packs `codes` [height, 16, blocks] into `out` [height, blocks * 8]."""
    for r in range(out.shape[0]):
        for j in range(BLOCK // 2):
            low, high, row = codes[r, 2 * j], codes[r, 2 * j + 1], out[r]
            for b in range(blocks):
                row[b * (BLOCK // 2) + j] = low[b] | (high[b] << np.uint8(4))


@njit(nogil=True, cache=True, error_model="numpy")
def quantize_nvfp4(
    raw: NDArray[Any],
    kind: int,
    height: int,
    g: np.float32,
    four_over_six: bool,
    metric: int,
    unit: np.float32,
    codes: NDArray[np.uint8],
    scale: NDArray[np.uint8],
) -> tuple[int, int, int]:
    """Quantizes `raw` [rows, K] by tiles of `height` x 16 into `codes` [rows, K/2] and E4M3 bits `scale` [rows, K/16].

    Returns:
        Squared error and squared sum in units, and the bits of the largest error (see `errors`).
    """
    rows, columns = raw.shape
    line = np.empty(STRIP * BLOCK, np.float32)
    x = np.empty((height, BLOCK, STRIP), np.float32)
    values, values_4 = np.empty_like(x), np.empty_like(x)
    nibbles, nibbles_4 = np.empty(x.shape, np.uint8), np.empty(x.shape, np.uint8)
    scratch = np.empty(STRIP * BLOCK * height, np.float32)
    f32 = np.empty((6, STRIP), np.float32)
    amax, wanted, step, step_4, miss, miss_4 = f32[0], f32[1], f32[2], f32[3], f32[4], f32[5]
    bits, bits_4 = np.empty(STRIP, np.uint8), np.empty(STRIP, np.uint8)
    error, square, worst = np.int64(0), np.int64(0), np.uint32(0)
    for top in range(0, rows, height):
        tall = min(height, rows - top)
        for first in range(0, columns // BLOCK, STRIP):
            blocks = min(STRIP, columns // BLOCK - first)
            band = raw[top : top + tall, first * BLOCK : (first + blocks) * BLOCK]
            if blocks < STRIP:
                x[:] = _ZERO
            _load_strip(band, kind, blocks, line, x, amax)
            for b in range(STRIP):
                wanted[b] = amax[b] / E2M1_MAX * g
            _block_scales(wanted, amax, g, bits, step, scratch)
            _round_strip(x[:tall], step, metric, nibbles, values, miss)
            if four_over_six:
                for b in range(STRIP):
                    wanted[b] = _ONE_AND_A_HALF * (amax[b] / E2M1_MAX * g)
                _block_scales(wanted, amax, g, bits_4, step_4, scratch)
                _round_strip(x[:tall], step_4, metric, nibbles_4, values_4, miss_4)
                for b in range(STRIP):
                    bits[b] = bits_4[b] if miss_4[b] < miss[b] else bits[b]
                _take_four(miss, miss_4, nibbles_4[:tall], values_4[:tall], nibbles, values)
            for b in range(STRIP):
                if amax[b] == _ZERO:
                    nibbles[:, :, b] = np.uint8(0)
            for r in range(tall):
                scale[top + r, first : first + blocks] = bits[:blocks]
            _store_strip(nibbles, blocks, codes[top : top + tall, first * 8 : (first + blocks) * 8])
            flat_values, flat_x = values[:tall].reshape(-1), x[:tall].reshape(-1)
            error += squared_error(flat_values, flat_x, unit)
            square += squared_sum(flat_x, unit)
            worst = max(worst, largest_error_bits(flat_values, flat_x, scratch))
    return error, square, worst


@njit(nogil=True, cache=True, error_model="numpy")
def _take_four(
    miss: NDArray[np.float32],
    miss_4: NDArray[np.float32],
    codes_4: NDArray[np.uint8],
    values_4: NDArray[np.float32],
    codes: NDArray[np.uint8],
    values: NDArray[np.float32],
) -> None:
    """Replaces the blocks whose error is strictly smaller when their largest value maps to 4."""
    for r in range(codes_4.shape[0]):
        for j in range(BLOCK):
            c, c4, v, v4 = codes[r, j], codes_4[r, j], values[r, j], values_4[r, j]
            for b in range(miss.size):
                four = miss_4[b] < miss[b]
                c[b] = c4[b] if four else c[b]
                v[b] = v4[b] if four else v[b]
