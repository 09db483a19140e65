"""The engine's memory: on the device, and on the host where the device reaches it directly."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surogate_quantize.source import Source


class Memory:
    """Pools of the engine's own, so that closing it gives everything back."""

    def __init__(self) -> None:
        """Allocates nothing yet."""
        import cupy

        self._runtime = cupy.cuda.runtime
        self._device = cupy.cuda.MemoryPool()
        self._pinned = cupy.cuda.PinnedMemoryPool()

    def on_device(self, size: int) -> Any:
        """A `MemoryPointer` to `size` bytes, aligned to 512, for work on the current stream."""
        return self._device.malloc(size)

    def on_host(self, size: int) -> NDArray[np.uint8]:
        """uint8 [size], pinned where the system allows it: copies then run at the full speed of the bus."""
        if size == 0:
            return np.empty(0, np.uint8)
        try:
            return np.frombuffer(self._pinned.malloc(size), np.uint8, size)
        except self._runtime.CUDARuntimeError:
            return np.empty(size, np.uint8)

    def free(self) -> int:
        """Bytes that `on_device` could give."""
        free, _ = self._runtime.memGetInfo()
        return int(free) + int(self._device.free_bytes())

    def close(self) -> None:
        """Gives back what nobody holds."""
        self._device.free_all_blocks()
        self._pinned.free_all_blocks()


class Uploads:
    """Weights that stay on the device from the search for their largest magnitude until they are quantized.

    A weight is known by its `Source` object, never by where that stands: buffers are used again.
    """

    def __init__(self, limit: int) -> None:
        """Holds up to `limit` bytes."""
        self._limit = limit
        self._held: dict[int, tuple[weakref.ref[Source], Any, int]] = {}
        self._lock = threading.Lock()

    def put(self, source: Source, memory: Any) -> None:
        """Holds a weight's copy, if there is room, until it is taken or the source is gone."""
        size = source.raw.nbytes
        with self._lock:
            self._held = {key: entry for key, entry in self._held.items() if entry[0]() is not None}
            if size + sum(held for _, _, held in self._held.values()) <= self._limit:
                self._held[id(source)] = weakref.ref(source), memory, size

    def take(self, source: Source) -> Any | None:
        """The copy of a weight, which is then the caller's; None if it isn't held."""
        with self._lock:
            entry = self._held.get(id(source))
            if entry is None or entry[0]() is not source:
                return None
            return self._held.pop(id(source))[1]

    def clear(self) -> None:
        """Lets go of all."""
        with self._lock:
            self._held.clear()
