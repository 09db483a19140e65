"""Whether an artifact of ours is what its manifest says: names, dtypes and shapes at once, bytes on request."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from surogate_formats.checkpoint import Checkpoint
from surogate_formats.checkpoint.directory import Directory
from surogate_formats.dtype_rules import STORED_AS
from surogate_formats.errors import ArtifactError
from surogate_formats.format import TensorSpec
from surogate_formats.layouts import stored_tensors
from surogate_formats.manifest import MANIFEST_NAME, Manifest

if TYPE_CHECKING:
    from surogate_formats.artifact import Artifact

PIECE = 1 << 20
"""Bytes of a file that are in memory at a time while it is hashed."""


class CorruptArtifactError(ArtifactError):
    """The bytes of a tensor or of a file beside the weights are not those that the manifest records."""


def check_files(artifact: Artifact) -> None:
    """Compares what the config declares, and every tensor's name, dtype and shape, with the manifest.

    Raises:
        ArtifactError: the first disagreement.
    """
    manifest, tensors, path = artifact.manifest, artifact.checkpoint.tensors, artifact.path
    declared, _ = artifact.layout.parse_config(artifact.quantization_config)
    if artifact.layout.name != manifest.layout or declared.name != artifact.format.name:
        raise ArtifactError(f"{path}: config.json and {MANIFEST_NAME} declare different formats; quantize again")
    expected = {name for record in manifest.tensors.values() for name in record.stored}
    if expected != tensors.keys():
        name = sorted(expected ^ tensors.keys())[0]
        raise ArtifactError(f"{path}: {MANIFEST_NAME} and the files disagree about {name}; quantize again")
    _check_kept(path, artifact.checkpoint, manifest)
    for module, shape in artifact.modules.items():
        for stored in stored_tensors(artifact.layout, artifact.format, module, shape).values():
            if stored.name not in expected:
                raise ArtifactError(f"{path}: {stored.name} is missing; quantize again")
            info = tensors[stored.name].info
            found = TensorSpec(info.dtype, info.shape)
            if found != stored.spec:
                raise ArtifactError(
                    f"{path}: {stored.name} is {found.dtype} {list(found.shape)}, expected "
                    f"{stored.spec.dtype} {list(stored.spec.shape)}; quantize again"
                )


def verify_hashes(path: Path, checkpoint: Checkpoint, manifest: Manifest) -> int:
    """Compares every file beside the weights, and every tensor, with its recorded SHA-256.

    Returns:
        The number of tensors.

    Raises:
        CorruptArtifactError: the first tensor or file that differs or is missing, by name.
    """
    with Directory(path) as directory:
        for name, expected in manifest.sidecars.items():
            if _file_sha256(directory, name) != expected:
                raise CorruptArtifactError(f"{path}: {name} has changed since it was written; quantize again")
    count = 0
    for record in manifest.tensors.values():
        for name, expected in record.stored.items():
            if hashlib.sha256(checkpoint.read(name).tobytes()).hexdigest() != expected:
                raise CorruptArtifactError(f"{path}: {name} has changed since it was written; quantize again")
            count += 1
    return count


def _check_kept(path: Path, checkpoint: Checkpoint, manifest: Manifest) -> None:
    for name, record in manifest.tensors.items():
        info = checkpoint.tensors[name].info if record.decision == "keep" else None
        dtype = STORED_AS.get(record.dtype, record.dtype)
        if info is not None and (info.dtype, info.shape) != (dtype, record.shape):
            raise ArtifactError(
                f"{path}: {name} is {info.dtype} {list(info.shape)}, {MANIFEST_NAME} says {dtype} "
                f"{list(record.shape)}; quantize again"
            )


def _file_sha256(directory: Directory, name: str) -> str:
    try:
        descriptor = directory.open(name)
    except FileNotFoundError:
        raise CorruptArtifactError(f"{directory.show(name)}: missing; quantize again") from None
    digest = hashlib.sha256()
    with os.fdopen(descriptor, "rb") as file:
        while data := file.read(PIECE):
            digest.update(data)
    return digest.hexdigest()
