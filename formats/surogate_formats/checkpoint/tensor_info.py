"""One tensor's entry in a safetensors header, and how all of them must tile the file."""

from __future__ import annotations

import math
import ntpath
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

from surogate_formats.checkpoint.errors import (
    HoleError,
    OffsetsError,
    OverlapError,
    PartialByteError,
    ShapeError,
    SizeMismatchError,
    TensorEntryError,
    TensorNameError,
    TrailingBytesError,
    UnknownDtypeError,
    quoted,
)
from surogate_formats.checkpoint.files import truncated
from surogate_formats.dtypes import BITS

MAX_NAME_SIZE = 1024
"""Longest tensor name accepted, in bytes of UTF-8."""
MAX_DIMENSIONS = 64
"""Most dimensions of a tensor: the limit of numpy and torch."""

_LIMIT = 2**63  # file offsets and numpy sizes are signed 64-bit
_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor stands in its file: bytes `start` up to `end`, counted from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.start


def parse_entry(name: str, entry: object, base: int, file: str) -> TensorInfo:
    """Check one entry of a header.

    Args:
        name: The tensor's name.
        entry: The JSON value under that name.
        base: File offset of the first tensor in bytes; `data_offsets` count from there.
        file: What the error messages name.

    Raises:
        TensorNameError: The name is empty, too long, unprintable or a path.
        TensorEntryError: The keys are not exactly dtype, shape and data_offsets.
        UnknownDtypeError: safetensors has no such dtype.
        ShapeError: The shape is not a list of sizes, or too large.
        PartialByteError: The elements do not fill whole bytes.
        OffsetsError: The offsets are not two ordered, non-negative integers.
        SizeMismatchError: They do not span what shape and dtype need.
    """
    _check_name(name, file)
    where = f"{file}: tensor {quoted(name)}"
    if not isinstance(entry, dict) or set(entry) != _KEYS:
        raise TensorEntryError(f"{where}: needs exactly dtype, shape and data_offsets; download it again")
    dtype, shape = entry["dtype"], entry["shape"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise UnknownDtypeError(f"{where}: unknown dtype {quoted(dtype)}; convert it to one safetensors names")
    needed = _needed_bytes(shape, BITS[dtype], where)
    start, end = _offsets(entry["data_offsets"], where)
    if end - start != needed:
        message = f"{where}: {quoted(dtype)} of shape {quoted(shape)} needs {needed} bytes, has {end - start}"
        raise SizeMismatchError(f"{message}; download it again")
    return TensorInfo(name, dtype, tuple(shape), base + start, base + end)


def check_layout(tensors: Sequence[TensorInfo], base: int, file_size: int, file: str) -> None:
    """Check that tensors, sorted by position, fill a file from byte `base` to its end exactly.

    Raises:
        OverlapError: Two tensors share bytes (many tensors over one range make a small file fill the memory).
        HoleError: Bytes in between belong to none.
        TruncatedFileError: The file ends before the last tensor does.
        TrailingBytesError: The file goes on after the last tensor.
    """
    position = base
    for tensor in tensors:
        if tensor.start < position:
            message = f"{file}: tensor {quoted(tensor.name)}: overlaps the tensor before it"
            raise OverlapError(f"{message}; download it again")
        if tensor.start > position:
            gap = tensor.start - position
            message = f"{file}: tensor {quoted(tensor.name)}: {gap} unused bytes before it"
            raise HoleError(f"{message}; download it again")
        position = tensor.end
    if position > file_size:
        raise truncated(file, position, file_size)
    if position < file_size:
        message = f"{file}: {file_size - position} bytes after the last tensor; download it again"
        raise TrailingBytesError(message)


def _check_name(name: str, file: str) -> None:
    # Tools write tensors to files and directories of their names, and print them on terminals.
    if not name.isprintable():
        problem = "holds unprintable characters"
    elif len(name.encode()) > MAX_NAME_SIZE:
        problem = f"is longer than {MAX_NAME_SIZE} bytes"
    elif name in ("", ".", "..") or "/" in name or "\\" in name or ntpath.splitdrive(name)[0]:
        problem = "is empty or a path"
    else:
        return
    raise TensorNameError(f"{file}: the tensor name {quoted(name)} {problem}; rename the tensor")


def _needed_bytes(shape: object, bits: int, where: str) -> int:
    if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
        raise ShapeError(f"{where}: the shape {quoted(shape)} is not a list of sizes; download it again")
    # numpy wants the product without zeros to fit too.
    if len(shape) > MAX_DIMENSIONS or math.prod(max(size, 1) for size in shape) * bits >= 8 * _LIMIT:
        raise ShapeError(f"{where}: the shape {quoted(shape)} is too large; download it again")
    needed, rest = divmod(math.prod(shape) * bits, 8)
    if rest:
        message = f"{where}: {bits}-bit elements of shape {quoted(shape)} do not fill whole bytes"
        raise PartialByteError(f"{message}; download it again")
    return needed


def _offsets(offsets: object, where: str) -> tuple[int, int]:
    if isinstance(offsets, list) and len(offsets) == 2:
        start, end = offsets
        if _is_size(start) and _is_size(end) and start <= end:
            return start, end
    message = f"{where}: data_offsets {quoted(offsets)} are not two ordered sizes; download it again"
    raise OffsetsError(message)


def _is_size(value: object) -> TypeGuard[int]:
    # type() and not isinstance(): true and false are ints to Python.
    return type(value) is int and 0 <= value < _LIMIT
