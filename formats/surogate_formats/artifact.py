"""An artifact on disk: a checkpoint whose linear weights are parts of a format in a layout, ours or somebody else's."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surogate_formats.artifact_checks import check_files, recorded_format, recorded_recipe
from surogate_formats.artifact_values import verify_tensors
from surogate_formats.checkpoint import Checkpoint
from surogate_formats.checkpoint.directory import Directory
from surogate_formats.checkpoint.errors import quoted, shown
from surogate_formats.checkpoint.files import unreadable
from surogate_formats.checkpoint.reader import CONFIG
from surogate_formats.errors import ArtifactError
from surogate_formats.foreign import Foreign, declared_config, read_foreign
from surogate_formats.format import Format, Parts, Shape
from surogate_formats.layouts import Layout, UnreadableConfigError, layout_of_config, stored_tensors, unpack
from surogate_formats.layouts.surogate import METHODS
from surogate_formats.manifest import MANIFEST_NAME, Manifest

STAGING = ".surogate-staging"
"""Folder in an output directory where an artifact grows; a finished one has none."""


ADAPTER = "adapter-init"
"""Folder of an artifact with the adapter that was made for it."""


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
        self.format: Format = recorded_format(manifest, shown(path / MANIFEST_NAME))
        self.recipe = recorded_recipe(manifest, shown(path / MANIFEST_NAME))
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
        with Directory(directory) as listed:
            ours = MANIFEST_NAME in listed.names
            if not ours and CONFIG not in listed.names:
                raise _incomplete(directory)
        checkpoint = Checkpoint.open(directory)
        try:
            return cls._ours(directory, checkpoint) if ours else cls._of_others(directory, checkpoint)
        except BaseException:
            checkpoint.close()
            raise

    @classmethod
    def _ours(cls, directory: Path, checkpoint: Checkpoint) -> Artifact:
        with Directory(directory) as listed:
            try:
                manifest = Manifest.read(listed)
            except FileNotFoundError as error:  # a link to nothing
                raise unreadable(listed.show(MANIFEST_NAME), error) from None
        try:
            return cls(directory, checkpoint, manifest)
        except UnreadableConfigError as error:
            raise UnreadableConfigError(f"{shown(directory / CONFIG)}: {error}; quantize again") from error

    @classmethod
    def _of_others(cls, directory: Path, checkpoint: Checkpoint) -> Artifact:
        declared = declared_config(checkpoint)
        if declared is None or declared.get("quant_method") in METHODS:
            raise _incomplete(directory)
        try:
            foreign = read_foreign(checkpoint, declared)
        except ArtifactError as error:
            raise type(error)(f"{shown(directory)}: {error}") from error
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
        """Reads every byte: files and tensors are those of the manifest's sha256, codes and scales are in range.

        Returns:
            The number of tensors.

        Raises:
            CorruptArtifactError: the first tensor or file that differs or is missing, by name.
            PartValueError: a code or a scale is one that no weight has, whatever its hash.
            NoRecordedHashesError: others quantized it, and every value is in range.
        """
        count = verify_tensors(self)
        if self.foreign is not None:
            raise NoRecordedHashesError(
                f"{shown(self.path)}: has no {MANIFEST_NAME}, so no hashes are recorded to compare with; "
                "its names, dtypes and shapes are right, and no scale or code is out of range"
            )
        return count

    def _shape(self, module: str) -> Shape:
        if module not in self.modules:
            raise ArtifactError(
                f"{shown(self.path)}: no quantized module {quoted(module)}; surogate-load inspect lists them"
            )
        return self.modules[module]


def _incomplete(directory: Path) -> IncompleteArtifactError:
    if (directory / STAGING).is_dir():
        return IncompleteArtifactError(
            f"{shown(directory)}: holds an unfinished run of surogate-quantize; the same command finishes it"
        )
    return IncompleteArtifactError(
        f"{shown(directory)}: no {MANIFEST_NAME}, so this is no finished artifact; "
        "make one with surogate-quantize MODEL --format nf4 --out DIR (a dense checkpoint is for transformers)"
    )
