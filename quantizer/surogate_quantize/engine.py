"""The CPU engine: quantizes one weight at a time with all its threads, byte-equal to `Format.quantize`."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from surogate_formats.dtypes import NUMPY
from surogate_formats.errors import NonFiniteWeightError, OutOfRangeError
from surogate_formats.format import Format, Parts
from surogate_quantize.pieces import PIECE, Source, Sums, Work, cut


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


class CpuEngine:
    """A pool of threads that quantizes weights piece by piece; use as a context manager.

    Args:
        workers: threads; None takes one for each CPU that the process may use.
    """

    def __init__(self, workers: int | None = None) -> None:
        """Starts no thread before there is work."""
        self.workers = workers or available_cpus()
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="quantize")

    def __enter__(self) -> CpuEngine:
        """Returns the engine itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the threads."""
        self._pool.shutdown(cancel_futures=True)

    def amax(self, source: Source) -> np.float32:
        """The largest magnitude of a weight.

        Raises:
            NonFiniteWeightError: a NaN or an infinity; the message gives its first index.
        """
        from surogate_quantize.kernels.source import largest_bits

        flat, mask = source.raw.reshape(-1), source.mask
        pieces = [flat[start : start + PIECE] for start in range(0, flat.size, PIECE)]
        bits = max(self._pool.map(lambda piece: int(largest_bits(piece, mask)), pieces), default=0)
        if bits >= source.infinity:
            _raise_non_finite(source)
        return np.float32(source.magnitudes(np.array([bits], source.raw.dtype))[0])

    def quantize(
        self, fmt: Format, source: Source, own_amax: np.float32, group_amax: np.float32 | None = None
    ) -> tuple[Parts, Errors]:
        """Quantizes a finite weight.

        Args:
            fmt: the format.
            source: the weight [N, K].
            own_amax: its largest magnitude.
            group_amax: the largest magnitude of its fused group, where the format shares it.

        Raises:
            OutOfRangeError: a dequantized value would not be finite in the source's dtype.
        """
        unit = error_unit(own_amax)
        amax = own_amax if group_amax is None else group_amax
        parts, pieces = cut(fmt, source, amax, unit)
        errors = _total(self._run(pieces), unit)
        _check_range(fmt, parts, source, own_amax)
        return parts, errors

    def _run(self, pieces: Sequence[Work]) -> list[Sums]:
        return list(self._pool.map(lambda work: work(), pieces))


def available_cpus() -> int:
    """CPUs that this process may run on (affinity, not the machine's count)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def error_unit(amax: np.float32) -> np.float32:
    """Error units in 1 for a weight with this largest magnitude; a power of two, so that it scales exactly."""
    if amax == 0:
        return np.float32(1)
    _, exponent = math.frexp(float(amax))
    return np.float32(2.0 ** min(max(21 - exponent, -126), 126))


def _total(sums: Sequence[Sums], unit: np.float32) -> Errors:
    scale = float(unit) ** 2
    worst = np.array([max((worst for _, _, worst in sums), default=0)], np.uint32).view(np.float32)
    return Errors(
        squared_error=sum(int(error) for error, _, _ in sums) / scale,
        squared_sum=sum(int(square) for _, square, _ in sums) / scale,
        max_error=float(worst[0]),
    )


def _raise_non_finite(source: Source) -> None:
    for row in range(source.raw.shape[0]):
        line = source.raw[row : row + 1].view(NUMPY[source.dtype]).astype(np.float32)
        if not np.isfinite(line).all():
            column = int(np.argmin(np.isfinite(line)))
            raise NonFiniteWeightError(f"[{row}, {column}] is {line[0, column]}")


def _check_range(fmt: Format, parts: Parts, source: Source, amax: np.float32) -> None:
    """Rounding up can pass the dtype's end only from its last binade, so only there the values are looked at."""
    dtype = NUMPY[source.dtype]
    limit = float(source.magnitudes(np.array([source.infinity - 1], source.raw.dtype))[0])
    if float(amax) < limit / 2:
        return
    with np.errstate(over="ignore", invalid="ignore"):
        values = fmt.dequantize(parts, source.raw.shape)
        finite = np.isfinite(values.astype(dtype)).all()
    if not finite:
        raise OutOfRangeError(f"its largest magnitude {amax} dequantizes to no finite {source.dtype} value")
