"""Whether an artifact of ours is what its manifest says: format, names, dtypes and shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surogate_formats.checkpoint.errors import quoted, shown
from surogate_formats.dtype_rules import STORED_AS
from surogate_formats.errors import ArtifactError, UsageError
from surogate_formats.format import Format, Shape, TensorSpec
from surogate_formats.layouts import stored_tensors
from surogate_formats.manifest import MANIFEST_NAME, Manifest
from surogate_formats.recipe import Recipe
from surogate_formats.registry import FORMATS, from_dict

if TYPE_CHECKING:
    from surogate_formats.artifact import Artifact


class UnknownParametersError(ArtifactError):
    """The manifest records a format or a recipe that doesn't exist."""


class CorruptArtifactError(ArtifactError):
    """The bytes of a tensor or of a file beside the weights are not those that the manifest records."""


class ContradictionError(ArtifactError):
    """config.json, the manifest and the files don't agree."""


def recorded_format(manifest: Manifest, where: str) -> Format:
    """The format that a manifest records; `where` names it.

    Raises:
        UnknownParametersError: there is no such format.
    """
    name = manifest.format.get("name")
    if not isinstance(name, str) or name not in FORMATS:
        raise UnknownParametersError(f"{where}: records the format {quoted(name)}, which is none; quantize again")
    try:
        return from_dict(dict(manifest.format))
    except UsageError as error:
        raise UnknownParametersError(f"{where}: {shown(error)}; quantize again") from error


def recorded_recipe(manifest: Manifest, where: str) -> Recipe:
    """The recipe that a manifest records; `where` names it.

    Raises:
        UnknownParametersError: there is no such recipe.
    """
    unknown = manifest.recipe.keys() - vars(Recipe()).keys()
    if unknown:
        raise UnknownParametersError(f"{where}: a recipe has no parameter {quoted(min(unknown))}; quantize again")
    try:
        return Recipe(**manifest.recipe)
    except UsageError as error:
        raise UnknownParametersError(f"{where}: {shown(error)}; quantize again") from error


def check_files(artifact: Artifact) -> None:
    """Compares what the config declares, and every tensor's name, dtype and shape, with the manifest.

    Raises:
        UnreadableConfigError: the config declares nothing that we read.
        ContradictionError: the first disagreement.
    """
    path = shown(artifact.path)
    _check_config(artifact, path)
    _check_names(artifact, path)
    for name, record in artifact.manifest.tensors.items():
        if record.decision == "keep":
            dtype = STORED_AS.get(record.dtype, record.dtype)
            _check_stored(artifact, path, name, TensorSpec(dtype, record.shape))
        else:
            _check_parts(artifact, path, name.removesuffix(".weight"), record.shape)


def _check_config(artifact: Artifact, path: str) -> None:
    layout, fmt = artifact.layout, artifact.format
    declared, kept = layout.parse_config(artifact.quantization_config)
    known = layout.name == artifact.manifest.layout and layout.refusal(fmt) is None
    # A config doesn't tell every parameter: what it tells of the recorded format is what it must say.
    if not known or layout.parse_config(layout.quantization_config(fmt, []))[0] != declared:
        raise ContradictionError(f"{path}: config.json and {MANIFEST_NAME} declare different formats; quantize again")
    both = artifact.modules.keys() & set(kept)
    if both:
        raise ContradictionError(
            f"{path}: {shown(min(both))} is kept in config.json and quantized in {MANIFEST_NAME}; quantize again"
        )


def _check_names(artifact: Artifact, path: str) -> None:
    owners: dict[str, str] = {}
    for name, record in artifact.manifest.tensors.items():
        for stored in record.stored:
            if stored in owners:
                raise ContradictionError(
                    f"{path}: {MANIFEST_NAME} says that {shown(stored)} is of {shown(name)} and of "
                    f"{shown(owners[stored])}; quantize again"
                )
            owners[stored] = name
    different = owners.keys() ^ artifact.checkpoint.tensors.keys()
    if different:
        raise ContradictionError(
            f"{path}: {MANIFEST_NAME} and the files disagree about {shown(min(different))}; quantize again"
        )


def _check_parts(artifact: Artifact, path: str, module: str, shape: Shape) -> None:
    reason = artifact.format.keep_reason(shape)
    if reason is not None:
        raise ContradictionError(
            f"{path}: {MANIFEST_NAME} says that {shown(module)} is quantized, and {reason}; quantize again"
        )
    stored = artifact.manifest.tensors[f"{module}.weight"].stored
    parts = {part.name: part.spec for part in stored_tensors(artifact.layout, artifact.format, module, shape).values()}
    different = stored.keys() ^ parts.keys()
    if different:
        problem = "is missing" if min(different) in parts else "is no part of it"
        raise ContradictionError(f"{path}: {shown(min(different))} {problem} in {MANIFEST_NAME}; quantize again")
    for name, spec in parts.items():
        _check_stored(artifact, path, name, spec)


def _check_stored(artifact: Artifact, path: str, name: str, spec: TensorSpec) -> None:
    entry = artifact.checkpoint.tensors.get(name)
    if entry is None:
        raise ContradictionError(f"{path}: {shown(name)} is missing; quantize again")
    if (entry.info.dtype, entry.info.shape) != (spec.dtype, spec.shape):
        raise ContradictionError(
            f"{path}: {shown(name)} is {entry.info.dtype} {list(entry.info.shape)}, expected {spec.dtype} "
            f"{list(spec.shape)}; quantize again"
        )
