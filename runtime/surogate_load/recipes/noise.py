"""Seed and counter of a layer's stochastic rounding, on the device: a replayed graph must not repeat its noise.

Every rank has noise of its own, or the errors of ranks would add up instead of averaging out.
"""

from __future__ import annotations

import hashlib
import os

import torch
from torch import Tensor

from surogate_load.placement import FixedDtypeModule


class Noise(FixedDtypeModule):
    """Philox state.

    Attributes:
        seed: int64 [1], from torch's initial seed, the layer's name and the rank.
        offset: int64 [1], counted up at each use.
    """

    seed: Tensor
    offset: Tensor

    def __init__(self, name: str) -> None:
        """State of the layer with this full name."""
        super().__init__()
        seed = _hash(f"{torch.initial_seed()} {name}") ^ _of_rank()
        self.register_buffer("seed", torch.tensor([seed], dtype=torch.int64))
        self.register_buffer("offset", torch.zeros(1, dtype=torch.int64))

    def state(self) -> tuple[Tensor, Tensor]:
        """(seed, offset), what the quantizing op takes."""
        return self.seed, self.offset

    def saved_seed(self) -> Tensor:
        """The seed without the rank, int64 [1]: what a checkpoint holds, and the other way round."""
        return self.seed ^ _of_rank()


def _of_rank() -> int:
    """What sets a rank's seeds apart; 0 for the first. Before ranks have joined, launchers say which one this is."""
    distributed = torch.distributed
    joined = distributed.is_available() and distributed.is_initialized()
    rank = distributed.get_rank() if joined else int(os.environ.get("RANK", "0"))
    return _hash(f"rank {rank}") if rank else 0


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
