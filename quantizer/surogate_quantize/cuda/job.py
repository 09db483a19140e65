"""One weight on the device: launches its format's kernels, and brings the parts and the errors back."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surogate_formats.dtypes import NUMPY
from surogate_formats.format import Format, Parts
from surogate_quantize.cuda.device import Functions
from surogate_quantize.cuda.memory import Memory
from surogate_quantize.cuda.source import LEDGER, THREADS, TOTALS
from surogate_quantize.source import Source
from surogate_quantize.weight_errors import Sums

VALUES_PER_TOTAL = 2**20
"""Values whose squares in units are sure to add up to less than 2^63."""

ALIGNMENT = 256
"""Bytes; of each part in the memory that holds all."""


@dataclass(frozen=True)
class Device:
    """What a job needs of the engine: the memory, the stream that all its work goes to, and the kernels."""

    memory: Memory
    stream: Any
    functions: Functions

    def copy(self, target: int, origin: int, size: int) -> None:
        """Copies between addresses on the device or the host; done when the stream is synchronized."""
        from cupy.cuda import runtime

        runtime.memcpyAsync(target, origin, size, runtime.memcpyDefault, self.stream.ptr)

    def upload(self, array: NDArray[Any]) -> Any:
        """A copy of a contiguous array, which must not change before the stream is synchronized."""
        memory = self.memory.on_device(array.nbytes)
        self.copy(memory.ptr, array.ctypes.data, array.nbytes)
        return memory

    def download(self, memory: Any, size: int) -> NDArray[np.uint8]:
        """The first `size` bytes of what is on the device when all work before this is done."""
        host = self.memory.on_host(size)
        self.copy(host.ctypes.data, memory.ptr, size)
        self.stream.synchronize()
        return host

    def zeros(self, size: int) -> Any:
        """Memory filled with zero bytes."""
        memory = self.memory.on_device(size)
        memory.memset_async(0, size, self.stream)
        return memory

    def launch(self, kernel: str, blocks: int, *arguments: bytes) -> None:
        """Launches a kernel with `THREADS` threads a block; each argument is passed by value."""
        from cupy.cuda.function import CPointer

        buffers = [ctypes.create_string_buffer(argument, len(argument)) for argument in arguments]
        pointers = tuple(CPointer(ctypes.addressof(buffer)) for buffer in buffers)
        self.functions[kernel]((blocks, 1, 1), (THREADS, 1, 1), pointers, 0, self.stream)


class Job:
    """A weight that is being quantized.

    Attributes:
        device: where.
        source: the weight on the host.
        raw: its copy on the device.
        address: part name to its address on the device.
    """

    def __init__(self, device: Device, fmt: Format, source: Source, raw: Any, unit: np.float32) -> None:
        """Allocates all parts in one piece, which comes down in one copy."""
        self.device, self.source, self.raw = device, source, raw
        self._unit = unit
        self._specs = fmt.part_specs(source.raw.shape)
        starts = np.cumsum([0, *(-(-spec.nbytes // ALIGNMENT) * ALIGNMENT for spec in self._specs.values())])
        self._starts = {part: int(start) for part, start in zip(self._specs, starts, strict=False)}
        self._size = int(starts[-1])
        self._parts = device.memory.on_device(self._size)
        self._totals: Any = None
        self._pieces = 0
        self.address = {part: self._parts.ptr + start for part, start in self._starts.items()}

    def launch(self, kernel: str, blocks: int, *arguments: bytes) -> None:
        """Launches the kernel for the source's dtype; the weight is its first argument."""
        self.device.launch(f"{kernel}_{self.source.dtype}", blocks, _address(self.raw), *arguments)

    def quantize(self, kernel: str, blocks: int, values_each: int, *arguments: bytes) -> None:
        """Launches a kernel that adds up its errors; a thread block takes up to `values_each` values."""
        blocks_each = VALUES_PER_TOTAL // values_each
        self._pieces = -(-blocks // blocks_each)
        self._totals = self.device.zeros(self._pieces * TOTALS.size)
        self.launch(kernel, blocks, *arguments, LEDGER.pack(self._totals.ptr, blocks_each, float(self._unit)))

    def parts(self, known: Mapping[str, NDArray[Any]]) -> Parts:
        """The parts, those that the host knows put in."""
        host = self.device.download(self._parts, self._size)
        parts: Parts = {}
        for part, spec in self._specs.items():
            start = self._starts[part]
            parts[part] = host[start : start + spec.nbytes].view(NUMPY[spec.dtype]).reshape(spec.shape)
        for part, array in known.items():
            parts[part][...] = array
        return parts

    def sums(self) -> list[Sums]:
        """The sums of errors, a piece of the weight each."""
        data = self.device.download(self._totals, self._pieces * TOTALS.size)
        return [(error, square, worst) for error, square, worst, _ in TOTALS.iter_unpack(data.data)]


def _address(memory: Any) -> bytes:
    return int(memory.ptr).to_bytes(8, "little")
