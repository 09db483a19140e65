"""The search for the scales of FP8's channels and tiles with the least error: see `surogate_formats.search`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from surogate_formats.fp8 import TILE
from surogate_formats.search import CHANNEL_LANES, FP8_MULTIPLIERS
from surogate_quantize.kernels.compiling import inner, kernel
from surogate_quantize.kernels.e4m3 import round_e4m3
from surogate_quantize.kernels.source import widen
from surogate_quantize.kernels.sums import pairwise_sums

CHUNK = 1024
"""Columns of a channel that are worked on together; a multiple of `CHANNEL_LANES`."""

_ALL = FP8_MULTIPLIERS.size
_MAGNITUDE, _ZERO, _ONE = np.uint32(0x7FFFFFFF), np.float32(0), np.float32(1)


@kernel
def search_channels(raw: NDArray[Any], kind: int, tried: NDArray[np.float32], scale: NDArray[np.float32]) -> None:
    """Writes the best of `tried` [candidates, rows] to `scale` [rows], for the rows of `raw`; ties go to the first."""
    columns = raw.shape[1]
    x, scratch = np.empty(CHUNK, np.float32), np.empty(CHANNEL_LANES, np.float32)
    lanes, error = np.empty((_ALL, CHANNEL_LANES), np.float32), np.empty(1, np.float32)
    for r in range(raw.shape[0]):
        least, lanes[:] = np.float32(np.inf), _ZERO
        scale[r] = tried[0, r]
        for start in range(0, columns, CHUNK):
            count = min(CHUNK, columns - start)
            widen(raw[r, start : start + count], kind, x)
            for k in range(_ALL):
                for first in range(0, count, CHANNEL_LANES):
                    _add_squares(x[first : first + CHANNEL_LANES], tried[k, r], lanes[k])
        for k in range(_ALL):
            pairwise_sums(lanes[k], CHANNEL_LANES, scratch, error)
            if error[0] < least:
                scale[r], least = tried[k, r], error[0]


@kernel
def search_tiles(raw: NDArray[Any], kind: int, tried: NDArray[np.float32], scale: NDArray[np.float32]) -> None:
    """Writes the best of `tried` [candidates, row tiles, column tiles] to `scale`; ties go to the first."""
    rows, columns = raw.shape
    x, scratch, error = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(1, np.float32)
    lanes = np.empty((_ALL, TILE), np.float32)
    for t in range(scale.shape[0]):
        for i in range(scale.shape[1]):
            least, lanes[:] = np.float32(np.inf), _ZERO
            scale[t, i] = tried[0, t, i]
            for r in range(t * TILE, min((t + 1) * TILE, rows)):
                widen(raw[r, i * TILE : min((i + 1) * TILE, columns)], kind, x)
                for k in range(_ALL):
                    _add_squares(x, tried[k, t, i], lanes[k])
            for k in range(_ALL):
                pairwise_sums(lanes[k], TILE, scratch, error)
                if error[0] < least:
                    scale[t, i], least = tried[k, t, i], error[0]


@inner
def _add_squares(x: NDArray[np.float32], scale: np.float32, lanes: NDArray[np.float32]) -> None:
    """Adds the squared error of each value to its lane."""
    inverse = _ONE / scale
    for i in range(x.size):
        bits = np.float32(x[i] * inverse).view(np.uint32)
        _, value = round_e4m3(np.uint32(bits & _MAGNITUDE))
        miss = value * scale - abs(x[i])
        lanes[i] += miss * miss
