"""What a process does to a folder on disk, step by step; and what a loss of power after any step may leave of it.

The model of a disk is POSIX's: what was written to a file is safe once that file was synced, and an entry of a
directory once that directory was. Everything else may be there, half there, or not there, in any combination.
"""

import io
import os
import pathlib
import random
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

ROOT = 0


@dataclass(frozen=True)
class Step:
    """One thing that was asked of the disk.

    `link` and `unlink` give or take an entry of a directory, `rename` does both at once; `write`, `truncate` and `sync`
    are of the file or directory `node`.
    """

    kind: str
    node: int
    name: str = ""
    folder: int = ROOT
    new_name: str = ""
    new_folder: int = ROOT
    offset: int = 0
    data: bytes = b""


@dataclass
class Disk:
    """Files and directories by number; `ROOT` is the folder itself."""

    folders: dict[int, dict[str, int]] = field(default_factory=lambda: {ROOT: {}})
    files: dict[int, bytearray] = field(default_factory=dict)

    def new(self, data=None):
        """A new file with this content, or a directory."""
        node = len(self.folders) + len(self.files)
        (self.folders if data is None else self.files)[node] = {} if data is None else bytearray(data)
        return node

    def load(self, path, node=ROOT):
        """Takes what a folder holds."""
        for entry in sorted(path.iterdir()):
            self.folders[node][entry.name] = inner = self.new(None if entry.is_dir() else entry.read_bytes())
            if entry.is_dir():
                self.load(entry, inner)
        return self

    def store(self, path, node=ROOT, links=None):
        """Writes it into a fresh folder; a file with two names is one file there, too."""
        links = {} if links is None else links
        path.mkdir()
        for name, inner in self.folders[node].items():
            if inner in self.folders:
                self.store(path / name, inner, links)
            elif inner in links:
                os.link(links[inner], path / name)
            else:
                (path / name).write_bytes(self.files[inner])
                links[inner] = path / name
        return path

    def copy(self):
        return Disk(
            {node: dict(entries) for node, entries in self.folders.items()},
            {node: bytearray(data) for node, data in self.files.items()},
        )

    def find(self, path):
        """The number of what stands at a path, a tuple of names; None if nothing does."""
        node = ROOT
        for name in path:
            node = self.folders.get(node, {}).get(name)
            if node is None:
                return None
        return node

    def write(self, node, offset, data):
        content = self.files[node]
        content.extend(bytes(max(offset + len(data) - len(content), 0)))
        content[offset : offset + len(data)] = data

    def truncate(self, node, size):
        self.files[node] = self.files[node][:size].ljust(size, b"\0")


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


def nothing_unsynced(step, half):
    """All that was not synced is lost."""
    return 0.0


def some_of(seed):
    """Any of what was not synced is there, half of a write at times."""
    choice = random.Random(seed)
    return lambda step, half: choice.choice((0.0, 0.5, 1.0) if step.kind == "write" else (0.0, 1.0))


def after_power_loss(start, steps, kept):
    """What is on the disk after these steps and a loss of power.

    Args:
        start: what was there before.
        steps: those that were done.
        kept: how much of a step that was not synced is there, 0 to 1; asked for both halves, `to` and `from`, of a
            rename.
    """
    synced = _synced(steps)
    disk = start.copy()
    for index, step in enumerate(steps):
        share = 1.0 if (index, "to") in synced else kept(step, "to")
        if step.kind == "link":
            (disk.files if step.data else disk.folders).setdefault(step.node, bytearray() if step.data else {})
        if not share or step.kind == "sync":
            continue
        if step.kind == "write":
            disk.write(step.node, step.offset, step.data[: round(len(step.data) * share)])
        elif step.kind == "truncate":
            disk.truncate(step.node, step.offset)
        elif step.kind == "link":
            disk.folders[step.folder][step.name] = step.node
        elif step.kind == "unlink":
            disk.folders[step.folder].pop(step.name, None)
        else:
            disk.folders[step.new_folder][step.new_name] = step.node
            if (index, "from") in synced or kept(step, "from"):
                disk.folders[step.folder].pop(step.name, None)
    return disk


def _synced(steps):
    """Halves of steps that a later sync has made safe; a rename's old name never goes before the new one is there."""
    safe, waiting = set(), {}
    for index, step in enumerate(steps):
        if step.kind == "sync":
            for half in waiting.pop(step.node, ()):
                safe |= {half, (half[0], "to")}
        elif step.kind == "rename":
            waiting.setdefault(step.new_folder, []).append((index, "to"))
            waiting.setdefault(step.folder, []).append((index, "from"))
        else:
            where = step.folder if step.kind in ("link", "unlink") else step.node
            waiting.setdefault(where, []).append((index, "to"))
    return safe
