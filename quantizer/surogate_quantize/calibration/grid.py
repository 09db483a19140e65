"""What a solver may choose from: the legal values of a weight, which are a code's value times a legal scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from surogate_formats.format import Parts


@dataclass(frozen=True)
class Blocks:
    """Which values of a weight [N, K] share a scale: tiles of `height` x `width`, or runs of `width` in flat order.

    Attributes:
        shape: [N, K].
        height: rows of a tile; 0 for runs in flat order that may cross the ends of rows.
        width: columns of a tile, or values of a run.
    """

    shape: tuple[int, int]
    height: int
    width: int

    @property
    def count(self) -> tuple[int, ...]:
        """Shape of the scales: [rows of tiles, tiles in a row], or [runs]."""
        rows, columns = self.shape
        if self.height == 0:
            return (-(-rows * columns // self.width),)
        return (-(-rows // self.height), -(-columns // self.width))

    def expand(self, scales: Tensor) -> Tensor:
        """Each value's scale, [N, K], from `count`."""
        rows, columns = self.shape
        if self.height == 0:
            return scales.repeat_interleave(self.width)[: rows * columns].reshape(rows, columns)
        wide = scales.repeat_interleave(self.width, 1)[:, :columns]
        return wide.repeat_interleave(self.height, 0)[:rows] if self.height > 1 else wide

    def sums(self, values: Tensor) -> Tensor:
        """The sum of each block, in the shape of `count`, of [N, K]."""
        return self._blocked(values).sum((1, 3)) if self.height else self._runs(values).sum(1)

    def largest(self, values: Tensor) -> Tensor:
        """The largest magnitude of each block, in the shape of `count`, of [N, K]."""
        return self._blocked(values).abs().amax((1, 3)) if self.height else self._runs(values).abs().amax(1)

    def _blocked(self, values: Tensor) -> Tensor:
        rows, columns = values.shape
        tall, wide = -(-rows // self.height), -(-columns // self.width)
        padding = (0, wide * self.width - columns, 0, tall * self.height - rows)
        padded = torch.nn.functional.pad(values, padding) if any(padding) else values
        return padded.reshape(tall, self.height, wide, self.width)

    def _runs(self, values: Tensor) -> Tensor:
        flat = values.reshape(-1)
        return torch.nn.functional.pad(flat, (0, -flat.numel() % self.width)).reshape(-1, self.width)


class Grid(Protocol):
    """The legal values of one weight in its format.

    Attributes:
        blocks: which values share a scale.
        scales: float32 [`blocks.count`], those that rounding to nearest takes.
        multipliers: of `scales` (before they are made legal), those that are worth a try.
        asymmetric: whether it pays to make up for the errors of the layers before.
    """

    asymmetric: bool
    blocks: Blocks
    scales: Tensor
    multipliers: tuple[float, ...]

    def nearest(self, x: Tensor) -> Tensor:
        """The value of the code that is nearest to each x (a weight over its scale), float32."""
        ...

    def legal(self, scales: Tensor, place: slice = slice(None)) -> Tensor:
        """The nearest scales that can be stored, as a reader restores them, float32.

        Args:
            scales: float32 [`blocks.count`], or those columns of it that `place` takes.
            place: which columns.
        """
        ...

    def parts(self, values: Tensor, scales: Tensor) -> Parts:
        """The parts that stand for values of codes, float32 [N, K], times legal scales."""
        ...


def rounded(grid: Grid, weight: Tensor, scale: Tensor) -> Tensor:
    """The values of the nearest codes to a weight under scales of its shape, float32; 0 where a scale is 0."""
    values = grid.nearest(weight / torch.where(scale == 0, 1, scale))
    return torch.where(scale == 0, 0, values)
