"""Writing one output shard: every byte's place is known from the plan, so tensors may arrive in any order."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

from surogate_formats.dtypes import BITS
from surogate_formats.layouts import StoredTensor
from surogate_quantize.syncing import sync

_SEEKING = threading.Lock()
"""Held where the system has no write at an offset, and threads would move each other's position."""

ALIGNMENT = 256
"""Bytes; the payload starts at a multiple, so that views of large tensors are aligned for vector loads."""


class ShardWriter:
    """A safetensors file under construction; use as a context manager, which closes but does not sync it.

    Tensors are laid out by the size of their elements, largest first, so that each is aligned to its own dtype without
    a hole, and within that in the order given, so that a layer's tensors stay neighbours.

    Args:
        path: the file, which must not exist.
        tensors: what it will hold.
    """

    def __init__(self, path: Path, tensors: Sequence[StoredTensor]) -> None:
        """Writes the header and sizes the file; the payload is a hole until it is written."""
        self.path = path
        header, places = shard_header(tensors)
        self._payloads = {name: _Payload(start, end) for name, (start, end) in places.items()}
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        os.ftruncate(self._file, len(header) + sum(tensor.spec.nbytes for tensor in tensors))
        _write_all(self._file, memoryview(header), 0)

    def __enter__(self) -> ShardWriter:
        """Returns the writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the file."""
        os.close(self._file)

    def append(self, name: str, chunk: memoryview) -> None:
        """Writes what follows in a tensor's payload. Thread-safe for different tensors."""
        payload = self._payloads[name]
        _write_all(self._file, chunk, payload.position)
        payload.digest.update(chunk)
        payload.position += chunk.nbytes

    def digest(self, name: str) -> str:
        """The SHA-256 of a tensor's whole payload, all of which has been written."""
        payload = self._payloads[name]
        if payload.position != payload.end:
            raise AssertionError(f"{name}: wrote {payload.position - payload.end:+} bytes too many")
        return payload.digest.hexdigest()

    def write(self, name: str, chunks: Iterable[memoryview]) -> str:
        """Writes a tensor's payload; returns its SHA-256. Thread-safe for different tensors."""
        for chunk in chunks:
            self.append(name, chunk)
        return self.digest(name)

    def sync(self) -> None:
        """Waits until the disk has the bytes."""
        sync(self._file)


class _Payload:
    """How far a tensor's payload is written."""

    def __init__(self, start: int, end: int) -> None:
        self.position, self.end = start, end
        self.digest = hashlib.sha256()


def shard_header(tensors: Sequence[StoredTensor]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The bytes before a shard's payload, and where in the file each tensor starts and ends."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    ends: dict[str, tuple[int, int]] = {}
    position = 0
    for tensor in sorted(tensors, key=lambda tensor: -BITS[tensor.spec.dtype]):
        end = position + tensor.spec.nbytes
        entries[tensor.name] = {
            "dtype": tensor.spec.dtype,
            "shape": list(tensor.spec.shape),
            "data_offsets": [position, end],
        }
        ends[tensor.name] = (position, end)
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    start = 8 + len(text)
    places = {name: (start + begin, start + end) for name, (begin, end) in ends.items()}
    return len(text).to_bytes(8, "little") + text, places


def _write_all(file: int, data: memoryview, position: int) -> None:
    data = data.cast("B")
    while data.nbytes:
        written = _write_at(file, data, position)
        data, position = data[written:], position + written


def _write_at(file: int, data: memoryview, position: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(file, data, position)
    with _SEEKING:  # Windows
        os.lseek(file, position, os.SEEK_SET)
        return os.write(file, data)
