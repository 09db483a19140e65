"""Launching a kernel on torch's current stream in a few microseconds of host time."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import torch

from surogate_load.kernels.source import LANES, LAUNCH, WARPS, WEIGHT

_Sides = tuple[int, int, int]

_BLOCK: _Sides = (LANES * WARPS, 1, 1)


class _Stream:
    """What CuPy reads of a stream."""

    __slots__ = ("ptr",)

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


class _Arguments(threading.local):
    """A thread's `Launch` structure: CuPy passes what the pointer points to by value.

    A numpy array would be passed by value too, but CuPy takes microseconds to find its address.
    """

    def __init__(self) -> None:
        from cupy.cuda.function import CPointer

        buffer = ctypes.create_string_buffer(LAUNCH.size + WEIGHT.size)
        self.bytes = memoryview(buffer).cast("B")
        self.pointers = (CPointer(ctypes.addressof(buffer)),)


_arguments: _Arguments | None = None


def launch_weight(function: Any, device: int, tiles: int, out: int, weight: bytes) -> None:
    """Dequantizes one weight.

    Args:
        function: the kernel on the device.
        device: index of the CUDA device.
        tiles: thread blocks.
        out: address of the result.
        weight: a packed `WEIGHT`.
    """
    arguments = _of_this_thread()
    arguments.bytes[:] = LAUNCH.pack(out, 0, 0, 0) + weight
    _launch(function, device, (tiles, 1, 1), _BLOCK, arguments)


def launch_group(function: Any, device: int, tiles: int, out: int, weights: int, first_tiles: int, size: int) -> None:
    """Dequantizes `size` weights that stand in a table on the device.

    Args:
        function: the kernel on the device.
        device: index of the CUDA device.
        tiles: thread blocks of all weights together.
        out: address of the results.
        weights: address of the table, `WEIGHT` after `WEIGHT`.
        first_tiles: address of each weight's first thread block, uint32.
        size: how many weights.
    """
    arguments = _of_this_thread()
    LAUNCH.pack_into(arguments.bytes, 0, out, weights, first_tiles, size)
    _launch(function, device, (tiles, 1, 1), _BLOCK, arguments)


def launch(function: Any, device: int, blocks: int, threads: int, packed: bytes) -> None:
    """Launches a kernel that takes one structure by value, at most as long as a `Launch`.

    Args:
        function: the kernel on the device.
        device: index of the CUDA device.
        blocks: of the grid.
        threads: of a block.
        packed: the structure.
    """
    arguments = _of_this_thread()
    arguments.bytes[: len(packed)] = packed
    _launch(function, device, (blocks, 1, 1), (threads, 1, 1), arguments)


def _of_this_thread() -> _Arguments:
    global _arguments  # noqa: PLW0603  (made on first use: CuPy need not be installed)
    if _arguments is None:
        _arguments = _Arguments()
    return _arguments


def _launch(function: Any, device: int, grid: _Sides, block: _Sides, arguments: _Arguments) -> None:
    stream = _Stream(torch._C._cuda_getCurrentRawStream(device))
    if torch._C._cuda_getDevice() == device:
        function(grid, block, arguments.pointers, 0, stream)
        return
    with torch.cuda.device(device):
        function(grid, block, arguments.pointers, 0, stream)
