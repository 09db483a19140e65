"""Opens MODEL: a local directory, or a repository on the Hub whose shards come one after the other."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from surogate_formats.checkpoint import Checkpoint
from surogate_formats.hub_text import HUB_ID, RevisionOfDirectoryError, named_for, quiet_hub
from surogate_quantize.hub.checkpoint import HubCheckpoint, fill
from surogate_quantize.hub.repository import HubRepository
from surogate_quantize.hub.stopping import stopping
from surogate_quantize.interruption import undisturbed
from surogate_quantize.output_errors import OutputBusyError, disk_errors, locked
from surogate_quantize.plan import PlannedTensor

SHARDS_AT_ONCE = 3
"""Shards for which the disk should have room beside the artifact."""


@dataclass(frozen=True)
class OpenedSource:
    """A source, wherever it lies.

    Attributes:
        checkpoint: its tensors.
        name: what the manifest calls it.
        revision: its commit, where it is known.
        room: bytes of disk that it needs beside the artifact where each shard goes when it is done.
        whole_room: the same where all are kept to the end.
        expect: to be told of all tensors that will be worked on, before the first.
        settled: to be told of each tensor that is done.
    """

    checkpoint: Checkpoint
    name: str
    revision: str | None
    room: int = 0
    whole_room: int = 0
    expect: Callable[[Sequence[PlannedTensor]], None] = lambda tensors: None
    settled: Callable[[PlannedTensor], None] = lambda tensor: None


@contextmanager
def open_source(
    model: str | Path, near: Path | None, *, revision: str | None, token: str | None, keep_source: bool
) -> Iterator[OpenedSource]:
    """Opens a model for the block; a directory that exists wins over a repository of the same name.

    Args:
        model: a directory, or a repository's name.
        near: the output directory, beside which shards are downloaded; None takes the system's temporary folder.
        revision: branch, tag or commit of a repository.
        token: for the Hub; None takes HF_TOKEN or the stored login.
        keep_source: leave downloaded shards in the Hub's cache.

    Raises:
        RevisionOfDirectoryError: a revision of a local directory.
        CheckpointError: it is no checkpoint.
        SurogateError: see `surogate_formats.hub_text`.
    """
    if Path(model).exists() or not HUB_ID.fullmatch(str(model)):
        if revision is not None:
            raise RevisionOfDirectoryError(f"`revision` {revision}: {model} is a local directory; leave it out")
        with Checkpoint.open(model) as checkpoint:
            yield OpenedSource(checkpoint, *source_identity(checkpoint.directory))
        return
    stop = Event()
    with quiet_hub(bars=False), _folder(near) as folder, stopping(stop):
        repository = HubRepository.resolve(str(model), revision, token, stop)
        with named_for(str(folder / "model"), repository.name):
            yield from _opened(repository, folder, keep_source=keep_source)


def source_identity(directory: Path) -> tuple[str, str | None]:
    """Name and revision of a source: from the path of a Hub cache's snapshot, else the directory's name alone."""
    path = directory.absolute()
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/"), path.name
    return path.resolve().name, None


def _opened(repository: HubRepository, folder: Path, *, keep_source: bool) -> Iterator[OpenedSource]:
    model, downloads = folder / "model", None if keep_source else folder / "shards"
    files, unused = fill(repository, model, model if downloads else None)
    if keep_source:
        repository.remember()
    checkpoint = HubCheckpoint(model, repository, files, downloads)
    checkpoint.unused = unused
    remote = sorted(file.size for file in files if repository.cached(file) is None)

    def file(tensor: PlannedTensor) -> str:
        return checkpoint.entry(tensor.info.name).file

    with checkpoint:
        try:
            yield OpenedSource(
                checkpoint,
                repository.name,
                repository.commit,
                0 if keep_source else sum(remote[-SHARDS_AT_ONCE:]),
                0 if keep_source else sum(remote),
                lambda tensors: checkpoint.shards.expect(Counter(map(file, tensors))),
                lambda tensor: checkpoint.shards.settled(file(tensor)),
            )
        finally:
            checkpoint.shards.give_up()


@contextmanager
def _folder(near: Path | None) -> Iterator[Path]:
    """A folder on the output's disk that goes with everything in it."""
    parent = next((path for path in near.absolute().parents if path.is_dir()), None) if near is not None else None
    prefix = f".{near.name}-source-" if near else "surogate-source-"
    with ExitStack() as stack:
        with disk_errors(near or Path(tempfile.gettempdir())):
            if parent is not None:
                _clear(parent, prefix)
            folder = _made(parent, prefix, stack)
            (folder / "model").mkdir()
        try:
            yield folder.resolve()
        finally:
            with undisturbed():
                shutil.rmtree(folder, ignore_errors=True)


def _made(parent: Path | None, prefix: str, stack: ExitStack) -> Path:
    """A new folder, held until the stack unwinds."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        with suppress(OutputBusyError, FileNotFoundError):
            stack.enter_context(locked(folder))
            if folder.exists():  # else another run took it for a leftover, in the moment before it was held
                return folder


def _clear(parent: Path, prefix: str) -> None:
    """Removes what killed runs have left: folders that no process holds."""
    for folder in [entry for entry in parent.iterdir() if entry.name.startswith(prefix)]:
        if folder.is_dir() and not folder.is_symlink():
            with suppress(OutputBusyError, OSError), locked(folder, surely=True):
                shutil.rmtree(folder, ignore_errors=True)
