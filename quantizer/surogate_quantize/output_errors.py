"""What can stand in the way of writing an output directory, one class per cause, and how each is noticed."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None  # type: ignore[assignment]

from surogate_formats.errors import SurogateError, UsageError

_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF, errno.ENOLCK}
"""What file systems say that know no locks, as some of clusters: two runs at once are the user's to avoid there."""


class OutputExistsError(UsageError):
    """The output directory is a file, or holds something that we would mix with or destroy."""


class OutputInSourceError(UsageError):
    """The output directory is the source, inside it, or around it."""


class OtherRunError(OutputExistsError):
    """The output directory holds an unfinished run that was asked for something else."""


class OutputBusyError(SurogateError):
    """Another run is writing into the output directory."""


class DiskFullError(SurogateError):
    """The disk has no room for the artifact."""


class OutputNotWritableError(SurogateError):
    """The output directory can't be made or written to."""


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Names the output directory in what the operating system refuses.

    Raises:
        DiskFullError, OutputNotWritableError: see the classes.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(f"`out` {out}: the disk is full; free some space or choose another disk") from error
        raise OutputNotWritableError(f"`out` {out}: {error.strerror}; choose another directory") from error


@contextmanager
def locked(out: Path, *, surely: bool = False) -> Iterator[None]:
    """Holds the directory against a second run; the lock goes with the process, so a crash locks nobody out.

    Args:
        out: the directory.
        surely: take a system without locks for one where somebody else holds the directory.

    Raises:
        OutputBusyError: somebody else holds it.
    """
    if fcntl is None and not surely:
        yield
        return
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            if fcntl is None:
                raise BlockingIOError
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputBusyError(
                f"`out` {out}: another run is writing there; wait for it, or choose another"
            ) from None
        except OSError as error:
            if surely or error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(descriptor)
