"""Takes from a process what Windows doesn't have, then quantizes and verifies; run by test_faults.

An emulation of what is missing, no Windows: it shows that no module asks for it, and that fallbacks give the bytes.
"""

import errno
import os
import stat
import sys
from pathlib import Path

for name in ("O_CLOEXEC", "O_DIRECTORY", "O_NOCTTY", "O_NOFOLLOW", "O_NONBLOCK", "pread", "preadv", "pwrite"):
    delattr(os, name)
del os.sched_getaffinity
for module in ("fcntl", "resource"):
    sys.modules[module] = None
open_file, fsync, scandir = os.open, os.fsync, os.scandir
read_only = set()


def open_no_directory(path, flags, mode=0o777, *, dir_fd=None):
    if dir_fd is not None:
        raise NotImplementedError("dir_fd")
    if Path(path).is_dir():
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    descriptor = open_file(path, flags, mode)
    (read_only.discard if flags & os.O_RDWR else read_only.add)(descriptor)
    return descriptor


def fsync_written(descriptor):
    if not stat.S_ISREG(os.fstat(descriptor).st_mode) or descriptor in read_only:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    fsync(descriptor)


def scandir_by_name(path="."):
    if isinstance(path, int):
        raise TypeError("scandir: path should be string, bytes, os.PathLike or None, not int")
    return scandir(path)


os.open, os.fsync, os.scandir = open_no_directory, fsync_written, scandir_by_name

from surogate_formats.artifact import Artifact  # noqa: E402
from surogate_quantize import make_options, quantize  # noqa: E402

source, out = sys.argv[1:]
quantize(source, out, make_options("nf4", {}))
with Artifact.open(out) as artifact:
    artifact.verify()
