"""NF4's absmax: of the blocks of a group, and their double quantization, a group at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from surogate_formats.dynamic_absmax import DYNAMIC_MAP, DYNAMIC_MIDPOINTS, NESTED_FLOOR
from surogate_formats.nf4 import ABSMAX_FLOOR, BLOCKS_PER_GROUP
from surogate_quantize.kernels.compiling import inner, kernel
from surogate_quantize.kernels.source import largest_of_each, magnitudes, widen

_ZERO, _ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)
_STEPS, _LIMIT, _MIDDLE = np.float32(254), np.float32(127), np.float32(128)

NONE, AFFINE, DYNAMIC = 0, 1, 2
DOUBLE_QUANT = {"none": NONE, "affine": AFFINE, "dynamic": DYNAMIC}
"""The format's double quantization as kernels get it."""


@inner
def group_absmax(
    part: NDArray[Any],
    kind: int,
    mask: Any,
    block: int,
    bits: NDArray[Any],
    absmax_bits: NDArray[Any],
    absmax: NDArray[np.float32],
) -> None:
    """The absmax of the blocks of one group, zeros after its last block; `bits` [2, values of a group] is scratch."""
    if part.size == bits.shape[1]:
        largest_of_each(part, mask, block, bits[1], absmax_bits)
    else:
        magnitudes(part, mask, bits[0])
        largest_of_each(bits[0], mask, block, bits[1], absmax_bits)
    widen(absmax_bits, kind, absmax)


@kernel
def block_absmax(raw: NDArray[Any], kind: int, mask: Any, block: int, out: NDArray[np.float32]) -> tuple[int, int, int]:
    """Writes the absmax of the blocks of a flat piece `raw`, and returns empty sums, as a piece of work does."""
    span = BLOCKS_PER_GROUP * block
    bits, absmax_bits = np.empty((2, span), raw.dtype), np.empty(BLOCKS_PER_GROUP, raw.dtype)
    absmax = np.empty(BLOCKS_PER_GROUP, np.float32)
    for group in range((raw.size + span - 1) // span):
        group_absmax(raw[group * span : (group + 1) * span], kind, mask, block, bits, absmax_bits, absmax)
        place = out[group * BLOCKS_PER_GROUP : (group + 1) * BLOCKS_PER_GROUP]
        for b in range(place.size):
            place[b] = absmax[b]
    return 0, 0, 0


@inner
def quantize_absmax(absmax: NDArray[np.float32], stored: NDArray[np.uint8]) -> tuple[np.float32, np.float32]:
    """Double quantization of one group in place: `absmax` becomes what the reader will restore."""
    low = high = absmax[0]
    for b in range(absmax.size):
        low, high = min(low, absmax[b]), max(high, absmax[b])
    offset = low / _TWO + high / _TWO
    scale = (high - low) / _STEPS
    for b in range(absmax.size):
        stored[b], absmax[b] = affine_step(absmax[b], scale, offset)
    return scale, offset


@inner
def affine_step(absmax: np.float32, scale: np.float32, offset: np.float32) -> tuple[np.uint8, np.float32]:
    """What is stored for the legal value next to `absmax`, and what the reader will restore."""
    divisor = _ONE if scale == _ZERO else scale
    limit = _ZERO if scale == _ZERO else _LIMIT
    step = min(max(np.rint((absmax - offset) / divisor), -limit), limit)
    return np.uint8(np.int32(step) + 128), max(step * scale + offset, _ZERO)


@inner
def dynamic_code(absmax: np.float32, nested: np.float32, offset: np.float32) -> tuple[np.uint8, np.float32]:
    """The code of the legal value next to `absmax`, and what the reader will restore."""
    value = (absmax - offset) * (_ONE / max(nested, NESTED_FLOOR))
    code = 0
    for step in (128, 64, 32, 16, 8, 4, 2, 1):
        code += step if DYNAMIC_MIDPOINTS[code + step - 1] < value else 0
    return np.uint8(code), DYNAMIC_MAP[code] * nested + offset


@inner
def nest_absmax(absmax: NDArray[np.float32], offset: np.float32, stored: NDArray[np.uint8]) -> np.float32:
    """Dynamic double quantization of one group in place: `absmax` becomes what the reader will restore."""
    nested = _ZERO
    for b in range(absmax.size):
        nested = max(nested, abs(absmax[b] - offset))
    for b in range(absmax.size):
        stored[b], absmax[b] = dynamic_code(absmax[b], nested, offset)
    return nested


@inner
def restore_absmax(
    stored: NDArray[np.uint8],
    plain: NDArray[np.float32],
    first: int,
    blocks: int,
    double: int,
    scale: np.float32,
    offset: np.float32,
    absmax: NDArray[np.float32],
) -> None:
    """Writes what the reader restores for the `blocks` of a group from `first` on, and zeros after its last block."""
    for b in range(absmax.size):
        value = _ZERO
        if b < blocks and double == AFFINE:
            value = max((np.float32(stored[first + b]) - _MIDDLE) * scale + offset, _ZERO)
        elif b < blocks and double == DYNAMIC:
            value = DYNAMIC_MAP[stored[first + b]] * scale + offset
        elif b < blocks:
            value = plain[first + b]
        absmax[b] = value


@inner
def inverses(absmax: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """What to multiply a block's values by. 0 where absmax is not positive: every value then gets code 7."""
    for b in range(absmax.size):
        inverse = _ONE / max(absmax[b], ABSMAX_FLOOR)
        out[b] = inverse if absmax[b] > _ZERO else _ZERO


@kernel
def mean_absmax(absmax: NDArray[np.float32]) -> Any:
    """The mean as the format defines it: summed one after the other in float64."""
    total = 0.0
    for b in range(absmax.size):
        total += np.float64(absmax[b])
    return np.float32(total / absmax.size) if absmax.size else _ZERO
