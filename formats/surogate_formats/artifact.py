"""An artifact on disk: a checkpoint whose linear weights are parts of a format in a layout, ours or somebody else's."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surogate_formats.artifact_checks import check_files, verify_hashes
from surogate_formats.checkpoint import Checkpoint
from surogate_formats.checkpoint.reader import CONFIG
from surogate_formats.errors import ArtifactError, UsageError
from surogate_formats.foreign import Foreign, declared_config, read_foreign
from surogate_formats.format import Format, Parts, Shape
from surogate_formats.layouts import Layout, layout_of_config, stored_tensors, unpack
from surogate_formats.manifest import MANIFEST_NAME, Manifest
from surogate_formats.recipe import Recipe
from surogate_formats.registry import from_dict


class IncompleteArtifactError(ArtifactError):
    """The directory has no manifest: its quantization never finished, or it isn't ours."""


class NoRecordedHashesError(ArtifactError):
    """A checkpoint that others quantized comes without hashes: what its bytes should be is unknown."""


class Artifact:
    """An open artifact; use as a context manager. Reads are thread-safe.

    Attributes:
        path: its directory.
        config: config.json.
        manifest: surogate.json; of a checkpoint that others quantized, what its headers tell, without hashes.
        foreign: what else is known of a checkpoint that others quantized; None if it is ours.
        quantization_config: how it declares itself.
        format: the format with its parameters.
        layout: how the parts are named.
        recipe: the default recipe that was recorded.
        modules: full name of each quantized module to its weight's shape [N, K].
    """

    def __init__(self, path: Path, checkpoint: Checkpoint, manifest: Manifest, foreign: Foreign | None = None) -> None:
        """Use `Artifact.open`."""
        self.path = path
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.manifest = manifest
        self.foreign = foreign
        self.quantization_config: Any = foreign.config if foreign else self.config.get("quantization_config")
        self.layout: Layout = layout_of_config(self.quantization_config)
        self.format: Format = from_dict(dict(manifest.format))
        self.recipe = Recipe(**manifest.recipe)
        self.modules: dict[str, Shape] = {
            name.removesuffix(".weight"): record.shape
            for name, record in manifest.tensors.items()
            if record.decision == "quantize"
        }
        if foreign is None:
            check_files(self)

    @classmethod
    def open(cls, path: str | Path) -> Artifact:
        """Opens a directory that the quantizer wrote, or that others quantized, and checks every name, dtype and shape.

        Raises:
            IncompleteArtifactError: nothing is quantized in it, or it is ours and has no manifest.
            UnreadableConfigError: others quantized it in a way that can't be read.
            UnscaledWeightError, UnreadableWeightError: others quantized it, and a weight isn't whole.
            ArtifactError: manifest, config and files disagree.
            CheckpointError: a file is not what it claims to be.
        """
        directory = Path(path)
        ours = (directory / MANIFEST_NAME).is_file()
        if directory.is_dir() and not ours and not (directory / CONFIG).is_file():
            raise _incomplete(directory)
        checkpoint = Checkpoint.open(directory)
        try:
            return cls._ours(directory, checkpoint) if ours else cls._of_others(directory, checkpoint)
        except BaseException:
            checkpoint.close()
            raise

    @classmethod
    def _ours(cls, directory: Path, checkpoint: Checkpoint) -> Artifact:
        manifest_path = directory / MANIFEST_NAME
        manifest = Manifest.from_json(manifest_path.read_bytes(), str(manifest_path))
        try:
            return cls(directory, checkpoint, manifest)
        except (UsageError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise ArtifactError(
                f"{manifest_path}: holds what surogate-quant never writes ({error}); quantize again"
            ) from error

    @classmethod
    def _of_others(cls, directory: Path, checkpoint: Checkpoint) -> Artifact:
        declared = declared_config(checkpoint)
        if declared is None or declared.get("quant_method") == "surogate":
            raise _incomplete(directory)
        try:
            foreign = read_foreign(checkpoint, declared)
        except ArtifactError as error:
            raise type(error)(f"{directory}: {error}") from error
        return cls(directory, checkpoint, foreign.manifest, foreign)

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
        if self.foreign is not None:
            return self.foreign.parts(self.checkpoint, module)
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
            NoRecordedHashesError: others quantized it.
        """
        if self.foreign is not None:
            raise NoRecordedHashesError(
                f"{self.path}: has no {MANIFEST_NAME}, so no hashes are recorded to compare with; "
                "its names, dtypes and shapes are right"
            )
        return verify_hashes(self.path, self.checkpoint, self.manifest)

    def _shape(self, module: str) -> Shape:
        if module not in self.modules:
            raise ArtifactError(f"{self.path}: no quantized module {module!r}; surogate-load inspect lists them")
        return self.modules[module]


def _incomplete(directory: Path) -> IncompleteArtifactError:
    return IncompleteArtifactError(
        f"{directory}: no {MANIFEST_NAME}, so this is no finished artifact; "
        "make one with surogate-quantize MODEL --format nf4 --out DIR (a dense checkpoint is for transformers)"
    )
