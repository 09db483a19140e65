"""Seed and counter of a layer's stochastic rounding, on the device: a replayed graph must not repeat its noise."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from surogate_load.placement import FixedDtypeModule


class Noise(FixedDtypeModule):
    """Philox state.

    Attributes:
        seed: int64 [1], from torch's initial seed and the layer's name.
        offset: int64 [1], counted up at each use.
    """

    seed: Tensor
    offset: Tensor

    def __init__(self, name: str) -> None:
        """State of the layer with this full name."""
        super().__init__()
        digest = hashlib.sha256(f"{torch.initial_seed()} {name}".encode()).digest()
        seed = int.from_bytes(digest[:8], "little", signed=True)
        self.register_buffer("seed", torch.tensor([seed], dtype=torch.int64))
        self.register_buffer("offset", torch.zeros(1, dtype=torch.int64))

    def state(self) -> tuple[Tensor, Tensor]:
        """(seed, offset), what the quantizing op takes."""
        return self.seed, self.offset
