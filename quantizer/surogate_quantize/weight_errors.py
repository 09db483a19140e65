"""How far a quantized weight is from its source, from sums of integers (`surogate_quantize.kernels.errors`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_VALUES = 2**18
"""Values whose squares in units are sure to add up to less than 2^63."""

Sums = tuple[int, int, int]
"""Squared error and squared sum in units, and the float32 bits of the largest error."""


@dataclass(frozen=True)
class Errors:
    """How far a quantized weight is from its source; exact sums, so those of its bands add up to it.

    Attributes:
        error, square: sum of (dequantized - source)^2 and of source^2, in squared units.
        unit: error units in 1 (`error_unit`).
        max_error: the largest |dequantized - source|.
    """

    error: int
    square: int
    unit: float
    max_error: float

    def __add__(self, other: Errors) -> Errors:
        """The errors of two bands of one weight together."""
        worst = max(self.max_error, other.max_error)
        return Errors(self.error + other.error, self.square + other.square, self.unit, worst)

    @property
    def squared_error(self) -> float:
        """Sum of (dequantized - source)^2."""
        return self.error / self.unit**2

    @property
    def squared_sum(self) -> float:
        """Sum of source^2."""
        return self.square / self.unit**2

    @property
    def relative(self) -> float:
        """||dequantized - source|| / ||source|| (Frobenius); 0 for an all-zero source."""
        return math.sqrt(self.squared_error / self.squared_sum) if self.squared_sum else 0.0


def error_unit(amax: np.float32) -> np.float32:
    """Error units in 1 for a weight with this largest magnitude; a power of two, so that it scales exactly."""
    if amax == 0:
        return np.float32(1)
    _, exponent = math.frexp(float(amax))
    return np.float32(2.0 ** min(max(21 - exponent, -126), 126))


def total_errors(sums: Sequence[Sums], unit: np.float32) -> Errors:
    """The errors of a weight from the sums over its pieces; however it was cut, the result is the same."""
    worst = np.array([max((worst for _, _, worst in sums), default=0)], np.uint32).view(np.float32)
    error, square = sum(int(error) for error, _, _ in sums), sum(int(square) for _, square, _ in sums)
    return Errors(error, square, float(unit), float(worst[0]))


def measured_errors(values: NDArray[np.float32], source: NDArray[np.float32], amax: np.float32) -> Errors:
    """The errors of a band [N, K] whose dequantized values are at hand, in units of its whole weight's `amax`."""
    unit = error_unit(amax)
    error = square = 0
    worst = 0.0
    for start in range(0, len(source), rows := max(_VALUES // max(source.shape[1], 1), 1)):
        band = slice(start, start + rows)
        missed = values[band].astype(np.float64) - source[band]
        error += _units(missed, unit)
        square += _units(source[band].astype(np.float64), unit)
        worst = max(worst, float(np.abs(missed).max(initial=0)))
    return Errors(error, square, float(unit), worst)


def _units(values: NDArray[np.float64], unit: np.float32) -> int:
    whole = np.rint(values * float(unit)).astype(np.int64)
    return int((whole * whole).sum())
