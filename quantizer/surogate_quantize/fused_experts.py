"""Tensors that hold all experts of a layer: which are quantized expert by expert, and why the others are kept."""

from __future__ import annotations

from collections.abc import Mapping

from surogate_formats.checkpoint import Checkpoint
from surogate_formats.checkpoint.expert_slices import ExpertSlice
from surogate_formats.layouts import Layout
from surogate_quantize.selection import Decision

Decisions = Mapping[str, Decision]


def takes_apart(source: Checkpoint, layout: Layout) -> Mapping[str, tuple[ExpertSlice, ...]]:
    """Name of each fused tensor that may be quantized to the experts' weights in it, for readers of this layout."""
    return {
        name: parts
        for name, parts in source.fused_experts.items()
        if parts[0].arrangement.apart or layout.splits_experts
    }


def with_fused_kept(decisions: Decisions, source: Checkpoint, layout: Layout) -> dict[str, Decision]:
    """Decisions about weights of experts, with one about the fused tensor where none of them is quantized.

    Its reason is that of the first weight in it. Groups must have been kept whole: a layer's experts are quantized
    all, or none.
    """
    apart = takes_apart(source, layout)
    whole: dict[str, Decision] = {}
    for name in source.tensors:
        parts = [part.info.name for part in apart.get(name, ())]
        if parts and decisions[parts[0]].quantize:
            whole.update({part: decisions[part] for part in parts})
        else:
            whole[name] = decisions[parts[0] if parts else name]
            if name in source.fused_experts and not parts and whole[name].reason.startswith("fused"):
                whole[name] = Decision(False, f"fused experts, which readers of layout {layout.name} take whole")
    return whole
