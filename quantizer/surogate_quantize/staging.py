"""The staging folder: an artifact grows in it, survives an interruption, and appears whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from surogate_formats.artifact import STAGING
from surogate_formats.checkpoint.errors import UnreadableFileError
from surogate_formats.errors import CheckpointError, NonFiniteWeightError, OutOfRangeError, SurogateError
from surogate_quantize.interruption import name_leftover, undisturbed
from surogate_quantize.output import MARKS, PUBLISHING, is_ours, remove
from surogate_quantize.output_errors import (
    DiskFullError,
    OtherRunError,
    OutputBusyError,
    OutputNotWritableError,
    disk_errors,
    locked,
)
from surogate_quantize.output_shards import PART
from surogate_quantize.report import size
from surogate_quantize.run_identity import Identity, difference
from surogate_quantize.sidecars import shard_names
from surogate_quantize.syncing import replace_synced, sync_directory, write_synced

_RUN = "run.json"

_WRONG_INPUT = (NonFiniteWeightError, OutOfRangeError, CheckpointError)
"""A rerun would meet these again, so nothing is kept for it."""


class Staging:
    """What a run has in its output directory before the artifact is complete.

    Attributes:
        files: folder of the artifact's files.
        records: folder of what became of the tensors in finished shards.
    """

    def __init__(self, out: Path, shards: int) -> None:
        """Makes nothing yet; the artifact has so many shards."""
        self.out, self._shards, self._shard_names = out, shards, shard_names(shards)
        self.path = out / STAGING
        self.files, self.records = self.path / "files", self.path / "shards"
        self.calibration = self.path / "calibration"

    @property
    def finished(self) -> str | None:
        """Says what is finished; None if nothing is."""
        done, blocks = (
            sum(1 for _ in self.records.glob("*.json")),
            sum(1 for _ in self.calibration.glob("block-*.safetensors")),
        )
        what = f"{done} of {self._shards} shards are finished" if done else f"{blocks} blocks are calibrated"
        return f"{what}, and the same command goes on from there" if done or blocks else None

    def check(self, identity: Identity, *, overwrite: bool) -> str | None:
        """What an unfinished run there was asked for otherwise; None if it was asked for the same, or if there is none.

        Raises:
            OtherRunError: there is one, with finished shards, and `overwrite` is not given.
        """
        other = self._difference(identity) if self.path.exists() else None
        if other is None or overwrite or not self.finished:
            return other
        if other.startswith("files."):
            raise OtherRunError(
                f"`out` {self.out}: holds an unfinished run, and the source has changed since ({other}); "
                "`overwrite=True` starts anew"
            )
        raise OtherRunError(
            f"`out` {self.out}: holds an unfinished run of another command ({other}); give that command again "
            "to finish it, or `overwrite=True` to start anew"
        )

    def open(self, identity: Identity, *, overwrite: bool) -> None:
        """Makes the folders, or takes those of a run that was interrupted.

        Raises:
            OtherRunError: see `check`.
        """
        if self.path.exists():
            if self.check(identity, overwrite=overwrite) is None:
                self._take_back()
                return
            if (self.path / PUBLISHING).exists():
                self._take_back()
            # The folder itself stays: without it, what a half-published run has left in `out` would be nobody's.
            remove(self.path.iterdir())
        for folder in (self.path, self.files, self.records):
            folder.mkdir(exist_ok=True)
        write_synced(self.path / (_RUN + PART), json.dumps(identity, indent=1).encode())
        replace_synced(self.path / (_RUN + PART), self.path / _RUN)
        sync_directory(self.out)

    def check_room(self, needed: int) -> None:
        """Raises `DiskFullError` if the disk has no room for so many bytes."""
        free = shutil.disk_usage(self.out).free
        if free < needed:
            raise DiskFullError(
                f"`out` {self.out}: {size(needed)} will be written, {size(free)} are free; choose another disk"
            )

    def publish(self) -> None:
        """Makes the files the artifact: takes an old one's marks away first and gives the new ones last."""
        sync_directory(self.files)
        write_synced(self.path / PUBLISHING, b"")
        sync_directory(self.path)
        fresh = {entry.name for entry in self.files.iterdir()}
        self._unmark()
        self._remove_old(fresh)
        for name in sorted(fresh - set(MARKS)):
            target = self.out / name
            if target.is_dir() and not target.is_symlink():
                remove([target])
            (self.files / name).replace(target)
        with undisturbed():  # it takes a moment, and from the first mark on nothing may be cleaned away
            for name in MARKS:
                sync_directory(self.out)
                (self.files / name).replace(self.out / name)
            sync_directory(self.out)
            with suppress(OSError):  # the artifact is complete
                remove([self.path])
                sync_directory(self.out)

    def clean(self) -> None:
        """Takes away what is no finished shard."""
        remove(entry for entry in self.files.iterdir() if entry.name not in self._shard_names)

    def _difference(self, identity: Identity) -> str | None:
        try:
            before = json.loads((self.path / _RUN).read_bytes())
            return difference(dict(before), identity)
        except (OSError, ValueError, TypeError, RecursionError):
            return "which one can't be read"

    def _take_back(self) -> None:
        """Undoes a publication that was interrupted, and what other than finished shards is left."""
        for folder in (self.files, self.records):
            folder.mkdir(exist_ok=True)
        if (self.path / PUBLISHING).exists():
            self._unmark()
            for name in self._shard_names:
                # One that stands in both is of the artifact that was to be replaced.
                if (self.out / name).exists() and not (self.files / name).exists():
                    (self.out / name).replace(self.files / name)
            for folder in (self.files, self.out):
                sync_directory(folder)
            self._remove_old(set())
            sync_directory(self.out)
            (self.path / PUBLISHING).unlink()
            sync_directory(self.path)
        self.clean()

    def _remove_old(self, fresh: Collection[str]) -> None:
        """Removes what an old artifact has left; a file of somebody's that came meanwhile stays."""
        old = (entry for entry in self.out.iterdir() if entry.name != STAGING and is_ours(entry.name))
        remove(entry for entry in old if entry.name not in fresh)

    def _unmark(self) -> None:
        for name in reversed(MARKS):
            (self.out / name).unlink(missing_ok=True)
        sync_directory(self.out)


