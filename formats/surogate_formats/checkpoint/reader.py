"""A checkpoint as a set of tensors, read by `pread` from descriptors that stay open.

No mmap: a mapped shard counts as the process's memory up to its whole size, and a file that shrinks under it
kills the process by SIGBUS.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from surogate_formats.checkpoint.directory import Directory
from surogate_formats.checkpoint.errors import (
    ChangedFileError,
    MissingConfigError,
    MissingShardError,
    NoNumpyTypeError,
    quoted,
)
from surogate_formats.checkpoint.expert_slices import ExpertSlice, slices_of
from surogate_formats.checkpoint.files import allow_open_files, read_at, unreadable
from surogate_formats.checkpoint.header import Header, read_open_header
from surogate_formats.checkpoint.index import INDEX, MAX_INDEX_SIZE, check_agreement, find_shards
from surogate_formats.checkpoint.quantized import is_quantized
from surogate_formats.checkpoint.strict_json import MAX_TEXT, parse_object
from surogate_formats.checkpoint.tensor_info import TensorInfo
from surogate_formats.dtypes import NUMPY

CONFIG = "config.json"
MAX_CONFIG_SIZE = MAX_TEXT
"""Largest `config.json` accepted, in bytes."""

HASHED = 8 << 20
"""Bytes of a shard that are in memory at a time while it is hashed."""


@dataclass(frozen=True)
class Entry:
    """A tensor and the shard, relative to the checkpoint's directory, that holds it."""

    file: str
    info: TensorInfo


@dataclass(frozen=True)
class SourceFile:
    """What identifies a shard: name, size in bytes, SHA-256 of its header, and of all its bytes if that is known."""

    name: str
    size: int
    header_sha256: str
    sha256: str | None = None


class _State(NamedTuple):
    inode: tuple[int, int]
    size: int
    changed: int


