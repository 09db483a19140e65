"""An artifact as a dense checkpoint that loads anywhere: the weights that a packed model computes with."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from surogate_formats.artifact import Artifact
from surogate_formats.checkpoint.index import INDEX
from surogate_formats.checkpoint.reader import CONFIG
from surogate_formats.dtypes import FLOATS, NUMPY
from surogate_formats.errors import UsageError
from surogate_formats.foreign import UNUSED
from surogate_formats.layouts.modelopt import SIDECAR
from surogate_load.architecture import DECLARATIONS
from surogate_load.artifact_weights import OpenArtifact
from surogate_load.export.checkpoint import DenseTensor, whole_directory, write_checkpoint
from surogate_load.export.fusing import fuse_experts
from surogate_load.local import open_local
from surogate_load.weight import TORCH_DTYPES, to_numpy

_BESIDE = (".json", ".txt", ".jinja", ".model", ".spm", ".tiktoken")
"""What stands beside the weights of others, with neither weights nor code in it."""


def dequantize(artifact: str | Path, out: str | Path, dtype: str | None = None) -> Path:
    """Writes an artifact as a dense checkpoint, a file's worth of tensors in memory at a time.

    Args:
        artifact: directory of the artifact, or its name on the Hub.
        out: a directory that doesn't exist yet.
        dtype: `bfloat16`, `float16` or `float32` for every floating-point tensor; by default each weight gets the dtype
            that it had in the source. Values are rounded once, from float32.

    Returns:
        `out`.

    Raises:
        UsageError: another dtype.
        ExportExistsError, ExportFailedError: see `export.checkpoint.whole_directory`.
        ArtifactError, CheckpointError: the artifact is damaged.
    """
    check_dtype(dtype)
    with open_local(artifact) as opened, whole_directory(Path(out)) as directory:
        config = dense_config(opened, dtype)
        tensors = fuse_experts(list(dense_tensors(opened, dtype)), config)
        write_checkpoint(directory, tensors, config, sidecars(opened))
    return Path(out)


def check_dtype(dtype: str | None) -> None:
    """Raises `UsageError` for a dtype that no dense checkpoint gets here."""
    if dtype is not None and dtype not in FLOATS:
        raise UsageError(f"dtype {dtype!r}: choose one of {', '.join(FLOATS)}")


def dense_tensors(artifact: Artifact, dtype: str | None) -> Iterator[DenseTensor]:
    """Every tensor of the dense model, under its name in the source."""
    weights = OpenArtifact(artifact)
    for name, record in artifact.manifest.tensors.items():
        if record.decision == "quantize":
            chosen = FLOATS.get(dtype or "", record.dtype)
            yield DenseTensor(name, chosen, record.shape, partial(dense_weight, weights, name, chosen))
        elif record.reason != UNUSED:
            info = artifact.checkpoint.tensors[name].info
            chosen = FLOATS[dtype] if dtype is not None and info.dtype in FLOATS.values() else info.dtype
            yield DenseTensor(name, chosen, info.shape, partial(_kept, artifact, name, chosen))


def dense_config(artifact: Artifact, dtype: str | None) -> dict[str, Any]:
    """config.json without its `quantization_config`, and with another dtype if one was asked for."""
    config = {key: value for key, value in artifact.config.items() if key not in DECLARATIONS}
    if dtype is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    return config


def sidecars(artifact: Artifact) -> dict[str, Path]:
    """The tokenizer's files and what else stands beside the weights, by their place in the directory."""
    names = {name for name in artifact.manifest.sidecars if _is_own(artifact.path / name)}
    if artifact.foreign is not None:
        names = {path.name for path in artifact.path.iterdir() if path.suffix in _BESIDE and _is_own(path)}
    return {name: artifact.path / name for name in sorted(names - {CONFIG, INDEX, SIDECAR})}


def _is_own(path: Path) -> bool:
    """Whether a path is a file, and no link out of its directory or, in the Hub's cache, its repository."""
    here, there = path.parent.resolve(), path.resolve()
    return path.is_file() and (here in there.parents or there.parent == here.parent.parent / "blobs")


def dense_weight(weights: OpenArtifact, name: str, dtype: str) -> NDArray[Any]:
    """A quantized weight [N, K] in a dtype that safetensors calls so."""
    return to_numpy(weights[name.removesuffix(".weight")].dequantize(TORCH_DTYPES[dtype]))


def _kept(artifact: Artifact, name: str, dtype: str) -> NDArray[Any]:
    return artifact.checkpoint.read(name).astype(NUMPY[dtype], copy=False)
