"""How far a quantized weight is from its source, from sums of integers (`surogate_quantize.kernels.errors`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Sums = tuple[int, int, int]
"""Squared error and squared sum in units, and the float32 bits of the largest error."""


@dataclass(frozen=True)
class Errors:
    """How far a quantized weight is from its source.

    Attributes:
        squared_error: sum of (dequantized - source)^2.
        squared_sum: sum of source^2.
        max_error: the largest |dequantized - source|.
    """

    squared_error: float
    squared_sum: float
    max_error: float

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
    scale = float(unit) ** 2
    worst = np.array([max((worst for _, _, worst in sums), default=0)], np.uint32).view(np.float32)
    return Errors(
        squared_error=sum(int(error) for error, _, _ in sums) / scale,
        squared_sum=sum(int(square) for _, square, _ in sums) / scale,
        max_error=float(worst[0]),
    )
