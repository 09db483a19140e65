"""Scales of NVFP4's blocks (tiles, with 2-D scales), and the choice of Four-Over-Six."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from surogate_formats.nvfp4 import BLOCK
from surogate_formats.tables import E2M1_MAX, E4M3_MIN
from surogate_quantize.kernels.compiling import inner
from surogate_quantize.kernels.e2m1 import error_terms
from surogate_quantize.kernels.e4m3 import round_e4m3, value_of_e4m3
from surogate_quantize.kernels.source import largest_of_each, magnitudes, widen

STRIP = 1024
"""Columns that are worked on together."""

MSE, L1, ABSMAX = 0, 1, 2
METRICS = {"mse": MSE, "l1": L1, "absmax": ABSMAX}
"""How kernels take the metric of Four-Over-Six."""

_ZERO, _ONE = np.float32(0), np.float32(1)


@inner
def block_amax(
    raw: NDArray[Any], first: int, last: int, kind: int, mask: Any, bits: NDArray[Any], amax: NDArray[np.float32]
) -> None:
    """Largest magnitude of each tile of `raw` [height, K] in the columns `first` to `last`, padded with zeros.

    `bits` [3, blocks * 16], of the dtype of `raw`, is scratch.
    """
    peaks, block_bits = bits[0], bits[2, : amax.size]
    magnitudes(raw[0, first:last], mask, peaks)
    for r in range(1, raw.shape[0]):
        _raise_peaks(raw[r, first:last], mask, peaks)
    largest_of_each(peaks, mask, BLOCK, bits[1], block_bits)
    widen(block_bits, kind, amax)


@inner
def _raise_peaks(raw: NDArray[Any], mask: Any, peaks: NDArray[Any]) -> None:
    for i in range(raw.size):
        magnitude = raw.dtype.type(raw[i] & mask)
        peaks[i] = magnitude if magnitude > peaks[i] else peaks[i]


@inner
def block_scales(
    amax: NDArray[np.float32], g: np.float32, stretch: np.float32, codes: NDArray[np.uint8], step: NDArray[np.float32]
) -> None:
    """E4M3 codes of the scales, and the steps scale / g; 0 and 1 where a block is all zero."""
    for b in range(amax.size):
        wanted = np.float32(stretch * (amax[b] / E2M1_MAX * g))
        code, value = round_e4m3(wanted.view(np.uint32))
        value = E4M3_MIN if code == 0 else value
        code = np.uint32(1) if code == 0 else code
        quotient = value / g
        step[b] = _ONE if amax[b] == _ZERO else quotient
        codes[b] = np.uint8(0) if amax[b] == _ZERO else np.uint8(code)


@inner
def spread_steps(step: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Repeats each step for the values of its block, two at a time."""
    pairs = out.view(np.uint64)
    for b in range(step.size):
        bits = np.uint64(np.float32(step[b]).view(np.uint32))
        pair = bits | (bits << np.uint64(32))
        for j in range(BLOCK // 2):
            pairs[b * (BLOCK // 2) + j] = pair


@inner
def measure(
    raw: NDArray[Any],
    first: int,
    last: int,
    kind: int,
    metric: int,
    steps: NDArray[np.float32],
    x: NDArray[np.float32],
    terms: NDArray[np.float32],
    total: NDArray[np.float32],
) -> None:
    """The error `total` of each tile of `raw` [height, K] in the columns `first` to `last` with these steps."""
    for b in range(total.size):
        total[b] = _ZERO
    for r in range(raw.shape[0]):
        widen(raw[r, first:last], kind, x)
        error_terms(x, steps, metric == MSE, terms)
        if metric == ABSMAX:
            _take_largest(terms, total)
        else:
            _add_terms(terms, total)


@inner
def _add_terms(terms: NDArray[np.float32], total: NDArray[np.float32]) -> None:
    """Adds up each block in the order that the format fixes."""
    for b in range(total.size):
        sum_ = total[b]
        for j in range(BLOCK):
            sum_ = sum_ + terms[b * BLOCK + j]
        total[b] = sum_


@inner
def _take_largest(terms: NDArray[np.float32], total: NDArray[np.float32]) -> None:
    for b in range(total.size):
        largest = total[b]
        for j in range(BLOCK):
            largest = max(largest, terms[b * BLOCK + j])
        total[b] = largest


@inner
def choose(
    error_6: NDArray[np.float32],
    error_4: NDArray[np.float32],
    codes_4: NDArray[np.uint8],
    step_4: NDArray[np.float32],
    codes: NDArray[np.uint8],
    step: NDArray[np.float32],
) -> None:
    """Takes the scale that maps to 4 where its error is strictly smaller."""
    for b in range(step.size):
        four = error_4[b] < error_6[b]
        here, here_4, code, code_4 = step[b], step_4[b], codes[b], codes_4[b]
        step[b] = here_4 if four else here
        codes[b] = code_4 if four else code


@inner
def steps_of(codes: NDArray[np.uint8], g: np.float32, bits: NDArray[np.uint8], step: NDArray[np.float32]) -> None:
    """The steps of the first blocks, whose E4M3 codes are known, and their codes in `bits`; 0 and 1 for the rest."""
    for b in range(bits.size):
        code = np.int32(codes[b]) if b < codes.size else np.int32(0)
        quotient = value_of_e4m3(code) / g
        step[b] = _ONE if code == 0 else quotient
        bits[b] = np.uint8(code)


@inner
def columns_of_strip(columns: int) -> int:
    """Columns of a strip: about `STRIP`, such that equal strips cover a row with little to spare."""
    strips = max((columns + STRIP - 1) // STRIP, 1)
    return max((columns // BLOCK + strips - 1) // strips, 1) * BLOCK


@inner
def store(bits: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """Copies the codes of as many blocks as there are."""
    for b in range(out.size):
        out[b] = bits[b]
