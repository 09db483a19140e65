"""Which values the parts of a packed weight may hold; others stand for no weight, however whole the file is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surogate_formats.format import Format
from surogate_formats.fp8 import FP8
from surogate_formats.layouts.bitsandbytes import BitsandbytesLayout, map_error
from surogate_formats.nvfp4 import NVFP4

_LARGEST = float(np.finfo(np.float32).max)

# A scale is rounded, to bfloat16 upwards: that of the largest float32 is up to 2^-7 larger than its 448th part.
_FP8_REACH = 448 * (1 - 2.0**-6)
# A global scale aims at 256 times 6, and is rounded down to a power of two.
_FP4_REACH = 256 * 6 / 2 * (1 - 2.0**-6)

Values = NDArray[Any]


@dataclass(frozen=True)
class PartRule:
    """What the values of a part must be.

    Attributes:
        wanted: in words.
        wrong: which of an array's values, flattened, are something else.
    """

    wanted: str
    wrong: Callable[[Values], NDArray[np.bool_]]


def part_rules(fmt: Format, layout: str, *, strict: bool) -> dict[str, PartRule]:
    """The rules of a format's parts by the keys of its layout; parts without one take every value.

    Args:
        fmt: the format.
        layout: the layout's name.
        strict: refuse scales of zero that surogate-quant never writes, and others do for weights of zeros.
    """
    if isinstance(fmt, FP8):
        above = PartRule("a number above 0, and 448 times it finite", _outside(_LARGEST / _FP8_REACH))
        scale = above if strict else PartRule("a number not below 0", _outside(_LARGEST, zero=True))
        return {"codes": _CODES, "scale": scale, "input_scale": PartRule("a number above 0", _outside(_LARGEST))}
    if isinstance(fmt, NVFP4):
        if fmt.step == "divide":
            globally = PartRule("a divisor that keeps every value finite", _outside(_LARGEST, _FP4_REACH / _LARGEST))
        else:
            wrong = _outside(_LARGEST / _FP4_REACH, zero=not strict)
            globally = PartRule("a factor that keeps every value finite", wrong)
        return {"scale": _BLOCK_SCALES, "global_scale": globally}
    magnitude = PartRule("a number not below 0", _outside(_LARGEST, zero=True))
    rules = dict.fromkeys(("absmax_scale", "absmax_offset", "nested_absmax"), magnitude)
    if fmt.part_specs((1, 1))["absmax"].dtype == "F32":
        rules["absmax"] = magnitude
    if layout == BitsandbytesLayout.name:
        rules |= {key: _table(key) for key in ("quant_map", "nested_quant_map")}
    return rules


def _outside(high: float, low: float = 0.0, *, zero: bool = False) -> Callable[[Values], NDArray[np.bool_]]:
    """Which values are not in (low, high], or [low, high]; a NaN is in neither."""

    def outside(values: Values) -> NDArray[np.bool_]:
        numbers = values.astype(np.float64)
        above = numbers >= low if zero else numbers > low
        wrong: NDArray[np.bool_] = ~(above & (numbers <= high))
        return wrong

    return outside


def _nan_codes(values: Values) -> NDArray[np.bool_]:
    codes = values.view(np.uint8)
    nan: NDArray[np.bool_] = (codes & 0x7F) == 0x7F
    return nan


def _bad_block_scales(values: Values) -> NDArray[np.bool_]:
    # Every code from 0x7F is NaN or has the sign bit.
    return values.view(np.uint8) >= 0x7F


def _table(key: str) -> PartRule:
    return PartRule(f"the {key} of bitsandbytes", lambda values: map_error(key, values))


_CODES = PartRule("an E4M3 number", _nan_codes)
_BLOCK_SCALES = PartRule("an E4M3 number not below 0", _bad_block_scales)
