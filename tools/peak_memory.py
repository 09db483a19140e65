"""The most memory that a piece of work takes, on the host and on a GPU."""

import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch

EVERY = 0.01
"""Seconds between two looks at the GPU."""

_RESET_PEAK = "5"
"""What /proc/self/clear_refs takes for: the peak starts again from the present size (proc(5))."""


class PeakMemory:
    """Measures the work inside a `with` block; whatever was held before doesn't count.

    Args:
        device: `cpu` or `cuda`.

    Attributes:
        gigabytes: afterwards, by kind: `host`, the resident memory; with a GPU `gpu`, what torch's allocator gave out,
            and `card`, what was gone of the whole card (other allocators and caches, too), looked at every 10 ms.
    """

    def __init__(self, device: str) -> None:
        self.gigabytes: dict[str, float] = {}
        self._gpu = device.startswith("cuda")
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        """Starts to look."""
        with suppress(OSError):  # then the peak is that of the whole process
            Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
        self._resident = _resident("VmRSS")
        if self._gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._allocated, self._free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
            self._least = self._free
            self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Notes what was taken."""
        taken = {"host": _resident("VmHWM") - self._resident}
        if self._gpu:
            self._over.set()
            self._watcher.join()
            taken |= {"gpu": torch.cuda.max_memory_allocated() - self._allocated, "card": self._free - self._least}
        self.gigabytes = {name: round(size / 1e9, 3) for name, size in taken.items()}

    def _watch(self) -> None:
        while not self._over.wait(EVERY):
            self._least = min(self._least, torch.cuda.mem_get_info()[0])


def _resident(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024
