"""Which engine quantizes: the choice behind `--device`."""

from __future__ import annotations

import warnings

from surogate_formats.errors import UsageError
from surogate_formats.format import Format
from surogate_quantize.cuda.engine import CudaEngine
from surogate_quantize.cuda.errors import CudaError
from surogate_quantize.engine import CpuEngine, Engine

DEVICES = ("auto", "cpu", "cuda")
"""What `device` may be."""


class UnknownDeviceError(UsageError):
    """`device` is none that there is."""


def open_engine(device: str, fmt: Format, workers: int | None = None) -> Engine:
    """The engine for a device.

    Args:
        device: one of `DEVICES`. `auto` is `cuda` where that works without an error or a warning, else `cpu`.
        fmt: the format to be quantized to; its kernels are loaded before anything is written.
        workers: threads on the CPU; None takes one a CPU.

    Raises:
        UnknownDeviceError: another device.
        NoCudaError: `cuda` can't be used; the message says why.
    """
    if device not in DEVICES:
        raise UnknownDeviceError(f"`device` is {device!r}; choose one of {', '.join(DEVICES)}")
    if device == "cuda":
        return CudaEngine(fmt, workers)
    return (_cuda_in_silence(fmt, workers) if device == "auto" else None) or CpuEngine(workers)


def _cuda_in_silence(fmt: Format, workers: int | None) -> Engine | None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("ignore")
        for doubt in (UserWarning, RuntimeWarning):
            warnings.simplefilter("always", doubt)
        try:
            engine = CudaEngine(fmt, workers)
        except CudaError:
            return None
    if not warned:
        return engine
    engine.__exit__(None, None, None)
    return None
