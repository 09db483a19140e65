"""Which scales `search` tries for a block, and the error by which it chooses: for every format, in one place.

The scale of rounding to nearest comes first, and another takes its place only with a strictly smaller sum of squared
errors. For that, values are multiplied by the reciprocal of a step; the division by which NVFP4 and FP8 choose their
codes in the end differs at ties alone. Sums run in float32 in an order that numpy, vector units and the lanes of a warp
can all keep: neighbours are added, then neighbours of those sums.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from surogate_formats.tables import F32_MIN_NORMAL, NF4_CODEBOOK, NF4_MIDPOINTS

F32 = NDArray[np.float32]

CHANNEL_LANES, TILE_LANES = 256, 128
"""Sums that are kept of an FP8 channel or tile: values so many columns apart are added one after the other, row by row,
then the sums by neighbours."""

NF4_MULTIPLIERS: F32 = np.array([0.8 + 0.02 * i for i in range(16)], dtype=np.float32)
"""What an NF4 block's absmax is multiplied by, float32 [16]."""

NF4_BINS = 256
"""Places of a value x / absmax in [-1, 1] that the choice of a multiplier tells apart."""

NF4_COARSE = np.float32(32)
"""Where the legal absmax of a block lie further apart than 1/32 of its own, all multipliers are tried in full."""

NVFP4_OFFSETS = (-2, -1, 1, 3, 4, 5, 6, 2)
"""What is added to the E4M3 code of an NVFP4 block's scale: 0.75 to 1.75 times amax/6, and so to both scales of
Four-Over-Six."""

NVFP4_CLIPPING = 2
"""So many of them come first that clip a block's largest values. They are not tried for 16x16 tiles: there an outlier
would be clipped for the sake of 255 others, which lowers the error by 4 % and was seen to raise the KL by a quarter."""

E4M3_LEAST_NORMAL = 8
"""The E4M3 code of the smallest normal value."""

NVFP4_NORMAL = 7
"""So many of them are tried for every block; the rest only where the code is a subnormal's. Elsewhere 2 is hardly ever
best, and none of Four-Over-Six's."""

FP8_MULTIPLIERS: F32 = np.array(
    [1.0, 0.91700405, 1.09050775, 1.18920708, 1.29683959, 1.41421354, 1.54221082, 1.68179286, 1.83400810],
    dtype=np.float32,
)
"""What amax/448 is multiplied by: 1, then 2^(k/8) for k = -1 to 7, float32 [9]; clipping more never paid."""


def _nf4_bin_errors() -> NDArray[np.int32]:
    each = 16
    places = (2 * np.arange(NF4_BINS * each) + 1 - NF4_BINS * each) / (NF4_BINS * each)
    errors = np.empty((NF4_BINS, NF4_MULTIPLIERS.size), np.int32)
    for m, multiplier in enumerate(NF4_MULTIPLIERS.astype(np.float64)):
        codes = np.searchsorted(NF4_MIDPOINTS.astype(np.float64) * multiplier, places)
        missed = NF4_CODEBOOK.astype(np.float64)[codes] * multiplier - places
        units = np.rint(missed * missed * 2.0**24).astype(np.int64)  # whole: their sum has no order
        errors[:, m] = units.reshape(NF4_BINS, each).sum(axis=1) // each
    return errors


NF4_BIN_ERRORS = _nf4_bin_errors()
"""Mean squared error of the values of a bin under each multiplier, int32 [256, 16], in 2^-24 absmax^2."""


def best_nf4_multiplier(normalized: F32) -> F32:
    """The multiplier with the least error of each block, float32 [nb], by the bins of x / absmax, [nb, block]."""
    half = np.float32(NF4_BINS // 2)
    bins = np.minimum((normalized * half + half).astype(np.int32), NF4_BINS - 1)
    errors = np.stack([NF4_BIN_ERRORS[:, m][bins].sum(axis=1) for m in range(NF4_MULTIPLIERS.size)])
    best: F32 = NF4_MULTIPLIERS[errors.argmin(axis=0)]
    return best


def reciprocal(step: F32) -> F32:
    """fl(1 / step), which stays finite for steps below the smallest normal values."""
    return np.reciprocal(np.maximum(step, F32_MIN_NORMAL))


def pairwise_sum(terms: F32) -> F32:
    """Adds up the last axis, whose length is a power of two: neighbours first, then neighbours of those sums."""
    with np.errstate(over="ignore"):
        while terms.shape[-1] > 1:
            terms = terms[..., 0::2] + terms[..., 1::2]
    total: F32 = terms[..., 0]
    return total


def squares(values: F32, x: F32) -> F32:
    """The squared error of each value, infinite where it overflows."""
    with np.errstate(over="ignore", invalid="ignore"):
        missed: F32 = values - x
        return missed * missed


def tile_errors(values: F32, x: F32, height: int, width: int) -> F32:
    """The squared error of each tile of float32 [N, K], clipped at the edges: float32 [row tiles, column tiles].

    A tile is 128 columns wide, or as wide as the matrix.
    """
    rows, columns = x.shape
    lanes = TILE_LANES if width == TILE_LANES else CHANNEL_LANES
    padded = np.pad(squares(values, x), ((0, -rows % height), (0, -columns % lanes)))
    down, across = len(padded) // height, -(-columns // max(width, 1))
    each = padded.shape[1] // lanes // max(across, 1)
    by_tile = padded.reshape(down, height, across, each, lanes).swapaxes(1, 2)
    return pairwise_sum(running_total(by_tile.reshape(down, across, height * each, lanes)))


def running_total(terms: F32) -> F32:
    """Adds up the last axis but one, one after the other; 0 of nothing."""
    total = np.zeros((*terms.shape[:-2], terms.shape[-1]), np.float32)
    with np.errstate(over="ignore"):
        for place in range(terms.shape[-2]):
            total = total + terms[..., place, :]
    return total
