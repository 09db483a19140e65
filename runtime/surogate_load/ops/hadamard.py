"""The random Hadamard transform, 16 wide: x diag(s) H16 / 4, orthogonal, so it cancels in a product of two operands."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from surogate_load.ops.library import define

WIDTH = 16

SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
"""The fixed signs s; those of NVIDIA's Transformer Engine."""


@cache
def _signs(device: torch.device) -> Tensor:
    return torch.tensor(SIGNS, dtype=torch.float32, device=device)


def hadamard16(x: Tensor) -> Tensor:
    """Transforms groups of 16 along the last axis (a multiple of 16), in float32; butterflies of width 1, 2, 4, 8."""
    rotated = x.float().reshape(-1, WIDTH) * _signs(x.device)
    for width in (1, 2, 4, 8):
        pairs = rotated.reshape(-1, WIDTH // (2 * width), 2, width)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        rotated = torch.stack((a + b, a - b), dim=2).reshape(-1, WIDTH)
    return (rotated * 0.25).reshape(x.shape)


def _fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


define("hadamard16(Tensor x) -> Tensor", hadamard16, _fake)