class Checkpoint:
    """An open checkpoint; a context manager. Reading is thread-safe, closing under a read is not.

    Attributes:
        directory: Where it is.
        config_bytes: `config.json` as it stands.
        config: The same, parsed.
        headers: The checked header of each shard by its name, sorted by name.
        files: What identifies each shard, in the same order.
        tensors: Every tensor by name, by shard and then by position in it.
        unused: Names of the directory's safetensors files that are no part of the checkpoint, sorted.
    """

    def __init__(self, directory: Path) -> None:
        """See `open`."""
        self.directory = directory
        with Directory(directory) as source, ExitStack() as opened:
            self._where = source.where
            self._names = source.names
            shards = find_shards(source.names, _read_index(source), source.where)
            self.unused = shards.unused
            self.config_bytes = _read_config(source)
            self.config = parse_object(self.config_bytes, source.show(CONFIG), strict=False)
            allow_open_files(len(shards.names))
            self._descriptors = {name: _open_shard(source, name, opened) for name in shards.names}
            self._states = {name: _state(descriptor) for name, descriptor in self._descriptors.items()}
            self.headers = {
                name: read_open_header(descriptor, source.show(name)) for name, descriptor in self._descriptors.items()
            }
            check_agreement(_holders(self.headers), shards.weight_map, source.where)
            self._opened = opened.pop_all()
        self.files = tuple(SourceFile(name, header.file_size, header.sha256) for name, header in self.headers.items())
        self.tensors = {
            info.name: Entry(name, info) for name, header in self.headers.items() for info in header.tensors.values()
        }

    @classmethod
    def open(cls, directory: str | Path) -> Checkpoint:
        """Check every header, the index and `config.json` of a directory; read no tensor.

        Raises:
            CheckpointError: One class of `surogate_formats.checkpoint.errors` per cause.
        """
        return cls(Path(directory))

    def close(self) -> None:
        """Close the shards. A read afterwards is a `ValueError`."""
        # A descriptor's number is soon some other file's: it must not be read any more.
        self._descriptors = {}
        self._opened.close()

    def __enter__(self) -> Checkpoint:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    @cached_property
    def fused_experts(self) -> Mapping[str, tuple[ExpertSlice, ...]]:
        """Name of each tensor that holds all experts of a layer to the weights in it, which can be read by their names.

        Those of the model types whose arrangement is known; see `expert_slices`.
        """
        return slices_of({name: entry.info for name, entry in self.tensors.items()}, self.config)

    @cached_property
    def _slices(self) -> dict[str, ExpertSlice]:
        return {part.info.name: part for parts in self.fused_experts.values() for part in parts}

    def find(self, name: str) -> Entry | None:
        """A tensor, or one of `fused_experts`; None if there is none of this name."""
        if name in self.tensors or name not in self._slices:
            return self.tensors.get(name)
        part = self._slices[name]
        return Entry(self.tensors[part.whole.name].file, part.info)

    def entry(self, name: str) -> Entry:
        """The same; `KeyError` if there is none of this name."""
        if (entry := self.find(name)) is None:
            raise KeyError(name)
        return entry

    def read(self, name: str) -> npt.NDArray[Any]:
        """Read a tensor, or one of `fused_experts`, as a new C-contiguous array of its own shape and dtype.

        Raises:
            KeyError: There is no such tensor.
            NoNumpyTypeError: Its elements are not whole bytes (F4, F6); `read_into` gives its bytes.
            TruncatedFileError: The shard has shrunk since it was opened.
        """
        entry = self.entry(name)
        info = entry.info
        if info.dtype not in NUMPY:
            where = f"{self._where}/{entry.file}: tensor {quoted(name)}"
            raise NoNumpyTypeError(f"{where}: {info.dtype} has no numpy type; convert it to one that has")
        array = np.empty(info.shape, NUMPY[info.dtype])
        self.read_into(name, array.reshape(-1).view(np.uint8).data)
        return array

    def read_into(self, name: str, buffer: memoryview, offset: int = 0) -> int:
        """Read bytes of a tensor, or of one of `fused_experts`, from byte `offset` of it, into a writable buffer.

        The buffer is contiguous.

        Returns:
            Bytes read: the buffer's size, or less where the tensor ends.

        Raises:
            KeyError: There is no such tensor.
            ValueError: `offset` lies outside the tensor, or the checkpoint is closed.
            TruncatedFileError: The shard has shrunk since it was opened.
        """
        entry = self.entry(name)
        if not 0 <= offset <= entry.info.nbytes:
            raise ValueError(f"offset {offset} outside tensor {quoted(name)} of {entry.info.nbytes} bytes")
        if entry.file not in self._descriptors:
            raise ValueError(f"{self._where}: closed")
        count = min(buffer.nbytes, entry.info.nbytes - offset)
        target = buffer.cast("B")[:count]
        if count and name not in self.tensors:
            part = self._slices[name]
            part.fill(lambda piece, start: self._read_at(entry.file, piece, part.whole.start + start), target, offset)
        elif count:
            self._read_at(entry.file, target, entry.info.start + offset)
        return count

    def _read_at(self, file: str, buffer: memoryview, position: int) -> None:
        read_at(self._descriptors[file], buffer, position, f"{self._where}/{file}")

    def hash_files(self) -> tuple[SourceFile, ...]:
        """`files` with the SHA-256 of all their bytes, for which every one of them is read.

        Raises:
            UnreadableFileError: The disk fails.
            TruncatedFileError: A shard has shrunk since it was opened.
        """
        return tuple(replace(file, sha256=self._sha256(file)) for file in self.files)

    def _sha256(self, file: SourceFile) -> str:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(min(HASHED, file.size)))
        for start in range(0, file.size, HASHED):
            piece = buffer[: min(HASHED, file.size - start)]
            self._read_at(file.name, piece, start)
            digest.update(piece)
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Call after the last read: what was read is of one state of every shard, or this says which is not.

        A file that was renamed over a shard does no harm: the one that was opened is still read.

        Raises:
            ChangedFileError: A shard's size or time of change is no longer that of `open`.
        """
        for name, descriptor in self._descriptors.items():
            before, now = self._states[name], _state(descriptor)
            # Another inode: a subclass has put another file in this one's place, on purpose.
            if now.inode == before.inode and now != before:
                message = f"{self._where}/{name}: has changed while it was read; run it again"
                raise ChangedFileError(message)

    def is_quantized(self) -> str | None:
        """The method that the checkpoint is quantized by already, None if by none."""
        infos = {name: entry.info for name, entry in self.tensors.items()}
        return is_quantized(self.config, files=self._names, tensors=infos)


def _state(descriptor: int) -> _State:
    status = os.fstat(descriptor)
    return _State((status.st_dev, status.st_ino), status.st_size, status.st_mtime_ns)


def _read_index(source: Directory) -> bytes | None:
    if INDEX not in source.names:
        return None
    try:
        return source.read(INDEX, MAX_INDEX_SIZE)
    except FileNotFoundError as error:  # a link to nothing
        raise unreadable(source.show(INDEX), error) from None


def _read_config(source: Directory) -> bytes:
    try:
        return source.read(CONFIG, MAX_CONFIG_SIZE)
    except FileNotFoundError:
        message = f"{source.show(CONFIG)}: missing; download it from the model's repository"
        raise MissingConfigError(message) from None


def _open_shard(source: Directory, name: str, opened: ExitStack) -> int:
    try:
        descriptor = source.open(name)
    except FileNotFoundError:
        message = f"{source.show(name)}: missing, though the checkpoint names it; download it"
        raise MissingShardError(message) from None
    opened.callback(os.close, descriptor)
    return descriptor


def _holders(headers: Mapping[str, Header]) -> dict[str, tuple[str, ...]]:
    holders: dict[str, tuple[str, ...]] = {}
    for shard, header in headers.items():
        for tensor in header.tensors:
            holders[tensor] = (*holders.get(tensor, ()), shard)
    return holders
