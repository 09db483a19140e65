"""What became of a tensor, and its form between an interrupted run and the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from surogate_formats.manifest import TensorRecord
from surogate_quantize.plan import PlannedTensor
from surogate_quantize.weight_errors import Errors


@dataclass(frozen=True)
class Result:
    """What became of one tensor.

    Attributes:
        record: its entry in the manifest.
        errors: how far it is from its source; None if it is kept.
        amax: its largest magnitude; None if it is kept.
        finite: whether it holds no NaN and no infinity.
    """

    record: TensorRecord
    errors: Errors | None
    amax: np.float32 | None
    finite: bool


Results = dict[str, Result]
"""What became of tensors, by name."""


def kept_result(tensor: PlannedTensor, digest: str, *, finite: bool) -> Result:
    """The result of a tensor that was copied."""
    return Result(_record(tensor, {tensor.info.name: digest}, None), None, None, finite)


def quantized_result(
    tensor: PlannedTensor,
    hashes: Mapping[str, str],
    errors: Errors,
    amax: np.float32,
    output: tuple[float, float] | None,
) -> Result:
    """The result of a weight.

    Args:
        tensor: the weight.
        hashes: the SHA-256 of each stored tensor.
        errors: how far it is from its source.
        amax: its largest magnitude.
        output: of calibrated codes, the errors of its output with nearest codes and with its own.
    """
    record = _record(tensor, hashes, errors)
    if output is not None:
        record = replace(record, nearest_output_error=output[0], output_error=output[1])
    return Result(record, errors, amax, finite=True)


def to_json(result: Result) -> dict[str, Any]:
    """JSON-ready data; every number comes back as it is."""
    return {
        "record": asdict(result.record),
        "errors": asdict(result.errors) if result.errors else None,
        "amax": None if result.amax is None else float(result.amax),
        "finite": result.finite,
    }


def from_json(data: Mapping[str, Any], tensor: PlannedTensor) -> Result:
    """The inverse, for a tensor of the plan.

    Raises:
        KeyError, TypeError, ValueError: it is no result of this tensor.
    """
    errors, amax = data["errors"], data["amax"]
    record = TensorRecord(**{**data["record"], "shape": tuple(data["record"]["shape"])})
    if {stored.name for stored in tensor.stored.values()} != record.stored.keys():
        raise ValueError("of another tensor")
    result = Result(
        record, Errors(**errors) if errors else None, None if amax is None else np.float32(amax), bool(data["finite"])
    )
    plain = replace(record, output_error=None, nearest_output_error=None)
    if plain != _record(tensor, record.stored, result.errors):
        raise ValueError("of another plan")
    return result


def _record(tensor: PlannedTensor, hashes: Mapping[str, str], errors: Errors | None) -> TensorRecord:
    return TensorRecord(
        decision="quantize" if tensor.decision.quantize else "keep",
        reason=tensor.decision.reason,
        dtype=tensor.info.dtype,
        shape=tensor.info.shape,
        bits_per_weight=tensor.bits_per_weight,
        stored=dict(hashes),
        relative_error=errors.relative if errors else None,
        max_error=errors.max_error if errors else None,
    )
