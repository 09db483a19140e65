"""The output directory: nothing half-written is ever taken for whole, and a failed run leaves nothing behind."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None  # type: ignore[assignment]

from surogate_formats.errors import SurogateError, UsageError
from surogate_formats.manifest import MANIFEST_NAME
from surogate_quantize.sidecars import TEMPLATES, is_carried
from surogate_quantize.syncing import sync_directory

STAGING = ".surogate-staging"
"""Folder inside the output directory where files grow; a finished artifact has none."""

_LAST = ("config.json", MANIFEST_NAME)
"""Renamed last, in this order: without them no loader takes the directory for a model."""


class OutputExistsError(UsageError):
    """`--out` is a file, or holds something that we would mix with or destroy."""


class OutputInSourceError(UsageError):
    """`--out` is the source, inside it, or around it."""


class OutputBusyError(SurogateError):
    """Another run is writing into `--out`."""


class DiskFullError(SurogateError):
    """The disk has no room for the artifact."""


class OutputNotWritableError(SurogateError):
    """The output directory can't be made or written to."""


def check_output(out: Path, source: Path, *, overwrite: bool) -> None:
    """Refuses an output directory that would harm something; touches nothing.

    Raises:
        OutputInSourceError: see the class.
        OutputExistsError: see the class; with `overwrite` only a directory that is no artifact of ours.
        OutputNotWritableError: the directory can't be looked into.
    """
    with _disk_errors(out):
        here, there = out.resolve(), source.resolve()
        if here == there or there in here.parents or here in there.parents:
            raise OutputInSourceError(f"--out {out}: overlaps with the source {source}; choose a directory beside it")
        if not out.exists() and not out.is_symlink():
            return
        if not out.is_dir():
            raise OutputExistsError(f"--out {out}: is not a directory; choose another")
        names = {entry.name for entry in out.iterdir()}
    if names and not overwrite:
        raise OutputExistsError(f"--out {out}: is not empty; choose another, or --overwrite to replace an artifact")
    if names and not names & {MANIFEST_NAME, STAGING}:
        raise OutputExistsError(f"--out {out}: holds no {MANIFEST_NAME}, so --overwrite won't touch it; choose another")
    strangers = sorted(name for name in names if not _is_ours(name))
    if strangers:
        raise OutputExistsError(
            f"--out {out}: holds {', '.join(strangers[:3])}, which is no part of an artifact; move it away first"
        )


def _is_ours(name: str) -> bool:
    """Whether a file of this name is one that a run writes."""
    shard = name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json"))
    return shard or name in {*_LAST, STAGING, TEMPLATES} or is_carried(name)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Holds the directory against a second run; the lock goes with the process, so a crash locks nobody out."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputBusyError(
                f"--out {out}: another run is writing there; wait for it, or choose another"
            ) from None
        yield
    finally:
        os.close(descriptor)


@contextmanager
def staged(out: Path, needed: int) -> Iterator[Path]:
    """A staging folder whose files become the artifact when the block ends well, and vanish when it doesn't.

    Args:
        out: the output directory, checked by `check_output`.
        needed: bytes that will be written.

    Raises:
        DiskFullError: too little room, seen before or while writing.
        OutputBusyError: another run is writing there.
        OutputNotWritableError: the directory can't be made or written to.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    with _disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with _disk_errors(out), _locked(out), _staged(out, needed, made) as staging:
        yield staging


@contextmanager
def _staged(out: Path, needed: int, made: list[Path]) -> Iterator[Path]:
    fresh = not {entry.name for entry in out.iterdir()} - {STAGING}
    staging = out / STAGING
    publishing = False
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        _check_room(out, needed)
        yield staging
        publishing = True
        _publish(staging, out)
    except BaseException:
        with suppress(OSError):
            if fresh:
                _remove(out.iterdir())
            elif not publishing:
                # Else the folder stays: by its mark a rerun with --overwrite replaces the rest of the old artifact.
                _remove([staging])
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(f"--out {out}: the disk is full; free some space or choose another disk") from error
        raise OutputNotWritableError(f"--out {out}: {error.strerror}; choose another directory") from error


def _check_room(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if free < needed:
        raise DiskFullError(
            f"--out {out}: {needed / 1e9:.2f} GB will be written, {free / 1e9:.2f} GB are free; choose another disk"
        )


def _publish(staging: Path, out: Path) -> None:
    """Takes an old artifact's marks away first and gives the new ones last, so that no moment shows a mix of both."""
    fresh = {entry.name for entry in staging.iterdir()}
    for name in reversed(_LAST):
        (out / name).unlink(missing_ok=True)
    sync_directory(out)
    _remove(entry for entry in out.iterdir() if entry.name != STAGING and entry.name not in fresh)
    for name in [*sorted(fresh - set(_LAST)), *_LAST]:
        target = out / name
        if target.is_dir() and not target.is_symlink():
            _remove([target])
        (staging / name).replace(target)
        if name in _LAST:
            sync_directory(out)
    staging.rmdir()
    sync_directory(out)


def _remove(entries: Iterable[Path]) -> None:
    for entry in list(entries):
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink(missing_ok=True)
