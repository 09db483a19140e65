"""Recomputes an artifact's errors from the checkpoint that it was made of, and compares what was kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from surogate_formats.artifact import Artifact
from surogate_formats.checkpoint import Checkpoint
from surogate_formats.checkpoint.errors import shown
from surogate_formats.dtypes import NUMPY
from surogate_formats.errors import ArtifactError, UsageError
from surogate_formats.manifest import TensorRecord
from surogate_load.artifact_weights import OpenArtifact

TOLERANCE = 1e-3
"""How far a recomputed relative error may be from the recorded one, relative to it: that counts in steps."""

ROWS = 1024
"""Rows of a weight that are widened to float64 at a time."""


class DifferentSourceError(ArtifactError):
    """A tensor isn't what the artifact's manifest says of it, or the artifact was made of something else."""


class NotTheSourceError(UsageError):
    """The checkpoint doesn't hold the tensors that the artifact was made of."""


@dataclass(frozen=True)
class Comparison:
    """What comparing an artifact with its source found.

    Attributes:
        quantized: how many weights were quantized.
        kept: how many tensors were kept.
        least, largest: relative error of a weight.
    """

    quantized: int
    kept: int
    least: float
    largest: float


def verify_against(artifact: Artifact, source: str | Path) -> Comparison:
    """Compares every tensor of an artifact with its source: errors as recorded, kept tensors equal.

    Args:
        artifact: an open artifact.
        source: directory of the checkpoint that it was made of.

    Raises:
        NotTheSourceError: a tensor is missing there, or has another shape.
        DifferentSourceError: the first tensor that differs from its record, by name.
        CheckpointError: the source is damaged.
    """
    weights = OpenArtifact(artifact)
    errors: list[float] = []
    kept, where = 0, shown(artifact.path)
    with Checkpoint.open(source) as checkpoint:
        for name, record in artifact.manifest.tensors.items():
            array = _source_tensor(checkpoint, name, record)
            if record.decision == "quantize":
                errors.append(_weight_error(weights, name, array))
                _check_error(f"{where}: {shown(name)}", record, errors[-1])
            else:
                kept += 1
                _check_kept(artifact, where, name, array)
        checkpoint.check_unchanged()
    return Comparison(len(errors), kept, min(errors, default=0.0), max(errors, default=0.0))


def _source_tensor(checkpoint: Checkpoint, name: str, record: TensorRecord) -> NDArray[np.generic]:
    entry = checkpoint.find(name)
    if entry is None or entry.info.shape != record.shape:
        found = "is missing" if entry is None else f"is {list(entry.info.shape)}, not {list(record.shape)}"
        where = f"{shown(checkpoint.directory)}: {shown(name)}"
        raise NotTheSourceError(f"{where} {found}; give the checkpoint that was quantized")
    return checkpoint.read(name)


def _weight_error(weights: OpenArtifact, name: str, source: NDArray[np.generic]) -> float:
    """||dequantized - source|| / ||source||, in float64."""
    dense = weights[name.removesuffix(".weight")].dequantize().numpy()
    squares = [_squares(dense[rows], source[rows].astype(np.float64)) for rows in _pieces(len(source))]
    error, norm = sum(each for each, _ in squares), sum(each for _, each in squares)
    if not (isfinite(error) and isfinite(norm)):
        where = f"{shown(weights.artifact.path)}: {shown(name)}"
        raise DifferentSourceError(f"{where}: a value of it, or of the source's, is no finite number")
    return sqrt(error / norm) if norm else 0.0


def _pieces(rows: int) -> Iterator[slice]:
    for start in range(0, rows, ROWS):
        yield slice(start, start + ROWS)


def _squares(dense: NDArray[np.float32], source: NDArray[np.float64]) -> tuple[float, float]:
    return float(np.square(dense - source).sum()), float(np.square(source).sum())


def _check_error(where: str, record: TensorRecord, found: float) -> None:
    recorded = record.relative_error
    if recorded is not None and abs(found - recorded) > TOLERANCE * recorded + 1e-6:
        raise DifferentSourceError(f"{where}: its relative error is {found:.4f}, recorded is {recorded:.4f}")


def _check_kept(artifact: Artifact, where: str, name: str, source: NDArray[np.generic]) -> None:
    stored = artifact.checkpoint.read(name)
    expected = source.astype(NUMPY[artifact.checkpoint.tensors[name].info.dtype], copy=False)
    if stored.tobytes() != expected.tobytes():
        raise DifferentSourceError(f"{where}: {shown(name)}: was kept, and differs from the source")
