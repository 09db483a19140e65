"""A model's repository on the Hub at one commit: what files it has, and how their bytes get here.

All traffic is huggingface_hub's own. Files of the cache are read where they stand and never written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from surogate_formats.checkpoint.header import PREFIX_SIZE, header_size
from surogate_formats.checkpoint.reader import CONFIG
from surogate_formats.hub_text import hub_errors, not_cached
from surogate_quantize.hub.terminal import bar_class

if TYPE_CHECKING:
    from huggingface_hub import HfApi

FIRST_READ = 1 << 20
"""Bytes of a remote shard that are asked for at first; most headers fit."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository.

    Attributes:
        name: its path in the repository.
        size: in bytes.
        sha256: of its bytes, as the Hub has them; None if git holds the file itself.
        git_oid: git's SHA-1 of it, if git holds the file itself.
    """

    name: str
    size: int
    sha256: str | None
    git_oid: str | None


@dataclass(frozen=True)
class HubRepository:
    """A repository at one commit; `resolve` makes it.

    Attributes:
        api: with the token.
        name: as the user gave it.
        revision: the same; None is the default branch.
        commit: the commit's full hash.
        files: by path; offline, those that the cache has.
        offline: whether nothing but the cache may be asked.
        stop: set from outside; a download under way then ends with `StoppedError`.
    """

    api: HfApi
    name: str
    revision: str | None
    commit: str
    files: Mapping[str, HubFile]
    offline: bool
    stop: Event

    @classmethod
    def resolve(cls, name: str, revision: str | None, token: str | None, stop: Event) -> HubRepository:
        """Asks the Hub, or offline the cache, which commit a revision is.

        Raises:
            SurogateError: see `surogate_formats.hub_text`.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import OfflineModeIsEnabled

        api = HfApi(token=token, library_name="surogate-quant")
        with hub_errors(name, revision, lead="no such directory, and "):
            try:
                info = api.model_info(name, revision=revision, files_metadata=True)
            except OfflineModeIsEnabled:
                config = api.hf_hub_download(name, CONFIG, revision=revision, local_files_only=True)
                snapshot = Path(config).parent
                return cls(api, name, revision, snapshot.name, _cached_files(snapshot), True, stop)
        files = [
            HubFile(entry.rfilename, entry.size or 0, entry.lfs.sha256, None)
            if entry.lfs
            else HubFile(entry.rfilename, entry.size or 0, None, entry.blob_id)
            for entry in info.siblings or ()
        ]
        return cls(api, name, revision, str(info.sha), {file.name: file for file in files}, False, stop)

    def cached(self, file: HubFile) -> Path | None:
        """Where the cache has a file of this commit."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.name, file.name, revision=self.commit)
        return Path(os.path.realpath(found)) if isinstance(found, str) else None

    def download(self, file: HubFile, folder: Path | None) -> Path:
        """Gets a file into a folder, or into the cache; returns its path.

        Raises:
            StoppedError: `stop` was set meanwhile.
            SurogateError: see `surogate_formats.hub_text`.
        """
        if self.offline:
            raise not_cached(self.name, file.name)
        with hub_errors(self.name):
            arguments: dict[str, Any] = {"local_dir": folder, "tqdm_class": bar_class(self.stop)}
            got = self.api.hf_hub_download(self.name, file.name, revision=self.commit, **arguments)
            return Path(os.path.realpath(got))

    def remember(self) -> None:
        """Has the cache note which commit the revision is, for those who ask it offline."""
        if not self.offline and CONFIG in self.files:
            with hub_errors(self.name):
                self.api.hf_hub_download(self.name, CONFIG, revision=self.revision)

    def start(self, file: HubFile) -> bytes:
        """The first bytes of a safetensors file: up to the end of its header.

        Raises:
            CheckpointError: it can't be one.
            SurogateError: see `surogate_formats.hub_text`.
        """
        where = f"{self.name}/{file.name}"
        with hub_errors(self.name), self._opened(file) as reader:
            prefix = reader.read(min(PREFIX_SIZE, file.size))
            return bytes(prefix + reader.read(header_size(prefix, file.size, where) - len(prefix)))

    def _opened(self, file: HubFile) -> Any:
        from huggingface_hub import HfFileSystem

        if (path := self.cached(file)) is not None:
            return path.open("rb")
        if self.offline:
            raise not_cached(self.name, file.name)
        files = HfFileSystem(token=self.api.token, skip_instance_cache=True)
        path_there = f"{self.name}@{self.commit}/{file.name}"
        return files.open(path_there, "rb", block_size=FIRST_READ, cache_type="readahead")


def _cached_files(snapshot: Path) -> dict[str, HubFile]:
    """A snapshot's files; a blob's name is the SHA-256 of its bytes, or git's SHA-1."""
    files = {}
    for path in snapshot.rglob("*"):
        if path.is_file():
            name = path.relative_to(snapshot).as_posix()
            blob = path.readlink().name if path.is_symlink() else ""
            hashes = (blob if pattern.fullmatch(blob) else None for pattern in (_SHA256, _SHA1))
            files[name] = HubFile(name, path.stat().st_size, *hashes)
    return files
