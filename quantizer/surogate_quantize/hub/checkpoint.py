"""A checkpoint on the Hub: its headers are here from the start, its tensors when they are read."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Lock

from surogate_formats.checkpoint import Checkpoint, SourceFile
from surogate_formats.checkpoint.index import INDEX, MAX_INDEX_SIZE, find_shards
from surogate_formats.checkpoint.reader import CONFIG
from surogate_formats.hub_text import not_cached
from surogate_formats.layouts.modelopt import SIDECAR as MODELOPT_FILE
from surogate_quantize.hub.errors import UnknownHashError
from surogate_quantize.hub.repository import HubFile, HubRepository
from surogate_quantize.hub.shards import HubShards, check
from surogate_quantize.sidecars import TEMPLATES, is_carried

REQUESTS_AT_ONCE = 8
"""Headers that are asked for at a time."""


class HubCheckpoint(Checkpoint):
    """A checkpoint whose files are headers and holes; a shard's bytes arrive when one of its tensors is first read.

    Attributes:
        shards: what fetches them.
    """

    def __init__(self, directory: Path, repository: HubRepository, files: list[HubFile], folder: Path | None) -> None:
        """See `Checkpoint.open` and `HubShards`."""
        self._changing = Lock()
        self._hashes = {file.name: file.sha256 for file in files}
        super().__init__(directory)
        self.shards = HubShards(repository, files, folder, self._place)
        self.shards.expect(Counter(entry.file for entry in self.tensors.values()))

    def close(self) -> None:
        """See `Checkpoint.close`; a shard that arrives meanwhile must not take over some other file's descriptor."""
        with self._changing:
            super().close()

    def read_into(self, name: str, buffer: memoryview, offset: int = 0) -> int:
        """See `Checkpoint.read_into`; waits for the shard, and raises what stands in its way."""
        self.shards.need(self.entry(name).file)
        return super().read_into(name, buffer, offset)

    def hash_files(self) -> tuple[SourceFile, ...]:
        """See `Checkpoint.hash_files`; these are the Hub's own, which downloads were held against.

        Raises:
            UnknownHashError: the Hub has none of a file, or can't be asked.
        """
        for name in self.headers:
            if self._hashes.get(name) is None:
                raise UnknownHashError(
                    f"{name}: the Hub gives no SHA-256 of it (or is offline); leave out `hash_source`"
                )
        return tuple(replace(file, sha256=self._hashes[file.name]) for file in self.files)

    def _place(self, file: str, path: Path) -> None:
        """Reads a shard from `path` from now on."""
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
        try:
            with self._changing:
                os.dup2(descriptor, self._descriptors[file], inheritable=False)
        finally:
            os.close(descriptor)


def fill(repository: HubRepository, folder: Path, downloads: Path | None) -> tuple[list[HubFile], tuple[str, ...]]:
    """Writes the small files, and of each shard its header; returns the shards, and the names of unused ones.

    Args:
        repository: where they come from.
        folder: where they go.
        downloads: the same, or None for files that should stay in the cache.

    Raises:
        NoWeightsError, PickledWeightsError: the repository has no safetensors; nothing was downloaded.
    """
    names = [name for name in repository.files if "/" not in name]
    index = None
    if INDEX in names:
        with _small(repository, INDEX, folder, downloads).open("rb") as reader:
            index = reader.read(MAX_INDEX_SIZE + 1)  # one that is longer is refused below
    shards = find_shards(names, index, repository.name)
    for name in repository.files:
        if name in (CONFIG, MODELOPT_FILE) or _goes_along(name):
            _small(repository, name, folder, downloads)
    if repository.offline and (missing := next((name for name in shards.names if name not in repository.files), "")):
        raise not_cached(repository.name, missing)
    files = [repository.files[name] for name in shards.names if name in repository.files]
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        for file, start in zip(files, pool.map(repository.start, files), strict=True):
            _stand_in(folder / file.name, start, file.size)
    return files, shards.unused


def _goes_along(name: str) -> bool:
    parent, _, leaf = name.rpartition("/")
    return is_carried(leaf) if not parent else parent == TEMPLATES and leaf.endswith(".jinja")


def _small(repository: HubRepository, name: str, folder: Path, downloads: Path | None) -> Path:
    file, target = repository.files[name], folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    path = repository.cached(file) or repository.download(file, downloads)
    if path != target:
        shutil.copyfile(path, target)
    check(repository, file, target)
    return target


def _stand_in(path: Path, start: bytes, size: int) -> None:
    """A file with a shard's header, and a hole of its size in place of the tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as writer:
        writer.write(start)
        writer.truncate(size)
