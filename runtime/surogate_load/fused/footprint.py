"""`model.get_memory_footprint()` of packed models: what fused layers share counts once.

transformers adds up parameters and buffers; the packed tensors of a fused group's members are views of the group's.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from surogate_load.fused.projections import shared_bytes


def count_once() -> None:
    """Has transformers count so; a second call does nothing."""
    from transformers import PreTrainedModel

    original = PreTrainedModel.get_memory_footprint
    if getattr(original, "asks_surogate", False):
        return

    @wraps(original)
    def get_memory_footprint(self: Any, return_buffers: bool = True) -> int:
        counted: int = original(self, return_buffers)
        return counted - (shared_bytes(self) if return_buffers else 0)

    get_memory_footprint.asks_surogate = True  # type: ignore[attr-defined]
    PreTrainedModel.get_memory_footprint = get_memory_footprint
