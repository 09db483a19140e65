"""An artifact on disk: a checkpoint whose linear weights are parts of a format in a layout, with its manifest."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from surogate_formats.checkpoint import Checkpoint
from surogate_formats.checkpoint.directory import Directory
from surogate_formats.dtype_rules import STORED_AS
from surogate_formats.errors import ArtifactError, UsageError
from surogate_formats.format import Format, Parts, Shape, TensorSpec
from surogate_formats.layouts import Layout, layout_of_config, stored_tensors, unpack
from surogate_formats.manifest import MANIFEST_NAME, Manifest
from surogate_formats.recipe import Recipe
from surogate_formats.registry import from_dict

PIECE = 1 << 20
"""Bytes of a file that are in memory at a time while it is hashed."""


class IncompleteArtifactError(ArtifactError):
    """The directory has no manifest: its quantization never finished, or it isn't ours."""


class CorruptArtifactError(ArtifactError):
    """The bytes of a tensor or of a file beside the weights are not those that the manifest records."""


class Artifact:
    """An open artifact; use as a context manager. Reads are thread-safe.

    Attributes:
        path: its directory.
        config: config.json.
        manifest: surogate.json.
        format: the format with its parameters.
        layout: how the parts are named.
        recipe: the default recipe that was recorded.
        modules: full name of each quantized module to its weight's shape [N, K].
    """

    def __init__(self, path: Path, checkpoint: Checkpoint, manifest: Manifest) -> None:
        """Use `Artifact.open`."""
        self.path = path
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.manifest = manifest
        self.layout: Layout = layout_of_config(self.config.get("quantization_config"))
        self.format: Format = from_dict(dict(manifest.format))
        self.recipe = Recipe(**manifest.recipe)
        self.modules: dict[str, Shape] = {
            name.removesuffix(".weight"): record.shape
            for name, record in manifest.tensors.items()
            if record.decision == "quantize"
        }
        self._check()

    @classmethod
    def open(cls, path: str | Path) -> Artifact:
        """Opens a directory that the quantizer wrote, and checks every name, dtype and shape in it.

        Raises:
            IncompleteArtifactError: there is no manifest.
            ArtifactError: manifest, config and files disagree.
            CheckpointError: a file is not what it claims to be.
        """
        directory = Path(path)
        if directory.is_dir() and not (directory / MANIFEST_NAME).is_file():
            raise IncompleteArtifactError(
                f"{directory}: no {MANIFEST_NAME}, so this is no finished artifact; "
                "make one with surogate-quantize MODEL --format nf4 --out DIR"
            )
        checkpoint = Checkpoint.open(directory)
        try:
            manifest_path = directory / MANIFEST_NAME
            manifest = Manifest.from_json(manifest_path.read_bytes(), str(manifest_path))
            try:
                return cls(directory, checkpoint, manifest)
            except (UsageError, TypeError, ValueError, LookupError, AttributeError) as error:
                raise ArtifactError(
                    f"{manifest_path}: holds what surogate-quant never writes ({error}); quantize again"
                ) from error
        except BaseException:
            checkpoint.close()
            raise

    def __enter__(self) -> Artifact:
        """Returns the artifact itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the files."""
        self.close()

    def close(self) -> None:
        """Closes the files."""
        self.checkpoint.close()

    def parts(self, module: str) -> Parts:
        """The parts of a quantized module, as numpy arrays."""
        shape = self._shape(module)
        names = [stored.name for stored in stored_tensors(self.layout, self.format, module, shape).values()]
        return unpack(self.layout, self.format, module, {name: self.checkpoint.read(name) for name in names}, shape)

    def dequantize(self, module: str) -> NDArray[np.float32]:
        """The float32 weight [N, K] of a quantized module."""
        return self.format.dequantize(self.parts(module), self._shape(module))

    def verify(self) -> int:
        """Compares every stored tensor, config.json, the index and each file beside them with the manifest's sha256.

        Returns:
            The number of tensors.

        Raises:
            CorruptArtifactError: the first tensor or file that differs or is missing, by name.
        """
        with Directory(self.path) as directory:
            for name, expected in self.manifest.sidecars.items():
                if _file_sha256(directory, name) != expected:
                    raise CorruptArtifactError(f"{self.path}: {name} has changed since it was written; quantize again")
        count = 0
        for record in self.manifest.tensors.values():
            for name, expected in record.stored.items():
                found = hashlib.sha256(self.checkpoint.read(name).tobytes()).hexdigest()
                if found != expected:
                    raise CorruptArtifactError(f"{self.path}: {name} has changed since it was written; quantize again")
                count += 1
        return count

    def _shape(self, module: str) -> Shape:
        if module not in self.modules:
            raise ArtifactError(f"{self.path}: no quantized module {module!r}; surogate-load inspect lists them")
        return self.modules[module]

    def _check(self) -> None:
        declared, _ = self.layout.parse_config(self.config["quantization_config"])
        if self.layout.name != self.manifest.layout or declared.name != self.format.name:
            raise ArtifactError(
                f"{self.path}: config.json and {MANIFEST_NAME} declare different formats; quantize again"
            )
        expected = {name for record in self.manifest.tensors.values() for name in record.stored}
        if expected != self.checkpoint.tensors.keys():
            name = sorted(expected ^ self.checkpoint.tensors.keys())[0]
            raise ArtifactError(f"{self.path}: {MANIFEST_NAME} and the files disagree about {name}; quantize again")
        self._check_kept()
        for module, shape in self.modules.items():
            for stored in stored_tensors(self.layout, self.format, module, shape).values():
                if stored.name not in expected:
                    raise ArtifactError(f"{self.path}: {stored.name} is missing; quantize again")
                info = self.checkpoint.tensors[stored.name].info
                found = TensorSpec(info.dtype, info.shape)
                if found != stored.spec:
                    raise ArtifactError(
                        f"{self.path}: {stored.name} is {found.dtype} {list(found.shape)}, expected "
                        f"{stored.spec.dtype} {list(stored.spec.shape)}; quantize again"
                    )

    def _check_kept(self) -> None:
        for name, record in self.manifest.tensors.items():
            info = self.checkpoint.tensors[name].info if record.decision == "keep" else None
            dtype = STORED_AS.get(record.dtype, record.dtype)
            if info is not None and (info.dtype, info.shape) != (dtype, record.shape):
                raise ArtifactError(
                    f"{self.path}: {name} is {info.dtype} {list(info.shape)}, {MANIFEST_NAME} says {dtype} "
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
