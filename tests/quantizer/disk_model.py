"""A disk as a model, and what a loss of power after some steps may leave of it.

It is POSIX's: what was written to a file is safe once that file was synced, and an entry of a directory once that
directory was. Everything else may be there, half there, or not there, in any combination.
"""

import os
import random
from dataclasses import dataclass, field

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
