"""The CUDA engine: one weight at a time, byte-equal to the CPU engine, which takes what the device can't."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surogate_formats.format import Format, Parts
from surogate_formats.nf4 import NF4
from surogate_quantize.cuda.device import INDEX, find_gpu, load_module
from surogate_quantize.cuda.errors import device_errors
from surogate_quantize.cuda.formats import QUANTIZERS
from surogate_quantize.cuda.job import Device, Job
from surogate_quantize.cuda.memory import Memory, Uploads
from surogate_quantize.cuda.source import AMAX, CHUNK, THREADS
from surogate_quantize.engine import CpuEngine, check_range, in_last_binade, raise_non_finite
from surogate_quantize.source import Source
from surogate_quantize.weight_errors import Errors, error_unit, total_errors

AMAX_BLOCKS = 1056
"""Thread blocks that look for an amax, at most: eight for each multiprocessor of the largest GPUs of today."""

UPLOADS_SHARE = 4
"""Weights that wait on the device take up to a quarter of the memory that is free at the start."""

WEIGHT_SHARE = 2
"""A weight that needs more than half of what is then free, its parts included, goes to the CPU engine whole."""


class CudaEngine:
    """Quantizes weights on the first visible GPU; use as a context manager.

    Args:
        fmt: the format whose kernels are loaded at once; those of others are when they are first needed.
        workers: threads of the CPU engine, for weights that are too large for the GPU's memory.

    Raises:
        NoCudaError: CuPy can't be used, or there is no GPU for it.
    """

    def __init__(self, fmt: Format, workers: int | None = None) -> None:
        """Loads the kernels."""
        self.device = find_gpu()
        self._functions: dict[str, Any] = {}
        self._loaded: set[str] = set()
        self._own = threading.local()
        self._cpu = CpuEngine(workers)
        self._memory = Memory()
        with self._on_device():
            self._load("amax")
            if fmt.name in QUANTIZERS:
                self._load(QUANTIZERS[fmt.name].module)
            self._uploads = Uploads(self._memory.free() // UPLOADS_SHARE)

    def __enter__(self) -> CudaEngine:
        """Returns the engine itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the threads and gives the memory back."""
        self._cpu.__exit__(kind, error, trace)
        self._uploads.clear()
        self._memory.close()

    def host_memory(self, size: int) -> NDArray[np.uint8]:
        """uint8 [size], pinned where the system allows it."""
        with self._on_device():
            return self._memory.on_host(size)

    def amax(self, source: Source) -> np.float32:
        """See `Engine`. The weight stays on the device until `quantize` takes it, if there is room."""
        if not self._fits(source, source.raw.nbytes):
            return self._cpu.amax(source)
        with self._on_device() as device:
            weight = np.ascontiguousarray(source.raw)
            raw = device.upload(weight)
            found = device.zeros(4)
            blocks = min(-(-source.raw.size // (THREADS * CHUNK)), AMAX_BLOCKS)
            device.launch(f"amax_{source.dtype}", blocks, AMAX.pack(raw.ptr, source.raw.size, found.ptr))
            bits = device.download(found, 4).view(np.uint32).astype(source.raw.dtype)
        if bits[0] >= source.infinity:
            raise_non_finite(source)
        self._uploads.put(source, raw)
        return np.float32(source.magnitudes(bits)[0])

    def block_absmax(self, fmt: NF4, source: Source) -> NDArray[np.float32]:
        """See `Engine`."""
        return self._cpu.block_absmax(fmt, source)

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
        raw = self._uploads.take(source)
        quantizer = QUANTIZERS.get(fmt.name)
        size = sum(spec.nbytes for spec in fmt.part_specs(source.raw.shape).values())
        size += source.raw.nbytes if raw is None else 0
        if quantizer is None or not quantizer.knows(fmt) or not self._fits(source, size):
            return self._cpu.quantize(fmt, source, own_amax, group_amax, absmax_mean, search=search)
        unit = error_unit(own_amax)
        with self._on_device() as device:
            self._load(quantizer.module)
            weight = np.ascontiguousarray(source.raw)
            job = Job(device, fmt, source, device.upload(weight) if raw is None else raw, unit)
            amax = own_amax if group_amax is None else group_amax
            known = quantizer.run(job, fmt, amax, search and not in_last_binade(source, own_amax))
            parts, errors = job.parts(known), total_errors(job.sums(), unit)
        check_range(fmt, parts, source, own_amax)
        return parts, errors

    def _fits(self, source: Source, size: int) -> bool:
        """Whether the device takes a weight that needs `size` bytes; no empty one: a grid can't be empty."""
        with self._on_device():
            return source.raw.size > 0 and size <= self._memory.free() // WEIGHT_SHARE

    def _load(self, module: str) -> None:
        if module not in self._loaded:
            self._functions.update(load_module(module))
            self._loaded.add(module)

    @contextmanager
    def _on_device(self) -> Iterator[Device]:
        """Work on the GPU from this thread, on a stream of its own: one weight goes up while another comes down."""
        import cupy

        with device_errors(self.device), cupy.cuda.Device(INDEX):
            if not hasattr(self._own, "stream"):
                self._own.stream = cupy.cuda.Stream(non_blocking=True)
            with self._own.stream:
                yield Device(self._memory, self._own.stream, self._functions)
