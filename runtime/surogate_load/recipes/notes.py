"""What the loader says about layers that a recipe treats in another way than its name promises, or at a cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

_NAMED = 3


@dataclass
class _Note:
    layers: list[str] = field(default_factory=list)
    nbytes: int = 0
    error: float = 0.0
    norm: float = 0.0


class Notes:
    """Collects remarks layer by layer; gives one line a remark."""

    def __init__(self) -> None:
        """Starts empty."""
        self._notes: dict[str, _Note] = {}

    def add(self, remark: str, layer: str, *, nbytes: int = 0, error: float = 0.0, norm: float = 0.0) -> None:
        """Records that a remark holds for a layer.

        Args:
            remark: the text; equal texts are joined.
            layer: full name.
            nbytes: memory that the layer takes for it.
            error: squared Frobenius norm of what it changes in the weight.
            norm: squared Frobenius norm of the weight.
        """
        note = self._notes.setdefault(remark, _Note())
        note.layers.append(layer)
        note.nbytes += nbytes
        note.error += error
        note.norm += norm

    def lines(self) -> Iterator[str]:
        """One line a remark, with the layers and what it costs."""
        for remark, note in self._notes.items():
            named = ", ".join(note.layers[:_NAMED]) + (", ..." if len(note.layers) > _NAMED else "")
            cost = f"; {note.nbytes / 2**20:.1f} MiB more" if note.nbytes else ""
            change = f", relative weight error {math.sqrt(note.error / note.norm):.4f}" if note.norm else ""
            yield f"{remark}{cost}{change} ({len(note.layers)} layers: {named})"
