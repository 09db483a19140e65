"""What the original model gives to the linears of a block, while these are solved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from surogate_quantize.calibration.activations import Activations


class OriginalInputs(Protocol):
    """Of one linear, a batch at a time."""

    @property
    def count(self) -> int:
        """Of batches."""
        ...

    def read(self, index: int) -> Tensor:
        """A batch, [rows, tokens, K], where the model runs."""
        ...

    def forget(self) -> None:
        """They are not read any more."""
        ...


class KeptInputs(Activations):
    """`OriginalInputs` in a file."""

    def forget(self) -> None:
        """Removes the file."""
        self.close()
        self.path.unlink()


class FoundInputs:
    """`OriginalInputs` that are found anew whenever they are read: a GPU does that sooner than a disk reads them.

    Args:
        find: the inputs by the hidden states before the block.
        stream: these.
    """

    def __init__(self, find: Callable[[Tensor], Tensor], stream: Activations) -> None:
        """Finds nothing yet."""
        self.count = stream.count
        self._find, self._stream = find, stream

    def read(self, index: int) -> Tensor:
        """A batch."""
        return self._find(self._stream.read(index))

    def forget(self) -> None:
        """There is nothing to remove."""
