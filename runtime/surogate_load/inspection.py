"""An artifact described for programs (numbers) and people (lines), from its manifest and headers; no tensor is read."""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import Any

from surogate_formats.artifact import Artifact
from surogate_formats.checkpoint.expert_slices import arrangement_of
from surogate_formats.format import to_dict
from surogate_formats.manifest import TensorRecord
from surogate_formats.nvfp4 import HOW_CHOSEN
from surogate_load.readers import readers


def describe(artifact: Artifact) -> dict[str, Any]:
    """What `surogate-load inspect --json` prints: sizes in bytes, counts and errors as numbers."""
    manifest = artifact.manifest
    records = list(manifest.tensors.values())
    packed = [record for record in records if record.decision == "quantize"]
    values, quantized = (sum(prod(record.shape) for record in of) for of in (records, packed))
    nbytes = sum(entry.info.nbytes for entry in artifact.checkpoint.tensors.values())
    bits = sum(record.bits_per_weight * prod(record.shape) for record in packed)
    parameters = _known_parameters(artifact)
    arrangement = arrangement_of(artifact.config)
    errors = [record.relative_error for record in packed if record.relative_error is not None]
    return {
        "format": parameters.pop("name"),
        "parameters": parameters,
        "layout": artifact.layout.name,
        "tool_version": manifest.tool_version or None,
        "source": manifest.source,
        "recipe": artifact.recipe.name,
        "quantized_weights": len(packed),
        "quantized_parameters": quantized,
        "parameters_in_all": values,
        "bits_per_quantized_weight": bits / max(quantized, 1),
        "bits_per_parameter": 8 * nbytes / max(values, 1),
        "bytes": nbytes,
        "files": len(artifact.checkpoint.files),
        "relative_error": {"least": min(errors), "largest": max(errors)} if errors else None,
        "kept": dict(Counter(record.reason for record in records if record.decision == "keep").most_common()),
        "loads_in": readers(
            artifact.format,
            artifact.layout.name,
            experts=any("experts" in module.split(".") for module in artifact.modules),
            fused_only=arrangement is not None and not arrangement.apart,
            bf16=all(record.dtype == "BF16" for record in packed),
            ours=artifact.foreign is None,
        ),
        "not_used": list(artifact.foreign.unused) if artifact.foreign else [],
    }


def _known_parameters(artifact: Artifact) -> dict[str, Any]:
    """The format's name and parameters, without those that the files of others don't show."""
    unknown = HOW_CHOSEN if artifact.foreign else ()
    return {key: value for key, value in to_dict(artifact.format).items() if key not in unknown}


def describe_modules(artifact: Artifact) -> dict[str, dict[str, Any]]:
    """Every quantized module by full name, in the manifest's order: what `open_artifact` gives weights by."""
    return {name: _module(artifact.manifest.tensors[f"{name}.weight"]) for name in artifact.modules}


def _module(record: TensorRecord) -> dict[str, Any]:
    return {
        "shape": list(record.shape),
        "bits_per_weight": record.bits_per_weight,
        "relative_error": record.relative_error,
    }


def lines(found: dict[str, Any]) -> dict[str, str | list[str]]:
    """What `describe` found, in words by title."""
    share = found["quantized_parameters"] / max(found["parameters_in_all"], 1)
    error = found["relative_error"]
    maker = f"surogate-quant {found['tool_version']} from {found['source']}"
    rows: dict[str, str | list[str]] = {
        "format": found["format"],
        "parameters": ", ".join(f"{key} {value}" for key, value in found["parameters"].items()),
        "layout": found["layout"],
        "made by": maker if found["tool_version"] else "others (no surogate.json: no hashes, no errors)",
        "recipe": found["recipe"],
        "quantized": f"{found['quantized_weights']} weights, {share:.1%} of "
        f"{found['parameters_in_all'] / 1e6:.1f} M parameters (--modules lists them)",
        "bits per weight": f"{found['bits_per_quantized_weight']:.3f} quantized, "
        f"{found['bits_per_parameter']:.3f} over the model",
        "size": f"{found['bytes'] / 1e6:.1f} MB in {found['files']} files",
        "relative error": f"{error['least']:.4f} to {error['largest']:.4f} by weight, against {found['source']}"
        if error
        else "not recorded",
        "kept": [f"{count} {reason}" for reason, count in found["kept"].items()] or ["nothing"],
        "loads in": [f"{reader}: {remark}" if remark else reader for reader, remark in found["loads_in"].items()],
    }
    return {**rows, "not used": found["not_used"]} if found["not_used"] else rows


def module_lines(found: dict[str, dict[str, Any]]) -> list[str]:
    """What `describe_modules` found, a line each: name, shape, bits per weight, relative error."""
    width = max(map(len, found), default=0)
    return [
        f"{name:{width}}  {'x'.join(map(str, entry['shape'])):>13}  {entry['bits_per_weight']:.3f} bits"
        + ("" if entry["relative_error"] is None else f"  error {entry['relative_error']:.4f}")
        for name, entry in found.items()
    ]
