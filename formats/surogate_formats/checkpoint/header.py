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
from surogate_formats.checkpoint.json_reader import JsonReader, reader_of
from surogate_formats.checkpoint.tensor_info import TensorInfo, check_layout, parse_entry

PREFIX_SIZE = 8
"""Bytes before the JSON: its length N."""
MAX_HEADER_SIZE = 40_000_000
"""Largest N accepted, in bytes: 200 000 entries of 200 bytes. The safetensors library takes 100 MB, the Hub 25 MB."""

MAX_OBJECTS = 262_144
"""Most `{` of a header: one a tensor, and those in the strings of `__metadata__`."""

MAX_METADATA_SIZE = 4 * 2**20
"""Most bytes of `__metadata__`."""

MAX_METADATA_KEYS = 16_384
"""Most keys of `__metadata__`; torchao writes one a packed weight."""

LONGEST_ENTRY = 2**15
"""Most characters of a tensor's entry; one of 64 dimensions has 1500."""

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


def header_size(prefix: bytes | bytearray, file_size: int, file: str | Path) -> int:
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


def parse_header(data: bytes | bytearray, file_size: int, file: str | Path) -> Header:
    """Check the header of a file of `file_size` bytes.

    Args:
        data: The file's first bytes: prefix and header, or more.
        file_size: Size of the whole file in bytes.
        file: What the error messages name.

    Raises:
        CheckpointError: One class of `surogate_formats.checkpoint.errors` per cause.
    """
    where = shown(file)
    size = header_size(data[:PREFIX_SIZE], file_size, where)
    if len(data) < size:
        raise truncated(where, size, len(data))
    view = memoryview(data)[:size]
    if not data.startswith(b"{", PREFIX_SIZE, size):
        raise HeaderPaddingError(f"{where}: the header does not begin with '{{'; download it again")
    if data.count(b"{", PREFIX_SIZE, size) > MAX_OBJECTS:
        raise HeaderTooLargeError(f"{where}: the header holds more than {MAX_OBJECTS} objects; download it again")
    metadata, tensors = _entries(view, where)
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    check_layout(tensors, size, file_size, where)
    return Header(
        tensors={tensor.name: tensor for tensor in tensors},
        metadata=metadata,
        header_size=size,
        sha256=hashlib.sha256(view).hexdigest(),
    )


def _entries(view: memoryview, where: str) -> tuple[dict[str, str], list[TensorInfo]]:
    reader = JsonReader(reader_of(view[PREFIX_SIZE:]), where, longest=LONGEST_ENTRY)
    metadata: dict[str, str] = {}
    tensors = []
    for name in reader.members():
        if name == _METADATA:
            metadata = _metadata(reader, where)
        else:
            tensors.append(parse_entry(name, reader.value(), len(view), where))
    if any(piece.strip(" ") for piece in reader.rest()):
        raise HeaderPaddingError(f"{where}: the header is followed by something else than spaces; download it again")
    return metadata, tensors


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
    data = bytearray(header_size(prefix, file_size, where))
    read_at(descriptor, memoryview(data), 0, where)
    return parse_header(data, file_size, where)


def _metadata(reader: JsonReader, where: str) -> dict[str, str]:
    found: dict[str, str] = {}
    if reader.next() != "{":
        reader.value()
        raise MetadataError(f"{where}: __metadata__ is not an object of strings; download it again")
    room = MAX_METADATA_SIZE
    for key in reader.members():
        text = reader.value()
        size = _encoded_size(key, text)
        if size is None:
            raise MetadataError(f"{where}: __metadata__ is not an object of strings; download it again")
        room -= size
        if room < 0 or len(found) == MAX_METADATA_KEYS:
            message = f"{MAX_METADATA_SIZE} bytes or {MAX_METADATA_KEYS} keys"
            raise MetadataError(f"{where}: __metadata__ has more than {message}; download it again")
        found[key] = text
    return found


def _encoded_size(key: str, text: object) -> int | None:
    """Bytes of two texts; None if one is none, or has half of a surrogate pair, which nothing can write again."""
    try:
        return len(key.encode()) + len(text.encode()) if isinstance(text, str) else None
    except UnicodeEncodeError:
        return None
