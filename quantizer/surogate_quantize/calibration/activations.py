"""Activations on disk that survive a power cut."""

from __future__ import annotations

from surogate_load import activations
from surogate_quantize.syncing import sync


class Activations(activations.Activations):
    """A file of activations; see the base."""

    @property
    def rows(self) -> int:
        """First side of a batch: of hidden states, rows of text."""
        return self._shape[0]

    def sync(self) -> None:
        """Waits until the disk has what was written."""
        sync(self._file)
