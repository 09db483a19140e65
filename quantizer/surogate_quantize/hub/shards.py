"""Shards of a repository on the Hub: each is here while its tensors are worked on, and no longer."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from surogate_formats.checkpoint.errors import shown
from surogate_quantize.hub.errors import DamagedDownloadError, StoppedError
from surogate_quantize.hub.repository import HubFile, HubRepository

AHEAD = 2
"""Shards that may be on disk for the next one to be fetched in advance."""

PIECE = 1 << 20
"""Bytes of a shard that are in memory at a time while it is hashed."""

LOOK_EVERY = 0.1
"""Seconds between two looks at whether the run was ended."""

LAST_WAIT = 1.0
"""Seconds that downloads get to end in once they were told to: one that gets no bytes isn't told."""

_Place = Callable[[str, Path], None]


class _Arrival:
    """A shard that is on its way, or here."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.error: BaseException | None = None
        self.path: Path | None = None


class HubShards:
    """Fetches shards as they are needed, the next one in advance, and deletes each after its last tensor.

    What the cache holds is used where it stands, and stays. Thread-safe.

    Args:
        repository: where they come from.
        files: in the order in which they will be needed.
        folder: where downloads go, and are deleted; None leaves them in the cache.
        place: told a shard's name and path once it is here, whole and checked.
    """

    def __init__(self, repository: HubRepository, files: Sequence[HubFile], folder: Path | None, place: _Place) -> None:
        self._repository = repository
        self._files = {file.name: file for file in files}
        self._order = [file.name for file in files]
        self._folder = folder
        self._place = place
        self._left: Counter[str] = Counter()
        self._arrivals: dict[str, _Arrival] = {}
        self._lock = threading.Lock()

    def need(self, name: str) -> None:
        """Returns once a shard is here.

        Raises:
            DamagedDownloadError: its bytes aren't those that the Hub has.
            StoppedError: the run was ended meanwhile.
            SurogateError: see `surogate_formats.hub_text`.
        """
        arrival = self._arrivals.get(name)
        if arrival is None or not arrival.done.is_set():
            arrival = self._start(name)
            self._start_next(name)
            while not arrival.done.wait(LOOK_EVERY):
                if self._repository.stop.is_set():
                    raise StoppedError("the run was ended")
        if arrival.error is not None:
            raise arrival.error

    def expect(self, counts: Counter[str]) -> None:
        """Takes the number of tensors that `settled` will be told of, by shard."""
        self._left = counts

    def settled(self, name: str) -> None:
        """Takes note that a tensor of a shard is done; after the last one the shard goes."""
        self._left[name] -= 1
        if self._left[name] > 0:
            return
        with self._lock:
            arrival = self._arrivals.pop(name, None)
        path = arrival.path if arrival else None
        if path is not None and self._folder is not None and self._folder in path.parents:
            os.truncate(path, 0)  # the reader's descriptor would keep the bytes on the disk
            path.unlink()

    def give_up(self) -> None:
        """Ends the downloads under way, and waits for them: what they write to may go afterwards."""
        self._repository.stop.set()
        end = time.monotonic() + LAST_WAIT
        with self._lock:
            arrivals = list(self._arrivals.values())
        for arrival in arrivals:
            arrival.done.wait(max(0.0, end - time.monotonic()))

    def _start(self, name: str) -> _Arrival:
        with self._lock:
            arrival = self._arrivals.get(name)
            if arrival is None:
                arrival = self._arrivals[name] = _Arrival()
                threading.Thread(target=self._fetch, args=(name, arrival), daemon=True, name=f"fetch {name}").start()
            return arrival

    def _start_next(self, name: str) -> None:
        following = self._order[self._order.index(name) + 1 :][:1]
        if following and len(self._arrivals) < AHEAD and self._left[following[0]] > 0:
            self._start(following[0])

    def _fetch(self, name: str, arrival: _Arrival) -> None:
        file = self._files[name]
        try:
            path = self._repository.cached(file)
            if self._repository.stop.is_set():
                raise StoppedError("the run was ended")
            if path is None:
                path = self._repository.download(file, self._folder)
            check(self._repository, file, path)
            arrival.path = path
            self._place(name, path)
        except BaseException as error:  # whatever it is, it is the waiting thread's to raise
            arrival.error = error
        arrival.done.set()


def check(repository: HubRepository, file: HubFile, path: Path) -> None:
    """Holds the bytes of a file against the hash that the Hub gives.

    Raises:
        DamagedDownloadError: they differ.
        StoppedError: the run was ended meanwhile.
    """
    size = path.stat().st_size
    digest: Any = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    expected = file.sha256 or file.git_oid
    if expected is None and size == file.size:
        return
    with path.open("rb") as reader:
        while data := reader.read(PIECE):
            digest.update(data)
            if repository.stop.is_set():
                raise StoppedError("the run was ended")
    found = digest.hexdigest()
    if size != file.size or found != expected:
        raise DamagedDownloadError(
            f"{repository.name}/{file.name}: {size} bytes with hash {found}, and the Hub has {file.size} with "
            f"{expected}; run it again{_way_out(repository, file)}"
        )


def _way_out(repository: HubRepository, file: HubFile) -> str:
    cached = repository.cached(file)
    return f" without {shown(cached)}, which is damaged: remove it" if cached is not None else ""
