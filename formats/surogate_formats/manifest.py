"""The manifest, `surogate.json`: what an artifact was made from, how, and how well; written last."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from surogate_formats.checkpoint import SourceFile
from surogate_formats.checkpoint.directory import Directory
from surogate_formats.checkpoint.errors import shown
from surogate_formats.checkpoint.files import stream_of
from surogate_formats.checkpoint.json_reader import reader_of
from surogate_formats.manifest_reading import SCHEMA_VERSION, UnreadableManifestError, read_fields

MANIFEST_NAME = "surogate.json"
MAX_MANIFEST_SIZE = 400_000_000
"""Bytes; a quantized weight takes some 900, so that 200 000 have room."""


@dataclass(frozen=True)
class TensorRecord:
    """What happened to one tensor of the source.

    Attributes:
        decision: `quantize` or `keep`.
        reason: why, in the plan's words.
        dtype: the source's safetensors dtype name.
        shape: the source's shape.
        bits_per_weight: stored bits, companions included, over the number of values.
        stored: name on disk to sha256 of its payload.
        relative_error: ||dequantized - source|| / ||source|| (Frobenius, summed in float64); None if kept.
        max_error: the largest |dequantized - source|; None if kept.
        output_error: with calibrated codes, ||Q x - W x'|| / ||W x'|| on held-out text, x being the quantized model's
            inputs of the linear and x' the original's.
        nearest_output_error: the same with codes that are nearest.
    """

    decision: Literal["quantize", "keep"]
    reason: str
    dtype: str
    shape: tuple[int, ...]
    bits_per_weight: float
    stored: Mapping[str, str]
    relative_error: float | None = None
    max_error: float | None = None
    output_error: float | None = None
    nearest_output_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that determines the artifact's bytes, and the proof of them: no clock, host, path or token.

    Attributes:
        schema_version: of this file.
        tool_version: of the quantizer.
        source, revision: the source's name, and its commit where it is known.
        files: what identifies the source's shards.
        format, layout, options, recipe, lora: what the artifact was asked to be.
        sidecars: every other file of the artifact (config.json, the index, the tokenizer), by its path in it, to the
            SHA-256 of its bytes.
        tensors: what happened to each tensor of the source.
    """

    schema_version: int = SCHEMA_VERSION
    tool_version: str
    source: str
    revision: str | None = None
    files: tuple[SourceFile, ...]
    format: Mapping[str, Any]
    layout: str
    options: Mapping[str, Any]
    recipe: Mapping[str, Any]
    lora: Mapping[str, Any]
    sidecars: Mapping[str, str]
    tensors: Mapping[str, TensorRecord]

    def to_json(self) -> str:
        """The manifest's text; equal manifests have equal text."""
        fields = asdict(self)
        fields["files"] = [_without_unknown(file) for file in fields["files"]]
        return json.dumps(fields, indent=1, ensure_ascii=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Manifest:
        """Reads a manifest; `where` names the file in errors.

        Raises:
            OtherSchemaError: of another schema version.
            UnreadableManifestError: not JSON, or with fields that are missing, unknown or of another kind.
        """
        data = text if isinstance(text, bytes) else text.encode(errors="surrogatepass")
        return cls(**read_fields(reader_of(data), shown(where)))

    @classmethod
    def beside(cls, file: Path) -> Manifest | None:
        """The manifest of the directory in which a file stands; None if it has none.

        Raises:
            Everything that `read` raises else, and CheckpointError for what is no directory.
        """
        with Directory(file.parent) as directory:
            try:
                return cls.read(directory)
            except FileNotFoundError:
                return None

    @classmethod
    def read(cls, directory: Directory) -> Manifest:
        """Reads the manifest of a directory, no more of it than is right.

        Raises:
            FileNotFoundError: there is none.
            NotARegularFileError, UnreadableFileError: it is no file, or may not be read.
            OtherSchemaError, UnreadableManifestError: see `from_json`.
        """
        where = directory.show(MANIFEST_NAME)
        descriptor = directory.open(MANIFEST_NAME)
        try:
            size = os.fstat(descriptor).st_size
            if size > MAX_MANIFEST_SIZE:
                raise UnreadableManifestError(f"{where}: {size} bytes, more than the {MAX_MANIFEST_SIZE} allowed")
            return cls(**read_fields(stream_of(descriptor, where), where))
        finally:
            os.close(descriptor)


def _without_unknown(file: dict[str, Any]) -> dict[str, Any]:
    """A source file's entry; the hash of its bytes stands there only if somebody asked for it."""
    return {key: value for key, value in file.items() if value is not None}
