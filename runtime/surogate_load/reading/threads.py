"""Bytes of files into tensors of the CPU or a GPU, by a few threads; a GPU gets them through pinned buffers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Event

import torch
from torch import Tensor

from surogate_formats.checkpoint.errors import shown
from surogate_formats.checkpoint.files import open_regular, read_at

THREADS = 4

STAGED = 4 << 20
"""Bytes that a thread reads at a time; for a GPU into one of two pinned buffers."""

Progress = Callable[[int], object]
"""Called with the number of bytes that have been read."""


@dataclass(frozen=True)
class Copy:
    """Bytes of a file that fill a tensor.

    Attributes:
        target: uint8 [n], contiguous.
        file: path.
        start: first byte there.
    """

    target: Tensor
    file: str
    start: int


Units = SimpleQueue[list[Copy] | None]
"""What the threads read, then None for each of them."""


def read_copies(copies: Sequence[Copy], device: torch.device, progress: Progress) -> None:
    """Reads all of them; when it returns, every byte is there.

    Args:
        copies: in whatever order; files are read best from front to back.
        device: of all targets, the CPU or a GPU.
        progress: called by the threads.

    Raises:
        TruncatedFileError, UnreadableFileError: a file ends too early, or the disk fails.
    """
    units: Units = SimpleQueue()
    for unit in (*_units(copies), *(None for _ in range(THREADS))):
        units.put(unit)
    failed = Event()
    with ExitStack() as opened, ThreadPoolExecutor(THREADS, "surogate-read") as pool:
        files = _open({copy.file for copy in copies}, opened)
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        work = [pool.submit(_work, units, failed, files, device, stream, progress) for _ in range(THREADS)]
        try:
            for running in work:
                running.result()
        except BaseException:  # Ctrl-C comes here
            failed.set()
            raise


def _open(paths: set[str], opened: ExitStack) -> dict[str, int]:
    files = {}
    for path in sorted(paths):
        files[path] = open_regular(Path(path), shown(path))
        opened.callback(os.close, files[path])
    return files


def _units(copies: Sequence[Copy]) -> Iterator[list[Copy]]:
    """Copies cut and put together to what fits into a buffer."""
    unit: list[Copy] = []
    room = STAGED
    for copy in copies:
        start, total = 0, len(copy.target)
        while start < total:
            count = min(room, total - start)
            unit.append(Copy(copy.target[start : start + count], copy.file, copy.start + start))
            start, room = start + count, room - count
            if not room:
                yield unit
                unit, room = [], STAGED
    if unit:
        yield unit


def _work(
    units: Units,
    failed: Event,
    files: Mapping[str, int],
    device: torch.device,
    stream: torch.cuda.Stream | None,
    progress: Progress,
) -> None:
    lane = None
    try:
        lane = _Lane(device, stream) if stream is not None else None
        read = _read_in_place if lane is None else lane.read
        for unit in iter(units.get, None):
            if failed.is_set():
                return
            read(unit, files)
            progress(sum(len(copy.target) for copy in unit))
    except BaseException:
        failed.set()
        raise
    finally:  # after a failure too: memory that is freed then must not be written any more
        if lane is not None:
            lane.finish()


def _read_in_place(unit: list[Copy], files: Mapping[str, int]) -> None:
    for copy in unit:
        _fill(copy.target, copy, files)


def _fill(buffer: Tensor, copy: Copy, files: Mapping[str, int]) -> None:
    read_at(files[copy.file], buffer.numpy().data, copy.start, shown(copy.file))


class _Lane:
    """What one thread needs to bring bytes to a GPU: while one buffer is copied, the other is filled."""

    def __init__(self, device: torch.device, allocated_on: torch.cuda.Stream) -> None:
        """For targets whose memory another stream may still be busy with."""
        self._buffers = [torch.empty(STAGED, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._events = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(allocated_on)
        self._turn = 0

    def read(self, unit: list[Copy], files: Mapping[str, int]) -> None:
        """Fills a buffer, once it is free, and has it copied."""
        buffer, event = self._buffers[self._turn], self._events[self._turn]
        self._turn = 1 - self._turn
        event.synchronize()
        filled = 0
        with torch.cuda.stream(self._stream):
            for copy in unit:
                piece = buffer[filled : filled + len(copy.target)]
                _fill(piece, copy, files)
                copy.target.copy_(piece, non_blocking=True)
                filled += len(piece)
            event.record()

    def finish(self) -> None:
        """Waits until everything is there."""
        self._stream.synchronize()
