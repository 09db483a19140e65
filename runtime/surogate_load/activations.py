"""Activations on disk: more than memory holds, and what an interrupted pass goes on from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor


class Activations:
    """A file of equal batches of activations, written and read one batch at a time.

    Args:
        path: the file; made if it isn't there.
        shape: of a batch.
        count: of batches.
        dtype: of the values.
        device: where batches that are read go.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, ...],
        count: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        """Opens the file."""
        self.path, self._shape, self.count, self._dtype = path, shape, count, dtype
        self._device = device or torch.device("cpu")
        self._size = torch.Size(shape).numel() * dtype.itemsize
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)

    @property
    def whole(self) -> bool:
        """Whether the file has the size of all batches."""
        return os.fstat(self._file).st_size == self._size * self.count

    def write(self, index: int, batch: Tensor) -> None:
        """Writes a batch."""
        values = self._staging.copy_(batch) if batch.is_cuda else batch.to("cpu", self._dtype).contiguous()
        data = values.view(torch.uint8).numpy().reshape(-1).data
        position = index * self._size
        while data.nbytes:
            written = os.pwrite(self._file, data, position)
            data, position = data[written:], position + written

    def read(self, index: int) -> Tensor:
        """A batch."""
        on_gpu = self._device.type == "cuda"
        batch = self._staging if on_gpu else torch.empty(self._shape, dtype=self._dtype)
        data = batch.view(torch.uint8).numpy().reshape(-1).data
        position = index * self._size
        while data.nbytes:
            got = os.preadv(self._file, [data], position)
            if got == 0:
                raise EOFError(f"{self.path}: ends early")
            data, position = data[got:], position + got
        return batch.to(self._device)

    @cached_property
    def _staging(self) -> Tensor:
        """Memory that a GPU copies to and from at its full speed, and that is had from the system once."""
        return torch.empty(self._shape, dtype=self._dtype, pin_memory=True)

    def __iter__(self) -> Iterator[Tensor]:
        """All batches in order."""
        return (self.read(index) for index in range(self.count))
