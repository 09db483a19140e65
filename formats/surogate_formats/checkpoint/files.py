"""Opening and reading one file of a checkpoint: regular files only, by `pread` where the system has it."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None  # type: ignore[assignment]

from surogate_formats.checkpoint.errors import NotARegularFileError, TruncatedFileError, UnreadableFileError

# Without O_NONBLOCK, opening a pipe that nobody writes to waits for ever. Windows has O_BINARY instead of the others.
_FLAGS = os.O_RDONLY
for _name in ("O_CLOEXEC", "O_NONBLOCK", "O_NOCTTY", "O_BINARY"):
    _FLAGS |= getattr(os, _name, 0)

_OTHER_FILES = 256
"""Files that a process has open beside those of a checkpoint, at most: its own, and libraries'."""

_SEEKING = threading.Lock()
"""Held where the system has no read at an offset, and threads would move each other's position."""


def unreadable(where: str, error: OSError) -> UnreadableFileError:
    """The error for what the operating system refuses."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return UnreadableFileError(f"{where}: too many files are open; raise the limit, as by `ulimit -n 4096`")
    return UnreadableFileError(f"{where}: cannot be read: {error.strerror}; check its permissions and the disk")


def truncated(where: str, promised: int, size: int) -> TruncatedFileError:
    """The error for a file of `size` bytes whose header promises more."""
    return TruncatedFileError(
        f"{where}: truncated: header promises {promised} bytes, file has {size}; download it again"
    )


def allow_open_files(count: int) -> None:
    """Raises the process's own limit of open files, as far as it may, where `count` more would come near it."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(OSError, ValueError):  # what is missing then is said when a file can't be opened
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))


def open_regular(path: str | Path, where: str, *, directory: int | None = None) -> int:
    """Open a regular file for reading, following a link in its last component.

    The Hub's cache is made of links into its `blobs`, so a link as the file itself is ordinary.

    Raises:
        FileNotFoundError: Nothing is there; the caller knows what that means.
        NotARegularFileError: It is something else than a file.
        UnreadableFileError: It may not be read.
    """
    try:
        descriptor = os.open(path, _FLAGS, dir_fd=directory)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise unreadable(where, error) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotARegularFileError(f"{where}: not a regular file; replace it by the file itself")
    return descriptor


def read_at(descriptor: int, buffer: memoryview, offset: int, where: str) -> None:
    """Fill `buffer`, a writable contiguous view of bytes, from byte `offset` of a file.

    Raises:
        TruncatedFileError: The file ends before the buffer is full.
        UnreadableFileError: The disk fails.
    """
    done = 0
    while done < len(buffer):
        try:
            got = _read_some(descriptor, buffer[done:], offset + done)
        except OSError as error:
            raise unreadable(where, error) from None
        if got == 0:
            raise truncated(where, offset + len(buffer), os.fstat(descriptor).st_size)
        done += got


def _read_some(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Reads into a buffer as much as comes; returns how many bytes."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], offset)
    if hasattr(os, "pread"):  # macOS before 11
        data = os.pread(descriptor, len(buffer), offset)
    else:  # Windows
        with _SEEKING:
            os.lseek(descriptor, offset, os.SEEK_SET)
            data = os.read(descriptor, len(buffer))
    buffer[: len(data)] = data
    return len(data)


def read_whole(descriptor: int, where: str, cap: int, larger: Callable[[int], Exception]) -> bytes:
    """The bytes of a file of up to `cap`; raises what `larger` makes of its size if it is larger, and nothing is read.

    Raises:
        TruncatedFileError: It shrank while it was read.
        UnreadableFileError: The disk fails.
    """
    size = os.fstat(descriptor).st_size
    if size > cap:
        raise larger(size)
    data = bytearray(size)
    read_at(descriptor, memoryview(data), 0, where)
    return bytes(data)


def stream_of(descriptor: int, where: str) -> Callable[[int], bytes]:
    """A function that gives the next bytes of a file, at most so many, and none at its end.

    Raises:
        UnreadableFileError: From that function, where the disk fails.
    """

    def read(count: int) -> bytes:
        try:
            return os.read(descriptor, count)
        except OSError as error:
            raise unreadable(where, error) from None

    return read
