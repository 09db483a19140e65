"""An artifact's weights as tensors, without transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor

from surogate_formats.artifact import Artifact
from surogate_formats.errors import UsageError
from surogate_load.local import open_local, say_unused
from surogate_load.weight import WeightKind, to_torch


class NoSuchModuleError(UsageError, KeyError):
    """The artifact holds no quantized module of that name."""

    __str__ = UsageError.__str__


@dataclass(frozen=True)
class QuantizedWeight:
    """One quantized weight of an open artifact; nothing is read before it is asked for.

    Attributes:
        name: full name of its module.
        kind: format and shape (N, K).
    """

    name: str
    kind: WeightKind
    artifact: Artifact

    def parts(self) -> dict[str, Tensor]:
        """The packed tensors by part name, read anew at each call."""
        return {part: to_torch(array) for part, array in self.artifact.parts(self.name).items()}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [N, K]."""
        parts = self.parts()
        return self.kind.dequantize([parts[part] for part in self.kind.specs], dtype)


class OpenArtifact(Mapping[str, QuantizedWeight]):
    """The quantized modules of an artifact by full name; a context manager.

    Attributes:
        artifact: format, layout, manifest, config and the default recipe.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact

    def __getitem__(self, module: str) -> QuantizedWeight:
        """The weight of a module; `NoSuchModuleError` if it isn't quantized here."""
        if module not in self.artifact.modules:
            raise NoSuchModuleError(f"{self.artifact.path}: no quantized module {module!r}{self._hint(module)}")
        rows, columns = self.artifact.modules[module]
        return QuantizedWeight(module, WeightKind(self.artifact.format, (rows, columns)), self.artifact)

    def _hint(self, module: str) -> str:
        where = f"surogate-load inspect --modules {self.artifact.path} lists them"
        if f"{module}.weight" in self.artifact.manifest.tensors:
            return f": its weight was kept; {where}"
        parts = [part for part in module.removesuffix(".weight").split(".") if part]
        ends = [name for name in self if parts and name.split(".")[-len(parts) :] == parts]
        near = ends or get_close_matches(module, list(self), n=1)
        return f"; did you mean {near[0]!r}? {where}" if near else f"; {where}"

    def __iter__(self) -> Iterator[str]:
        """Module names."""
        return iter(self.artifact.modules)

    def __len__(self) -> int:
        """How many modules are quantized."""
        return len(self.artifact.modules)

    def verify(self) -> int:
        """Compares every stored tensor with its recorded sha256; see `surogate_formats.artifact.Artifact.verify`."""
        return self.artifact.verify()

    def close(self) -> None:
        """Closes the files."""
        self.artifact.close()

    def __enter__(self) -> OpenArtifact:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the files."""
        self.close()


def open_artifact(path: str | Path, *, revision: str | None = None, token: str | None = None) -> OpenArtifact:
    """Opens what surogate-quantize wrote, or others quantized: a directory, or a repository (see `load_model`).

    Args:
        path: the directory, or the name on the Hub.
        revision: branch, tag or commit of a repository.
        token: for the Hub; None takes HF_TOKEN or the stored login.

    Raises:
        ArtifactError, CheckpointError: it is not complete, not what it claims to be, or nothing that we read.
        SurogateError: it can't be had from the Hub; see `surogate_formats.hub_text`.
    """
    artifact = open_local(path, revision, token)
    say_unused(artifact)
    return OpenArtifact(artifact)
