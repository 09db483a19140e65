"""What engines have in common, and the CPU engine: one weight at a time with all its threads, as `Format.quantize`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from surogate_formats.dtypes import NUMPY
from surogate_formats.errors import NonFiniteWeightError, OutOfRangeError
from surogate_formats.format import Format, Parts
from surogate_formats.nf4 import NF4
from surogate_quantize.pieces import PIECE, Shared, Work, cut, cut_absmax
from surogate_quantize.source import Source
from surogate_quantize.weight_errors import Errors, Sums, error_unit, total_errors


class Engine(Protocol):
    """What quantizes weights; a context manager. All engines give the same bytes and the same errors."""

    @property
    def device(self) -> str:
        """`cpu`, or `cuda:0` and the GPU's name."""
        ...

    def __enter__(self) -> Engine:
        """Returns the engine itself."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives back threads and memory."""
        ...

    def host_memory(self, size: int) -> NDArray[np.uint8]:
        """uint8 [size] to read weights into, from where the engine takes them fastest."""
        ...

    def amax(self, source: Source) -> np.float32:
        """The largest magnitude of a weight.

        Raises:
            NonFiniteWeightError: a NaN or an infinity; the message gives its first index.
        """
        ...

    def block_absmax(self, fmt: NF4, source: Source) -> NDArray[np.float32]:
        """float32 [blocks] of a finite piece of a weight that starts with a block; on the CPU whatever the engine."""
        ...

    def quantize(
        self,
        fmt: Format,
        source: Source,
        own_amax: np.float32,
        group_amax: np.float32 | None = None,
        absmax_mean: np.float32 | None = None,
        *,
        search: bool = False,
    ) -> tuple[Parts, Errors]:
        """Quantizes a finite weight, or a band of its rows (`Format.band_rows`).

        Args:
            fmt: the format.
            source: the weight [N, K], or the band.
            own_amax: the weight's largest magnitude.
            group_amax: the largest magnitude of its fused group, where the format shares it.
            absmax_mean: of a band's whole weight, for NF4 with dynamic double quantization (`CpuEngine.block_absmax`).
            search: take the better of several scales a block (`Format.quantize`). A weight that reaches the last binade
                of its dtype is rounded to nearest nevertheless: a dequantized value might not be finite there.

        Raises:
            OutOfRangeError: a dequantized value would not be finite in the source's dtype.
        """
        ...


class CpuEngine:
    """A pool of threads that quantizes weights piece by piece; use as a context manager.

    Args:
        workers: threads; None takes one for each CPU that the process may use.
    """

    device = "cpu"

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

    def host_memory(self, size: int) -> NDArray[np.uint8]:
        """uint8 [size]."""
        return np.empty(size, np.uint8)

    def amax(self, source: Source) -> np.float32:
        """See `Engine`."""
        from surogate_quantize.kernels.source import largest_bits

        flat, mask = source.raw.reshape(-1), source.mask
        pieces = [flat[start : start + PIECE] for start in range(0, flat.size, PIECE)]
        bits = max(self._pool.map(lambda piece: int(largest_bits(piece, mask)), pieces), default=0)
        if bits >= source.infinity:
            raise_non_finite(source)
        return np.float32(source.magnitudes(np.array([bits], source.raw.dtype))[0])

    def quantize(
        self,
        fmt: Format,
        source: Source,
        own_amax: np.float32,
        group_amax: np.float32 | None = None,
        absmax_mean: np.float32 | None = None,
        *,
        search: bool = False,
    ) -> tuple[Parts, Errors]:
        """See `Engine`."""
        unit = error_unit(own_amax)
        search = search and not in_last_binade(source, own_amax)
        shared = Shared(own_amax if group_amax is None else group_amax, unit, absmax_mean, search)
        parts, stages = cut(fmt, source, shared)
        errors = total_errors([sums for pieces in stages for sums in self._run(pieces)], unit)
        check_range(fmt, parts, source, own_amax)
        return parts, errors

    def block_absmax(self, fmt: NF4, source: Source) -> NDArray[np.float32]:
        """See `Engine`."""
        absmax = np.empty(-(-source.raw.size // fmt.block_size), np.float32)
        self._run(cut_absmax(fmt, source, absmax))
        return absmax

    def _run(self, pieces: Sequence[Work]) -> list[Sums]:
        return list(self._pool.map(lambda work: work(), pieces))


def available_cpus() -> int:
    """CPUs that this process may run on (affinity, not the machine's count)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def raise_non_finite(source: Source) -> None:
    """Raises the `NonFiniteWeightError` of the first NaN or infinity of a weight."""
    for row in range(source.raw.shape[0]):
        line = source.raw[row : row + 1].view(NUMPY[source.dtype]).astype(np.float32)
        if not np.isfinite(line).all():
            column = int(np.argmin(np.isfinite(line)))
            raise NonFiniteWeightError(f"[{row}, {column}] is {line[0, column]}")


def check_range(fmt: Format, parts: Parts, source: Source, amax: np.float32) -> None:
    """Raises `OutOfRangeError` unless every dequantized value is finite in the source's dtype.

    Rounding up can pass the dtype's end only from its last binade, so only there the values are looked at.
    """
    if not in_last_binade(source, amax):
        return
    dtype = NUMPY[source.dtype]
    with np.errstate(over="ignore", invalid="ignore"):
        values = fmt.dequantize(parts, source.raw.shape)
        finite = np.isfinite(values.astype(dtype)).all()
    if not finite:
        raise OutOfRangeError(f"its largest magnitude {amax} dequantizes to no finite {source.dtype} value")


def in_last_binade(source: Source, amax: np.float32) -> bool:
    """Whether the largest magnitude of a weight is more than half of what its dtype can hold."""
    limit = float(source.magnitudes(np.array([source.infinity - 1], source.raw.dtype))[0])
    return float(amax) >= limit / 2
