"""The output directory: nothing half-written is ever taken for whole, and a failed run leaves nothing behind."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from surogate_formats.layouts.modelopt import SIDECAR as MODELOPT_FILE
from surogate_formats.manifest import MANIFEST_NAME
from surogate_quantize.interruption import name_leftover, undisturbed
from surogate_quantize.output_errors import (
    DiskFullError,
    LeftoverError,
    OutputExistsError,
    OutputInSourceError,
    OutputNotWritableError,
    disk_errors,
    locked,
)
from surogate_quantize.sidecars import TEMPLATES, is_carried
from surogate_quantize.syncing import sync_directory

STAGING = ".surogate-staging"
"""Folder inside the output directory where files grow; a finished artifact has none."""

_LAST = ("config.json", MANIFEST_NAME)
"""Renamed last, in this order: without them no loader takes the directory for a model."""


def check_output(out: Path, source: Path, *, overwrite: bool) -> None:
    """Refuses an output directory that would harm something; touches nothing.

    Raises:
        OutputInSourceError: see the class.
        OutputExistsError: see the class; with `overwrite` only a directory that is no artifact of ours.
        LeftoverError: see the class; not with `overwrite`.
        OutputBusyError: another run is writing there.
        OutputNotWritableError: the directory can't be looked into.
    """
    with disk_errors(out):
        here, there = out.resolve(), source.resolve()
        if here == there or there in here.parents or here in there.parents:
            raise OutputInSourceError(f"`out` {out}: overlaps with the source {source}; choose a directory beside it")
        if not out.exists() and not out.is_symlink():
            return
        if not out.is_dir():
            raise OutputExistsError(f"`out` {out}: is not a directory; choose another")
        names = {entry.name for entry in out.iterdir()}
    if names == {STAGING}:
        _check_leftover(out, overwrite=overwrite)
    if names and not overwrite:
        raise OutputExistsError(
            f"`out` {out}: is not empty; choose another, or `overwrite=True` to replace an artifact"
        )
    if names and not names & {MANIFEST_NAME, STAGING}:
        raise OutputExistsError(
            f"`out` {out}: holds no {MANIFEST_NAME}, so `overwrite=True` won't touch it; choose another"
        )
    strangers = sorted(name for name in names if not _is_ours(name))
    if strangers:
        raise OutputExistsError(
            f"`out` {out}: holds {', '.join(strangers[:3])}, which is no part of an artifact; move it away first"
        )


def _check_leftover(out: Path, *, overwrite: bool) -> None:
    with disk_errors(out), locked(out):  # held for a moment, to see whether a run is writing there now
        pass
    if not overwrite:
        raise LeftoverError(
            f"`out` {out}: holds only {STAGING}, which a run that was killed left; `overwrite=True` replaces it, "
            "or remove the directory"
        )


def _is_ours(name: str) -> bool:
    """Whether a file of this name is one that a run writes."""
    shard = name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json"))
    return shard or name in {*_LAST, MODELOPT_FILE, STAGING, TEMPLATES} or is_carried(name)


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
    with disk_errors(out):
        _make(out, made)
    with disk_errors(out), locked(out), _staged(out, needed, made) as staging:
        yield staging


def _make(out: Path, missing: list[Path]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileNotFoundError, FileExistsError) as error:
        raise OutputNotWritableError(
            f"`out` {out}: {missing[-1]} can't be made ({error.strerror}); choose another directory"
        ) from error


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
    except BaseException as error:
        with undisturbed():
            # Over an old artifact that is half replaced the folder stays: by its mark a rerun that overwrites replaces
            # the rest.
            with suppress(OSError):
                _remove(out.iterdir() if fresh else [] if publishing else [staging])
            for folder in made:
                with suppress(OSError):
                    folder.rmdir()
        if staging.exists():
            name_leftover(error, f"{staging} is left, and a rerun that overwrites replaces it")
        raise


def _check_room(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if free < needed:
        raise DiskFullError(
            f"`out` {out}: {needed / 1e9:.2f} GB will be written, {free / 1e9:.2f} GB are free; choose another disk"
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
