"""A model's tensors by name, one at a time: of a dense checkpoint, or of an artifact, whose weights are unpacked."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from surogate_formats.artifact import Artifact
from surogate_formats.checkpoint import Checkpoint
from surogate_formats.dtypes import FLOATS
from surogate_formats.foreign import UNUSED
from surogate_load.artifact_weights import OpenArtifact

_TORCH = {dtype: getattr(torch, name) for name, dtype in FLOATS.items()} | {
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
    "U8": torch.uint8,
}


class ModelTensors(Protocol):
    """The tensors of a model, by the names that the dense model has for them.

    Attributes:
        directory: where they are.
        config: config.json.
        names: of all tensors.
    """

    directory: Path
    config: dict[str, Any]
    names: Collection[str]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""

    def read(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A tensor on a device; values in floating point in `dtype`, rounded once, others in their own."""


class DenseTensors:
    """The tensors of a dense checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Reads nothing yet."""
        self._checkpoint = checkpoint
        self.directory, self.config = checkpoint.directory, checkpoint.config
        self.names: Collection[str] = checkpoint.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._checkpoint.tensors[name].info.shape

    def read(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """See `ModelTensors`."""
        info = self._checkpoint.tensors[name].info
        value = torch.empty(info.shape, dtype=_TORCH[info.dtype])
        self._checkpoint.read_into(name, value.reshape(-1).view(torch.uint8).numpy().data)
        return value.to(device, dtype if value.is_floating_point() else value.dtype)


class PackedTensors:
    """The tensors of an artifact; packed weights as a packed model computes with them."""

    def __init__(self, artifact: Artifact) -> None:
        """Reads nothing yet."""
        self._weights, self._kept = OpenArtifact(artifact), DenseTensors(artifact.checkpoint)
        self.directory, self.config = artifact.path, artifact.config
        records = artifact.manifest.tensors
        self.names: Collection[str] = {name for name, record in records.items() if record.reason != UNUSED}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        module = name.removesuffix(".weight")
        return self._weights[module].kind.shape if module in self._weights else self._kept.shape(name)

    def read(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """See `ModelTensors`."""
        module = name.removesuffix(".weight")
        if module not in self._weights:
            return self._kept.read(name, device, dtype)
        weight = self._weights[module]
        parts = weight.parts()
        return weight.kind.dequantize([parts[part].to(device) for part in weight.kind.specs], dtype)
