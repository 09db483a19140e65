"""The bytes of an artifact: those that the manifest records, and of codes and scales none that stands for no value."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from surogate_formats.artifact_checks import CorruptArtifactError
from surogate_formats.checkpoint.directory import Directory
from surogate_formats.checkpoint.errors import shown
from surogate_formats.checkpoint.files import stream_of
from surogate_formats.dtypes import FLOATS, NUMPY
from surogate_formats.errors import ArtifactError
from surogate_formats.format import Shape, TensorSpec
from surogate_formats.layouts import DescribingLayout, RecodingLayout, stored_tensors
from surogate_formats.part_values import PartRule, part_rules

if TYPE_CHECKING:
    from surogate_formats.artifact import Artifact

PIECE = 1 << 20
"""Bytes of a file that are in memory at a time."""


class PartValueError(ArtifactError):
    """A code or a scale of a packed weight is one that no weight has: NaN, infinite, or of the wrong sign."""


def verify_tensors(artifact: Artifact) -> int:
    """Reads every file beside the weights, and every tensor, of an open artifact.

    Returns:
        The number of tensors.

    Raises:
        CorruptArtifactError: the first file or tensor that differs from its SHA-256 or is missing, by name.
        PartValueError: the first tensor with a code or a scale that is out of range, by name.
    """
    path, manifest = shown(artifact.path), artifact.manifest
    with Directory(artifact.path) as directory:
        for name, expected in manifest.sidecars.items():
            if _file_sha256(directory, name) != expected:
                raise CorruptArtifactError(f"{path}: {shown(name)} has changed since it was written; quantize again")
    rules = dict(_rules(artifact))
    count = 0
    for record in manifest.tensors.values():
        for name, expected in record.stored.items():
            _verify_tensor(artifact, name, expected, rules.get(name))
            count += 1
    if isinstance(artifact.layout, DescribingLayout):
        for module, shape in artifact.modules.items():
            _check_state(artifact, module, shape)
    return count


def check_scales(artifact: Artifact) -> None:
    """Looks at the floating-point companions of all packed weights, which takes a moment; `verify` looks at everything.

    Raises:
        PartValueError: the first scale that stands for no weight (a NaN, say), by name.
    """
    for name, rule in scale_rules(artifact).items():
        check_values(artifact, name, rule, artifact.checkpoint.read(name).reshape(-1), 0)


def scale_rules(artifact: Artifact) -> dict[str, PartRule]:
    """What the values of the floating-point companions must be, by the names of the tensors."""
    tensors, floats = artifact.checkpoint.tensors, FLOATS.values()
    return {name: rule for name, rule in _rules(artifact) if tensors[name].info.dtype in floats}


def check_values(artifact: Artifact, name: str, rule: PartRule, values: NDArray[np.generic], start: int) -> None:
    """Checks values of a tensor, flat, that begin at byte `start` of it.

    Raises:
        PartValueError: one stands for no weight, by its place.
    """
    problem = _problem(rule, values, start)
    if problem is not None:
        raise PartValueError(f"{shown(artifact.path)}: {shown(name)}: {problem}; download it again, or quantize again")


def _rules(artifact: Artifact) -> Iterator[tuple[str, PartRule]]:
    layout, fmt = artifact.layout, artifact.format
    by_part = part_rules(fmt, layout.name, strict=artifact.foreign is None)
    for module, shape in artifact.modules.items():
        keys = layout.stored_specs(fmt, shape) if isinstance(layout, RecodingLayout) else fmt.part_specs(shape)
        for key in keys:
            name = f"{module}.{layout.suffixes[fmt.name][key]}"
            if key in by_part and name in artifact.checkpoint.tensors:
                yield name, by_part[key]


def _verify_tensor(artifact: Artifact, name: str, expected: str, rule: PartRule | None) -> None:
    path, info = shown(artifact.path), artifact.checkpoint.tensors[name].info
    digest, problem = hashlib.sha256(), None
    buffer = memoryview(bytearray(min(PIECE, info.nbytes)))
    for start in range(0, info.nbytes, PIECE):
        piece = buffer[: artifact.checkpoint.read_into(name, buffer, start)]
        digest.update(piece)
        if rule is not None and problem is None:
            problem = _problem(rule, np.frombuffer(piece, NUMPY[info.dtype]), start)
    if artifact.foreign is None and digest.hexdigest() != expected:
        raise CorruptArtifactError(f"{path}: {shown(name)} has changed since it was written; quantize again")
    if problem is not None:
        raise PartValueError(f"{path}: {shown(name)}: {problem}; download it again, or quantize again")


def _problem(rule: PartRule, values: NDArray[np.generic], start: int) -> str | None:
    wrong = rule.wrong(values)
    if not wrong.any():
        return None
    place = int(np.argmax(wrong))
    return f"value {start // values.itemsize + place} is {values[place]}, expected {rule.wanted}"


def _check_state(artifact: Artifact, module: str, shape: Shape) -> None:
    layout, fmt, tensors = artifact.layout, artifact.format, artifact.checkpoint.tensors
    assert isinstance(layout, DescribingLayout)
    names = {key: stored.name for key, stored in stored_tensors(layout, fmt, module, shape).items()}
    specs = {key: TensorSpec(tensors[name].info.dtype, tensors[name].info.shape) for key, name in names.items()}
    state = artifact.checkpoint.read(names["quant_state"]).tobytes()
    where = f"{shown(artifact.path)}: {shown(module)}"
    try:
        described, its_shape, _ = layout.describe(specs, state)
    except ArtifactError as error:
        raise PartValueError(f"{where}: {error}; quantize again") from error
    if (described, its_shape) != (fmt, shape):
        raise PartValueError(f"{where}: its quantization state is of another weight; quantize again")


def _file_sha256(directory: Directory, name: str) -> str:
    try:
        descriptor = directory.open(name)
    except FileNotFoundError:
        raise CorruptArtifactError(f"{directory.show(name)}: missing; quantize again") from None
    digest, read = hashlib.sha256(), stream_of(descriptor, directory.show(name))
    try:
        while data := read(PIECE):
            digest.update(data)
    finally:
        os.close(descriptor)
    return digest.hexdigest()
