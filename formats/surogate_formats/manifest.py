"""The manifest, `surogate.json`: what an artifact was made from, how, and how well; written last."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from surogate_formats.checkpoint import SourceFile
from surogate_formats.errors import ArtifactError

MANIFEST_NAME = "surogate.json"
SCHEMA_VERSION = 1


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
    """

    decision: Literal["quantize", "keep"]
    reason: str
    dtype: str
    shape: tuple[int, ...]
    bits_per_weight: float
    stored: Mapping[str, str]
    relative_error: float | None = None
    max_error: float | None = None


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
        return json.dumps(asdict(self), indent=1, ensure_ascii=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Manifest:
        """Reads a manifest; `where` names the file in errors.

        Raises:
            ArtifactError: not JSON, of another schema version, or with fields missing or unknown.
        """
        try:
            data = json.loads(text)
            version = data.get("schema_version")
            if version != SCHEMA_VERSION:
                raise ArtifactError(
                    f"{where}: schema version {version!r}, this version of surogate-quant reads {SCHEMA_VERSION}"
                )
            files = tuple(SourceFile(**entry) for entry in data.pop("files"))
            tensors = {name: _record(entry) for name, entry in data.pop("tensors").items()}
            _check_sidecars(data["sidecars"])
            return cls(files=files, tensors=tensors, **data)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ArtifactError(f"{where}: not a manifest of surogate-quant ({error}); quantize again") from error


def _check_sidecars(sidecars: dict[str, Any]) -> None:
    for name, digest in sidecars.items():
        if not isinstance(digest, str) or any(part in ("", ".", "..") for part in name.split("/")):
            raise ValueError(f"sidecar {name!r}")


def _record(entry: dict[str, Any]) -> TensorRecord:
    record = TensorRecord(**{**entry, "shape": tuple(entry["shape"])})
    numbers = (record.bits_per_weight, record.relative_error or 0.0, record.max_error or 0.0)
    texts = (record.reason, record.dtype, *record.stored, *record.stored.values())
    if record.decision not in ("quantize", "keep"):
        raise ValueError(f"decision {record.decision!r}")
    if not all(isinstance(number, int | float) for number in numbers) or not all(
        isinstance(text, str) for text in texts
    ):
        raise TypeError("a field of another type")
    return record
