"""An artifact described for people and programs, from its manifest and headers; no tensor is read."""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import Any

from surogate_formats.artifact import Artifact
from surogate_formats.format import to_dict
from surogate_load.readers import readers


def describe(artifact: Artifact) -> dict[str, Any]:
    """What `surogate-load inspect` prints, by title."""
    manifest = artifact.manifest
    records = manifest.tensors.values()
    packed = [record for record in records if record.decision == "quantize"]
    kept = Counter(record.reason for record in records if record.decision == "keep")
    values = sum(prod(record.shape) for record in records)
    quantized = sum(prod(record.shape) for record in packed)
    nbytes = sum(entry.info.nbytes for entry in artifact.checkpoint.tensors.values())
    bits = sum(record.bits_per_weight * prod(record.shape) for record in packed) / max(quantized, 1)
    parameters = to_dict(artifact.format)
    return {
        "format": parameters.pop("name"),
        "parameters": ", ".join(f"{key} {value}" for key, value in parameters.items()),
        "layout": artifact.layout.name,
        "made by": f"surogate-quant {manifest.tool_version} from {manifest.source}",
        "recipe": artifact.recipe.name,
        "quantized": f"{len(packed)} weights, {quantized / max(values, 1):.1%} of {values / 1e6:.1f} M parameters",
        "bits per weight": f"{bits:.3f} quantized, {8 * nbytes / max(values, 1):.3f} over the model",
        "size": f"{nbytes / 1e6:.1f} MB in {len(artifact.checkpoint.files)} files",
        "relative error": _error_range([record.relative_error for record in packed]),
        "kept": [f"{count} {reason}" for reason, count in kept.most_common()] or ["nothing"],
        "loads in": readers(
            artifact.format,
            artifact.layout.name,
            experts=any("experts" in module.split(".") for module in artifact.modules),
            bf16=all(record.dtype == "BF16" for record in packed),
        ),
    }


def _error_range(errors: list[float | None]) -> str:
    known = [error for error in errors if error is not None]
    return f"{min(known):.4f} to {max(known):.4f} by weight" if known else "not recorded"
