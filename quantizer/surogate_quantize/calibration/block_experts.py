"""The experts of a block, and how many of them are solved at a time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from surogate_load.experts.apart import ExpertsApart
from surogate_quantize.calibration.observing import Linears

SUMS_AT_A_TIME = 256 << 20
"""Bytes of experts' sums for which all batches are read once."""

SUM = 8
"""Bytes of a value of a sum [K, K]: float64."""


@dataclass(frozen=True)
class BlockExperts:
    """The experts of a block.

    Attributes:
        name: full name of the experts in the checkpoint.
        module: they themselves.
        planned: full names of those of their weights that are quantized.
    """

    name: str
    module: ExpertsApart
    planned: frozenset[str]

    def __contains__(self, name: str) -> bool:
        """Whether a weight is one of theirs."""
        return name.startswith(f"{self.name}.")

    def names(self, number: int) -> list[str]:
        """The full names of an expert's gate, up and down."""
        return [f"{self.name}.{number}.{role}" for role in self.module.roles]


def block_experts(block: nn.Module, linears: Linears) -> BlockExperts | None:
    """The experts of a block whose weights are to be quantized; None if there are none."""
    for module in block.modules():
        if isinstance(module, ExpertsApart):
            own = {id(linear) for linear in module.modules()}
            planned = frozenset(name for name, linear in linears.items() if id(linear) in own)
            if planned:
                return BlockExperts(next(iter(planned)).rsplit(".", 2)[0], module, planned)
    return None


def experts_at_once(outer: int, inner: int) -> int:
    """For how many experts sums are held at a time: two each for gate and up, four for down.

    What starved experts take of all tokens gates and ups have in common, and each down has of its own.

    Args:
        outer: columns of gate and up.
        inner: columns of down.
    """
    return max(1, SUMS_AT_A_TIME // (SUM * max(2 * outer**2, 4 * inner**2)))


def sums_bytes(outer: int, inner: int, count: int) -> int:
    """Bytes of sums that are held at a time, those that the gates and ups of starved experts share among them.

    Args:
        outer: columns of gate and up.
        inner: columns of down.
        count: of experts.
    """
    at_once = min(experts_at_once(outer, inner), count)
    return SUM * (at_once * max(2 * outer**2, 4 * inner**2) + 2 * outer**2)
