"""What a process asks of the disk below a folder, step by step."""

import io
import os
import pathlib
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

from quantizer.disk_model import Disk, Step


class Recorder:
    """Patches what Python asks the system for, and calls `before` with each step below `root`, before it is done.

    Attributes:
        steps: those that were done.
        start: what was there before the first.
    """

    def __init__(self, root, before=lambda step: None):
        self.root, self.before, self.steps = Path(os.path.realpath(root)), before, []
        self.start = Disk().load(self.root)
        self._now, self._open, self._lock = self.start.copy(), {}, threading.RLock()
        self._os = {name: getattr(os, name) for name in _PATCHED}

    @contextmanager
    def recording(self):
        with ExitStack() as stack:
            for name in _PATCHED:
                patched = getattr(self, name)
                stack.enter_context(mock.patch.object(os, name, patched))
                if hasattr(getattr(pathlib, "_NormalAccessor", None), name):  # of Python 3.10, which keeps its own
                    stack.enter_context(mock.patch.object(pathlib._NormalAccessor, name, staticmethod(patched)))
            stack.enter_context(mock.patch.object(Path, "open", self._path_open()))
            # shutil.rmtree looks whether the functions that it knows take a directory's descriptor.
            stack.enter_context(mock.patch.object(os, "supports_dir_fd", os.supports_dir_fd | _ours(self)))
            yield self

    def _path_open(self):
        plain = Path.open

        def path_open(path, mode="r", *arguments, **keywords):
            if mode not in ("xb", "wb") or self._parts(path) is None:
                return plain(path, mode, *arguments, **keywords)
            flags = os.O_WRONLY | os.O_CREAT | (os.O_EXCL if mode == "xb" else os.O_TRUNC)
            return io.BufferedWriter(_Raw(os.open(path, flags, 0o666)))

        return path_open

    def _parts(self, path, dir_fd=None):
        """Names below the root; None if it is elsewhere."""
        if isinstance(path, int):
            return None
        if dir_fd is not None:
            above = self._open.get(dir_fd)
            return None if above is None else (*above[1], os.fspath(path))
        full = Path(os.path.realpath(Path(path).parent), Path(path).name)
        return full.relative_to(self.root).parts if full.is_relative_to(self.root) else None

    def _do(self, call, *steps):
        with self._lock:
            for step in steps:
                self.before(step)
            done = call()
            self.steps += steps
            return done

    def _entry(self, kind, call, path, dir_fd):
        parts = self._parts(path, dir_fd)
        if parts is None or self._now.find(parts) is None:
            return call()
        folder = self._now.find(parts[:-1])
        done = self._do(call, Step(kind, self._now.find(parts), parts[-1], folder))
        del self._now.folders[folder][parts[-1]]
        return done

    def _link(self, call, parts, data):
        with self._lock:
            folder, node = self._now.find(parts[:-1]), self._now.new(data)
            done = self._do(call, Step("link", node, parts[-1], folder, data=b"" if data is None else b"file"))
            self._now.folders[folder][parts[-1]] = node
            return done

    def open(self, path, flags, mode=0o777, *, dir_fd=None):
        def call():
            return self._os["open"](path, flags, mode, dir_fd=dir_fd)

        with self._lock:
            parts = self._parts(path, dir_fd)
            if parts is None:
                return call()
            there = self._now.find(parts)
            creates = flags & os.O_CREAT and there is None and self._now.find(parts[:-1]) is not None
            descriptor = self._link(call, parts, b"") if creates else call()
            self._open[descriptor] = (self._now.find(parts), parts)
            return descriptor

    def close(self, descriptor):
        with self._lock:
            self._open.pop(descriptor, None)
            return self._os["close"](descriptor)

    def mkdir(self, path, mode=0o777, *, dir_fd=None):
        parts = self._parts(path, dir_fd)
        if parts is None or self._now.find(parts) is not None or self._now.find(parts[:-1]) is None:
            return self._os["mkdir"](path, mode, dir_fd=dir_fd)
        return self._link(lambda: self._os["mkdir"](path, mode, dir_fd=dir_fd), parts, None)

    def rmdir(self, path, *, dir_fd=None):
        return self._entry("unlink", lambda: self._os["rmdir"](path, dir_fd=dir_fd), path, dir_fd)

    def unlink(self, path, *, dir_fd=None):
        return self._entry("unlink", lambda: self._os["unlink"](path, dir_fd=dir_fd), path, dir_fd)

    def replace(self, source, target):
        with self._lock:
            old, new = self._parts(source), self._parts(target)
            if old is None or new is None or self._now.find(old) is None:
                return self._os["replace"](source, target)
            node, folders = self._now.find(old), (self._now.find(old[:-1]), self._now.find(new[:-1]))
            step = Step("rename", node, old[-1], folders[0], new[-1], folders[1])
            self._do(lambda: self._os["replace"](source, target), step)
            if self._now.find(new) != node:  # two names of one file: POSIX does nothing
                del self._now.folders[folders[0]][old[-1]]
                self._now.folders[folders[1]][new[-1]] = node
            return None

    rename = replace

    def write(self, descriptor, data):
        offset = os.lseek(descriptor, 0, os.SEEK_CUR) if descriptor in self._open else 0
        return self._change("write", lambda: self._os["write"](descriptor, data), descriptor, offset, data)

    def pwrite(self, descriptor, data, offset):
        return self._change("write", lambda: self._os["pwrite"](descriptor, data, offset), descriptor, offset, data)

    def ftruncate(self, descriptor, size):
        return self._change("truncate", lambda: self._os["ftruncate"](descriptor, size), descriptor, size)

    def fsync(self, descriptor):
        if descriptor not in self._open:
            return self._os["fsync"](descriptor)
        return self._change("sync", lambda: None, descriptor)  # nobody pulls the plug, and it takes long

    def _change(self, kind, call, descriptor, offset=0, data=b""):
        if descriptor not in self._open:
            return call()
        return self._do(call, Step(kind, self._open[descriptor][0], offset=offset, data=bytes(data)))


_PATCHED = ("open", "close", "mkdir", "rmdir", "unlink", "replace", "rename", "write", "pwrite", "ftruncate", "fsync")


def _ours(recorder):
    return {getattr(recorder, name) for name in ("open", "mkdir", "rmdir", "unlink")}


class _Raw(io.RawIOBase):
    """An open file that writes through `os`."""

    def __init__(self, descriptor):
        super().__init__()
        self._descriptor = descriptor

    def writable(self):
        return True

    def fileno(self):
        return self._descriptor

    def write(self, data):
        return os.write(self._descriptor, data)

    def close(self):
        if not self.closed:
            super().close()
            os.close(self._descriptor)
