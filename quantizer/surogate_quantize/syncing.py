"""Waiting until the disk has what was written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_NOT_HERE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF}
"""What file systems say that know no fsync, or none of directories."""


def sync(descriptor: int) -> None:
    """Waits until the disk has what was written to an open file; a no-op on file systems that know no fsync."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise


def write_synced(path: Path, data: bytes) -> None:
    """Writes a small file and waits until the disk has it."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        sync(file.fileno())


def replace_synced(path: Path, target: Path) -> None:
    """Renames a file within its directory and waits until the disk has the new name."""
    path.replace(target)
    sync_directory(target.parent)


def sync_directory(path: Path) -> None:
    """Waits until the disk has the directory's entries; a no-op where directories can't be opened."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # one that may be written to and not read; on Windows any
        return
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Waits until the disk has what another library has written to a file."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)
