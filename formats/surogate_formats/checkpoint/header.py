"""The header of a safetensors file, checked in full before any byte is trusted.

A file is an unsigned little-endian 64-bit N, N bytes of JSON, and the tensors' bytes without gaps. The
safetensors library accepts a padded start, duplicate keys and names such as `../x`; its specification forbids
the first two.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from surogate_formats.checkpoint.errors import (
    GitLfsPointerError,
    HeaderPaddingError,
    HeaderTooLargeError,
    MetadataError,
    UnreadableFileError,
    shown,
)
from surogate_formats.checkpoint.files import open_regular, read_at, truncated
from surogate_formats.checkpoint.strict_json import parse_object
from surogate_formats.checkpoint.tensor_info import TensorInfo, check_layout, parse_entry

PREFIX_SIZE = 8
"""Bytes before the JSON: its length N."""
MAX_HEADER_SIZE = 100_000_000
"""Largest N accepted, in bytes; the limit of the safetensors library."""

_METADATA = "__metadata__"
_LFS_PREFIX = b"version "


@dataclass(frozen=True)
class Header:
    """A checked header.

    Attributes:
        tensors: Every tensor by name, in the order of its bytes.
        metadata: The strings of `__metadata__`.
        header_size: Bytes before the first tensor: the 8 of the prefix and the JSON with its padding.
        sha256: Hexadecimal SHA-256 of those `header_size` bytes.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    header_size: int
    sha256: str

    @property
    def file_size(self) -> int:
        """Size of the whole file in bytes: the tensors fill it to its end."""
        return max((tensor.end for tensor in self.tensors.values()), default=self.header_size)


def header_size(prefix: bytes, file_size: int, file: str | Path) -> int:
    """Bytes of prefix and header of a file of `file_size` bytes, from its first 8.

    Raises:
        TruncatedFileError: The file ends before its header does.
        GitLfsPointerError: The file is a stub of git-lfs.
        HeaderTooLargeError: The header would be larger than `MAX_HEADER_SIZE`.
    """
    where = shown(file)
    if len(prefix) < PREFIX_SIZE:
        raise truncated(where, PREFIX_SIZE, file_size)
    if prefix[:PREFIX_SIZE] == _LFS_PREFIX:
        raise GitLfsPointerError(f"{where}: a git-lfs pointer, not the weights; run git lfs pull")
    length = int.from_bytes(prefix[:PREFIX_SIZE], "little")
    if length > MAX_HEADER_SIZE:
        message = f"{where}: promises a header of {length} bytes, more than {MAX_HEADER_SIZE}"
        raise HeaderTooLargeError(f"{message}: not a safetensors file; download it again")
    if PREFIX_SIZE + length > file_size:
        raise truncated(where, PREFIX_SIZE + length, file_size)
    return PREFIX_SIZE + length


def parse_header(data: bytes, file_size: int, file: str | Path) -> Header:
    """Check the header of a file of `file_size` bytes.

    Args:
        data: The file's first bytes: prefix and header, or more.
        file_size: Size of the whole file in bytes.
        file: What the error messages name.

    Raises:
        CheckpointError: One class of `surogate_formats.checkpoint.errors` per cause.
    """
    where = shown(file)
    size = header_size(data, file_size, where)
    if len(data) < size:
        raise truncated(where, size, len(data))
    text = data[PREFIX_SIZE:size]
    if not text.startswith(b"{"):
        raise HeaderPaddingError(f"{where}: the header does not begin with '{{'; download it again")
    if not text.rstrip(b" ").endswith(b"}"):
        message = f"{where}: the header does not end with '}}' and spaces; download it again"
        raise HeaderPaddingError(message)
    entries = parse_object(text, where)
    metadata = _metadata(entries.pop(_METADATA, {}), where)
    tensors = [parse_entry(name, entry, size, where) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    check_layout(tensors, size, file_size, where)
    return Header(
        tensors={tensor.name: tensor for tensor in tensors},
        metadata=metadata,
        header_size=size,
        sha256=hashlib.sha256(memoryview(data)[:size]).hexdigest(),
    )


def read_header(path: Path) -> Header:
    """Read and check the header of the file at `path`.

    Raises:
        CheckpointError: One class of `surogate_formats.checkpoint.errors` per cause.
    """
    try:
        descriptor = open_regular(path, shown(path))
    except FileNotFoundError as error:
        message = f"{shown(path)}: cannot be read: {error.strerror}; check the path"
        raise UnreadableFileError(message) from None
    try:
        return read_open_header(descriptor, path)
    finally:
        os.close(descriptor)


def read_open_header(descriptor: int, file: str | Path) -> Header:
    """Read and check the header of an open file; `file` is what the error messages name."""
    where = shown(file)
    file_size = os.fstat(descriptor).st_size
    prefix = bytearray(min(PREFIX_SIZE, file_size))
    read_at(descriptor, memoryview(prefix), 0, where)
    data = bytearray(header_size(bytes(prefix), file_size, where))
    read_at(descriptor, memoryview(data), 0, where)
    return parse_header(bytes(data), file_size, where)


def _metadata(value: object, where: str) -> dict[str, str]:
    if isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
        try:
            "".join((*value.keys(), *value.values())).encode()
        except UnicodeEncodeError:  # half a surrogate pair, which nothing can write again
            pass
        else:
            return value
    raise MetadataError(f"{where}: __metadata__ is not an object of strings; download it again")
