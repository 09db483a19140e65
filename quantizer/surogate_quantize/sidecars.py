"""The files beside the weights: which of them go along, and config.json."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from surogate_formats.checkpoint.directory import Directory
from surogate_formats.checkpoint.errors import shown
from surogate_formats.checkpoint.files import unreadable
from surogate_formats.checkpoint.reader import CONFIG
from surogate_formats.errors import CheckpointError
from surogate_formats.layouts import SidecarLayout
from surogate_quantize.plan import Plan
from surogate_quantize.syncing import sync, sync_directory

CARRIED = (
    "tokenizer*",
    "tekken.json",
    "*.spm",
    "*.codes",
    "normalizer.json",
    "dict.txt",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template*",
    "*processor_config.json",
    "preprocessor_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Names of files that a user of the artifact needs; weights, code and the source's card are not among them."""

TEMPLATES = "additional_chat_templates"
"""Folder of which the `*.jinja` go along."""

COPY_PIECE = 1 << 20
"""Bytes of a file that are in memory at a time."""


class OutsideLinkError(CheckpointError):
    """A file that would go along is a link out of the source: copying it would publish a file of somebody's."""


def find_sidecars(source: Path) -> tuple[str, ...]:
    """Paths, relative to the source, of the files that go along, sorted; every one was opened once.

    A link may lead to another file of the source or, as in the Hub's cache, to a blob of the same repository.

    Raises:
        OutsideLinkError: a link leads elsewhere.
        SymlinkedDirectoryError: the folder of templates is a link.
        NotARegularFileError: a pipe, a socket or a device.
        UnreadableFileError: one of them may not be read, or is a link to nothing.
    """
    with Directory(source) as opened:
        names = [name for name in opened.names if is_carried(name) and not (source / name).is_dir()]
        if TEMPLATES in opened.names:
            names += [f"{TEMPLATES}/{entry.name}" for entry in (source / TEMPLATES).glob("*.jinja")]
        for name in names:
            _check_link(source, name)
            os.close(_open(opened, name))
    return tuple(sorted(names))


def carry_over(source: Path, names: Iterable[str], target: Path) -> dict[str, str]:
    """Copies files (contents, never links) and syncs them; returns the SHA-256 of each.

    Raises:
        UnreadableFileError: one of them may not be read.
    """
    hashes = {}
    with Directory(source) as opened:
        for name in names:
            (target / name).parent.mkdir(exist_ok=True)
            hashes[name] = _copy(_open(opened, name), target / name)
    if (target / TEMPLATES).is_dir():
        sync_directory(target / TEMPLATES)
    return hashes


def carried_names(names: Iterable[str]) -> list[str]:
    """What a summary lists: files, and the folder of templates once."""
    return list(dict.fromkeys(name.partition("/")[0] for name in names))


def _check_link(source: Path, name: str) -> None:
    here, there = (Path(os.path.realpath(path)) for path in (source, source / name))
    blobs = here.parent.parent / "blobs"
    if here in there.parents or (here.parent.name == "snapshots" and there.parent == blobs):
        return
    raise OutsideLinkError(
        f"{shown(source / name)}: a symbolic link to {shown(there)}, outside the model's directory; "
        "put the file itself there, or remove the link"
    )


def _open(source: Directory, name: str) -> int:
    try:
        return source.open(name)
    except FileNotFoundError as error:  # a link to nothing
        raise unreadable(source.show(name), error) from None


def _copy(descriptor: int, target: Path) -> str:
    digest = hashlib.sha256()
    with os.fdopen(descriptor, "rb") as reader, target.open("xb") as writer:
        while data := reader.read(COPY_PIECE):
            digest.update(data)
            writer.write(data)
        writer.flush()
        sync(writer.fileno())
    return digest.hexdigest()


def is_carried(name: str) -> bool:
    """Whether a file of the source's directory goes along."""
    if name.endswith((".safetensors", ".bin", ".pt", ".pth", ".gguf", ".py")):
        return False
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in CARRIED)


def quantized_configs(config: dict[str, Any], plan: Plan) -> dict[str, bytes]:
    """config.json of the artifact, which is the source's and how it is quantized, and what its readers want beside it.

    Returns:
        File name to content.
    """
    layout = plan.options.layout
    declared = layout.quantization_config(plan.options.format, plan.kept_modules())
    beside = layout.sidecars(declared) if isinstance(layout, SidecarLayout) else {}
    contents = {CONFIG: {**config, "quantization_config": declared}, **beside}
    return {name: json.dumps(content, indent=2).encode() + b"\n" for name, content in contents.items()}


def shard_names(count: int) -> list[str]:
    """File names of the shards, as transformers writes them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def shard_index(plan: Plan, names: list[str]) -> bytes:
    """`model.safetensors.index.json`."""
    weight_map = {stored.name: names[tensor.shard] for tensor in plan.tensors for stored in tensor.stored.values()}
    total = sum(tensor.stored_bytes for tensor in plan.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2).encode() + b"\n"
