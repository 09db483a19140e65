"""The output directory: what may be written to."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from surogate_formats.artifact import ADAPTER, STAGING
from surogate_formats.layouts.modelopt import SIDECAR as MODELOPT_FILE
from surogate_formats.manifest import MANIFEST_NAME
from surogate_quantize.output_errors import (
    OutputExistsError,
    OutputInSourceError,
    disk_errors,
    locked,
)
from surogate_quantize.sidecars import TEMPLATES, is_carried

PUBLISHING = "publishing"
"""File in the staging folder from the moment when its files begin to move to their places."""

MARKS = ("config.json", MANIFEST_NAME)
"""Renamed last, in this order: without them no loader takes the directory for a model."""


def check_output(out: Path, source: Path, *, overwrite: bool) -> None:
    """Refuses an output directory that would harm something; touches nothing.

    Raises:
        OutputInSourceError: see the class.
        OutputExistsError: see the class; with `overwrite` only a directory that is no artifact of ours.
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
        with disk_errors(out), locked(out):  # held for a moment, to see whether a run is writing there now
            return
    unpublished = MANIFEST_NAME not in names and (out / STAGING / PUBLISHING).exists()
    if names and not overwrite and not unpublished:
        going_on = ", or to go on with the unfinished run" if STAGING in names else ""
        raise OutputExistsError(
            f"`out` {out}: is not empty; choose another, or `overwrite=True` to replace an artifact{going_on}"
        )
    if names and not names & {MANIFEST_NAME, STAGING}:
        raise OutputExistsError(
            f"`out` {out}: holds no {MANIFEST_NAME}, so `overwrite=True` won't touch it; choose another"
        )
    strangers = sorted(name for name in names if not is_ours(name))
    if strangers:
        raise OutputExistsError(
            f"`out` {out}: holds {', '.join(strangers[:3])}, which is no part of an artifact; move it away first"
        )


def is_ours(name: str) -> bool:
    """Whether a file of this name is one that a run writes."""
    shard = name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json"))
    return shard or name in {*MARKS, MODELOPT_FILE, STAGING, TEMPLATES, ADAPTER} or is_carried(name)


def remove(entries: Iterable[Path]) -> None:
    """Removes files, links and folders with everything in them."""
    for entry in list(entries):
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink(missing_ok=True)
