"""How plans and summaries look on a terminal; nothing here prints."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from surogate_formats.codes_in_words import codes_in_words
from surogate_quantize.plan import Plan, PlannedTensor
from surogate_quantize.summary import PlanSummary, RunSummary, summarize_plan

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def size(count: float) -> str:
    """Bytes in decimal units, as file managers and the Hub count them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def progress_line(done: int, total: int, seconds: float, name: str) -> str:
    """One line for a log: share, rate, time left, current tensor."""
    rate = done / max(seconds, 1e-9)
    left = (total - done) / max(rate, 1)
    return f"{size(done)} of {size(total)} ({done / total:.0%}), {size(rate)}/s, {left:.0f} s left, {name}"


def plan_tables(made: Plan, *, every_tensor: bool) -> RenderableType:
    """A plan: every tensor with its decision, and the sizes. Layers that are treated alike share a line."""
    from rich.console import Group
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("tensors", "shape", "dtype", "decision", "bits", "reason"):
        table.add_column(column, overflow="fold", justify="right" if column == "bits" else "left")
    for name, tensor in _collapsed(made.tensors, every_tensor=every_tensor):
        decision = made.options.format.name if tensor.decision.quantize else "keep"
        shape = "x".join(map(str, tensor.info.shape)) or "scalar"
        bits = f"{tensor.bits_per_weight:.3f}"
        table.add_row(name, shape, tensor.info.dtype, decision, bits, tensor.decision.reason)
    return Group(table, "", _plan_rows(summarize_plan(made)))


def run_table(summary: RunSummary) -> RenderableType:
    """A run: what was written, how well, how fast."""
    table = _plan_rows(summary.plan)
    parts = sorted(summary.relative_error_by_projection.items(), key=lambda item: -item[1])
    table.add_row("relative error", f"{summary.relative_error:.4f}  ({', '.join(f'{k} {v:.4f}' for k, v in parts)})")
    table.add_row("largest error", f"{summary.worst[1]:.4f}  {summary.worst[0]}")
    if summary.output_error is not None:
        before, after = summary.output_error
        text = f"{after:.4f} on held-out text, with nearest codes {before:.4f} (mean over the linears)"
        table.add_row("output error", text)
        blocks = summary.output_error_by_block.items()
        table.add_row("of each block", ", ".join(f"{n}: {found:.4f} ({first:.4f})" for n, (first, found) in blocks))
    peak = f", peak memory {size(summary.peak_rss_bytes)}" if summary.peak_rss_bytes else ""
    table.add_row("time", f"{summary.seconds:.1f} s, {summary.megabytes_per_second:.0f} MB/s on {summary.device}{peak}")
    table.add_row("files", ", ".join(summary.carried_over) or "no tokenizer or licence beside the source")
    if summary.reused_shards:
        table.add_row("reused", f"{summary.reused_shards} of {summary.plan.shards} shards of an unfinished run")
    table.add_row("written to", summary.out)
    return table


def codes_line(codes: Mapping[str, Any]) -> str:
    """How codes are chosen, and how long that takes."""
    seconds = codes.get("estimated_seconds")
    return codes_in_words(codes) + ("" if seconds is None else f"; {_about(seconds)} for all blocks, estimated")


def _about(seconds: float) -> str:
    """Coarse, as it is known."""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    return f"about {round(seconds / 60)} min" if seconds < 90 * 60 else f"about {seconds / 3600:.1f} h"


def _plan_rows(summary: PlanSummary) -> Table:
    from rich.table import Table

    parameters = ", ".join(f"{key} {value}" for key, value in summary.format.items() if key != "name")
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("format", f"{summary.format['name']} ({parameters}) in layout {summary.layout}")
    millions = summary.values / 1e6
    share = f"{summary.quantized_share:.1%} of {millions:.1f} M parameters"
    table.add_row("codes", codes_line(summary.codes))
    table.add_row("quantized", f"{summary.quantized_tensors} weights, {share}")
    table.add_row("kept", "; ".join(f"{count} {reason}" for reason, count in summary.kept.items()) or "nothing")
    shards = f", {summary.shards} shards" if summary.shards > 1 else ""
    ratio = summary.artifact_bytes / max(summary.source_bytes, 1)
    table.add_row("size", f"{size(summary.source_bytes)} -> {size(summary.artifact_bytes)} ({ratio:.0%}{shards})")
    table.add_row(
        "bits per weight",
        f"{summary.bits_per_weight:.3f} quantized, {summary.model_bits_per_weight:.3f} over the model",
    )
    return table


def _collapsed(tensors: Iterable[PlannedTensor], *, every_tensor: bool) -> list[tuple[str, PlannedTensor]]:
    if every_tensor:
        return [(tensor.info.name, tensor) for tensor in tensors]
    alike: dict[tuple[object, ...], list[PlannedTensor]] = {}
    for tensor in tensors:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "{}", tensor.info.name)
        key = (pattern, tensor.info.shape, tensor.info.dtype, tensor.decision)
        alike.setdefault(key, []).append(tensor)
    return [(_pattern_name(str(key[0]), group), group[0]) for key, group in alike.items()]


def _pattern_name(pattern: str, group: list[PlannedTensor]) -> str:
    """`model.layers.{0-29}.mlp.up_proj.weight` for a group whose names differ in numbers only."""
    columns = zip(*(re.findall(r"(?<=\.)\d+(?=\.)", tensor.info.name) for tensor in group), strict=True)
    for column in columns:
        pattern = pattern.replace("{}", _ranges(sorted({int(number) for number in column})), 1)
    return pattern


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"