@contextmanager
def staged(staging: Staging, identity: Identity, *, overwrite: bool) -> Iterator[None]:
    """Opens a staging folder for the block, whose files become the artifact when the block ends well.

    When it doesn't, finished shards stay for the next run of the same command, unless the input was wrong; everything
    else vanishes.

    Args:
        staging: the folder; its output directory was checked by `check_output`.
        identity: what the run is asked for.
        overwrite: discard what an unfinished run of another command has left.

    Raises:
        DiskFullError: too little room while writing.
        OtherRunError: see `Staging.open`.
        OutputBusyError: another run is writing there.
        OutputNotWritableError: the directory can't be made or written to.
    """
    out = staging.out
    with disk_errors(out), _made(out), locked(out), _cleaned(staging), disk_errors(out):
        staging.open(identity, overwrite=overwrite)
        yield
        staging.publish()


@contextmanager
def _made(out: Path) -> Iterator[None]:
    """Makes the directory and those above it; after a failure those that are empty go again."""
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except (FileNotFoundError, FileExistsError) as error:
            raise OutputNotWritableError(
                f"`out` {out}: {missing[-1]} can't be made ({error.strerror}); choose another directory"
            ) from error
        for folder in missing:
            sync_directory(folder.parent)
        yield
    except OutputBusyError:
        raise
    except BaseException:
        with undisturbed():
            for folder in missing:
                with suppress(OSError):
                    folder.rmdir()
        raise


@contextmanager
def _cleaned(staging: Staging) -> Iterator[None]:
    """Takes away what a block that fails must not leave."""
    out = staging.out
    fresh = not {entry.name for entry in out.iterdir()} - {STAGING}

    def made() -> Iterator[Path]:
        return (entry for entry in out.iterdir() if is_ours(entry.name)) if fresh else iter([staging.path])

    try:
        yield
    except OtherRunError:
        raise
    except BaseException as error:
        with undisturbed():
            wrong = isinstance(error, _WRONG_INPUT) and not isinstance(error, UnreadableFileError)
            kept = None if wrong else staging.finished
            with suppress(OSError):
                staging.clean() if kept else remove(made())
        if kept:
            _say(error, kept)
        if staging.path.exists():
            name_leftover(error, f"{staging.path} is left, and a rerun replaces it")
        raise


def _say(error: BaseException, text: str) -> NoReturn:
    if isinstance(error, SurogateError):
        raise type(error)(f"{error}; {text}") from error
    name_leftover(error, text)
    raise error
