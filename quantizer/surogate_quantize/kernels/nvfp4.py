"""NVFP4 of a piece: bands of 16 rows (2-D scales) or one row (1-D), in strips of columns that fit the first cache.

Steps of a block are spread over its values first: a long flat loop vectorizes, many short ones with a step each don't.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from surogate_formats.nvfp4 import BLOCK
from surogate_quantize.kernels.compiling import kernel
from surogate_quantize.kernels.e2m1 import pack, round_line
from surogate_quantize.kernels.errors import count_units, sum_of_squares
from surogate_quantize.kernels.nvfp4_scales import (
    METRICS,
    block_amax,
    block_scales,
    choose,
    columns_of_strip,
    measure,
    spread_steps,
    steps_of,
    store,
)
from surogate_quantize.kernels.source import widen

SIX, FOUR = 0, 1
"""Ways to scale a block: its largest magnitude becomes 6 or 4."""

_STRETCH = (np.float32(1), np.float32(1.5))
"""A block's scale by way, relative to that of `SIX`."""


@kernel
def quantize_nvfp4(
    raw: NDArray[Any],
    kind: int,
    mask: Any,
    height: int,
    g: np.float32,
    four_over_six: bool,
    metric: int,
    given: bool,
    unit: np.float32,
    codes: NDArray[np.uint8],
    scale: NDArray[np.uint8],
) -> tuple[int, int, int]:
    """Quantizes `raw` [rows, K] by tiles of `height` x 16 into `codes` [rows, K/2] and E4M3 bits `scale` [rows, K/16].

    `g` is the global scale. With `given` the scales are there already.

    Returns:
        Squared error and squared sum in units, and the bits of the largest error (see `errors`).
    """
    rows, columns = raw.shape
    strip = columns_of_strip(columns)
    blocks = strip // BLOCK
    x, steps, terms = np.empty(strip, np.float32), np.empty(strip, np.float32), np.empty(strip, np.float32)
    units, nibbles, peaks = np.empty(strip, np.int32), np.empty(strip, np.uint8), np.empty((3, strip), raw.dtype)
    amax = np.empty(blocks, np.float32)
    bits = (np.empty(blocks, np.uint8), np.empty(blocks, np.uint8))
    step = (np.empty(blocks, np.float32), np.empty(blocks, np.float32))
    misses = (np.empty(blocks, np.float32), np.empty(blocks, np.float32))
    error, square, worst = np.int64(0), np.int64(0), np.uint32(0)
    for top in range(0, rows, height):
        band = raw[top : min(top + height, rows)]
        for first in range(0, columns, strip):
            last = min(first + strip, columns)
            block_amax(band, first, last, kind, mask, peaks, amax)
            if given:
                steps_of(scale[top, first // BLOCK : last // BLOCK], g, bits[SIX], step[SIX])
            for way in range(0 if given else FOUR + 1 if four_over_six else SIX + 1):
                block_scales(amax, g, _STRETCH[way], bits[way], step[way])
                spread_steps(step[way], steps)
                if four_over_six:
                    measure(band, first, last, kind, metric, steps, x, terms, misses[way])
            if four_over_six and not given:
                choose(misses[SIX], misses[FOUR], bits[FOUR], step[FOUR], bits[SIX], step[SIX])
            spread_steps(step[SIX], steps)
            for r in range(band.shape[0]):
                widen(band[r, first:last], kind, x)
                worst = max(worst, round_line(x, steps, unit, nibbles, units))
                error += sum_of_squares(units)
                pack(nibbles, amax, codes[top + r, first // 2 : last // 2])
                store(bits[SIX], scale[top + r, first // BLOCK : last // BLOCK])
                count_units(x, unit, units)
                square += sum_of_squares(units)
    return int(error), int(square), int(worst)


__all__ = ["METRICS", "quantize_nvfp4"]
