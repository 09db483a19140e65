"""The summary of a plan or a run, as data."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from surogate_formats.block_errors import output_errors
from surogate_formats.format import to_dict
from surogate_quantize.plan import Plan, PlannedTensor, count_reasons
from surogate_quantize.results import Result
from surogate_quantize.weight_errors import Errors

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class PlanSummary:
    """What a plan would write.

    Attributes:
        format: the format with its parameters.
        layout: the layout's name.
        codes: how codes are chosen, as the manifest records it; of a calibrated pass also `estimated_seconds`.
        source_bytes, artifact_bytes: payload of all tensors.
        values: values in the model; `quantized_values` of them are quantized.
        quantized_tensors: number of tensors that are quantized.
        bits_per_weight: stored bits a value over the quantized tensors, companions included.
        model_bits_per_weight: the same over all tensors.
        kept: reason to number of tensors.
        shards: number of output shards.
    """

    format: Mapping[str, Any]
    layout: str
    codes: Mapping[str, Any]
    source_bytes: int
    artifact_bytes: int
    values: int
    quantized_values: int
    quantized_tensors: int
    bits_per_weight: float
    model_bits_per_weight: float
    kept: Mapping[str, int]
    shards: int

    @property
    def quantized_share(self) -> float:
        """Share of the model's values that are quantized."""
        return self.quantized_values / max(self.values, 1)


@dataclass(frozen=True)
class RunSummary:
    """What a run wrote, and how well and how fast.

    Attributes:
        plan: the sizes.
        out: the artifact's directory.
        reused_shards: how many of the shards an earlier run had finished.
        device: what quantized the weights: `cpu`, or `cuda:0` and the GPU's name.
        relative_error: ||dequantized - source|| / ||source|| over all quantized weights.
        relative_error_by_projection: the same by the last part of the module's name.
        worst: name and relative error of the worst weight.
        output_error: where the model was run on text, the mean relative error of the linears' outputs on held-out text,
            with codes that are nearest and with those that were found (and the adapter); None elsewhere.
        output_error_by_block: the same by the number of the block.
        seconds: wall time of the whole run.
        megabytes_per_second: source bytes / seconds / 10^6.
        peak_rss_bytes: the largest resident size of the process so far; None where the system doesn't tell.
        carried_over: files that went along.
        warnings: what the user should know, a line each.
    """

    plan: PlanSummary
    out: str
    reused_shards: int
    device: str
    relative_error: float
    relative_error_by_projection: Mapping[str, float]
    worst: tuple[str, float]
    output_error: tuple[float, float] | None
    output_error_by_block: Mapping[int, tuple[float, float]]
    seconds: float
    megabytes_per_second: float
    peak_rss_bytes: int | None
    carried_over: tuple[str, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {
            "schema_version": SCHEMA_VERSION,
            **asdict(self),
            "quantized_share": self.plan.quantized_share,
        }


def summarize_plan(plan: Plan) -> PlanSummary:
    """Adds up a plan."""
    quantized = plan.quantized
    values, quantized_values = _values(plan.tensors), _values(quantized)
    stored = sum(tensor.stored_bytes for tensor in plan.tensors)
    return PlanSummary(
        format=to_dict(plan.options.format),
        layout=plan.options.layout.name,
        codes={"codes": plan.options.codes, "adapter_init": plan.options.adapter_init, **(plan.calibration or {})},
        source_bytes=sum(tensor.info.nbytes for tensor in plan.tensors),
        artifact_bytes=stored,
        values=values,
        quantized_values=quantized_values,
        quantized_tensors=len(quantized),
        bits_per_weight=8 * sum(tensor.stored_bytes for tensor in quantized) / max(quantized_values, 1),
        model_bits_per_weight=8 * stored / max(values, 1),
        kept=count_reasons(tensor.decision for tensor in plan.tensors),
        shards=plan.shards,
    )


def plan_json(plan: Plan) -> dict[str, Any]:
    """The whole plan as JSON-ready data: the summary, and every tensor with its decision and reason."""
    summary = summarize_plan(plan)
    tensors = {
        tensor.info.name: {
            "decision": "quantize" if tensor.decision.quantize else "keep",
            "reason": tensor.decision.reason,
            "dtype": tensor.info.dtype,
            "shape": list(tensor.info.shape),
            "bytes": tensor.stored_bytes,
            "bits_per_weight": tensor.bits_per_weight,
        }
        for tensor in plan.tensors
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "plan": {**asdict(summary), "quantized_share": summary.quantized_share},
        "tensors": tensors,
    }


def summarize_run(
    plan: Plan,
    results: Mapping[str, Result],
    *,
    out: str,
    reused_shards: int,
    device: str,
    seconds: float,
    carried: Iterable[str],
    advice: Iterable[str],
) -> RunSummary:
    """Adds up a run."""
    measured = {name: result.errors for name, result in results.items() if result.errors is not None}
    by_projection: dict[str, list[Errors]] = {}
    for tensor in plan.quantized:
        by_projection.setdefault(tensor.module.rpartition(".")[2], []).append(measured[tensor.info.name])
    worst = max(measured, key=lambda name: measured[name].relative)
    summary = summarize_plan(plan)
    return RunSummary(
        plan=summary,
        out=out,
        reused_shards=reused_shards,
        device=device,
        relative_error=_relative(measured.values()),
        relative_error_by_projection={name: _relative(errors) for name, errors in by_projection.items()},
        worst=(worst, measured[worst].relative),
        output_error=_output_error(results),
        output_error_by_block={
            block: (error.nearest, error.packed)
            for block, error in output_errors({name: result.record for name, result in results.items()}).items()
        },
        seconds=seconds,
        megabytes_per_second=summary.source_bytes / seconds / 1e6,
        peak_rss_bytes=peak_rss(),
        carried_over=tuple(carried),
        warnings=(*_not_finite(results), *advice),
    )


def peak_rss() -> int | None:
    """Bytes of the process's largest resident size so far; None where the system doesn't tell."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would count what the parent process held before it started this one.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _values(tensors: Iterable[PlannedTensor]) -> int:
    return sum(tensor.values for tensor in tensors)


def _relative(errors: Iterable[Errors]) -> float:
    collected = list(errors)
    square = sum(error.squared_sum for error in collected)
    return math.sqrt(sum(error.squared_error for error in collected) / square) if square else 0.0


def _output_error(results: Mapping[str, Result]) -> tuple[float, float] | None:
    records = [result.record for result in results.values()]
    pairs = [(r.nearest_output_error, r.output_error) for r in records]
    known = [(before, after) for before, after in pairs if before is not None and after is not None]
    if not known:
        return None
    return sum(before for before, _ in known) / len(known), sum(after for _, after in known) / len(known)


def _not_finite(results: Mapping[str, Result]) -> Iterable[str]:
    for name, result in results.items():
        if not result.finite:
            yield f"{name} is kept as it is, and holds a NaN or an infinity"
