"""What an unfinished run was asked for, so that only the same command goes on with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from surogate_formats.checkpoint import Checkpoint
from surogate_formats.format import to_dict
from surogate_quantize.hub.opening import OpenedSource
from surogate_quantize.plan import Plan
from surogate_quantize.version import VERSION

Identity = Mapping[str, Any]
"""JSON-ready: everything that the bytes of a run's shards depend on."""


def run_identity(opened: OpenedSource, made: Plan, settings: Mapping[str, Any]) -> Identity:
    """The identity of a run; `settings` are what calibrated codes depend on beside the options.

    Of a local file the time of its last change stands for its payload, which nobody has hashed; a repository's commit
    says it all.
    """
    source, options = opened.checkpoint, made.options
    changed = {} if opened.revision else last_changes(source)
    files = {file.name: {**asdict(file), "modified": changed.get(file.name)} for file in source.files}
    identity = {
        "version": VERSION,
        "source": opened.name,
        "revision": opened.revision,
        "files": files,
        "config.json": hashlib.sha256(source.config_bytes).hexdigest(),
        "format": to_dict(options.format),
        "layout": options.layout.name,
        "options": {**options.recorded(), **settings},
        "recipe": asdict(options.recipe),
        "lora": asdict(options.lora),
    }
    plain: Identity = json.loads(json.dumps(identity))
    return plain


def last_changes(source: Checkpoint) -> dict[str, int]:
    """When each shard of a local checkpoint was last changed, in nanoseconds of its file system's clock."""
    return {file.name: (source.directory / file.name).stat().st_mtime_ns for file in source.files}


def difference(before: Identity, now: Identity) -> str | None:
    """The first thing in which two runs differ, and its value in both; None if they are the same."""
    old, new = ({key: repr(value) for key, value in _flat(identity)} for identity in (before, now))
    for key in [*new, *(key for key in old if key not in new)]:
        if old.get(key) != new.get(key):
            return f"{key} {old.get(key, 'nothing')} there, {new.get(key, 'nothing')} here"
    return None


def _flat(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value
