"""Activations and gradients as NVFP4 operands in 1x16 blocks: their parts, and what those stand for, in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Parts = tuple[Tensor, Tensor, Tensor]
"""Codes uint8 [rows, columns / 2], scale E4M3 [rows, columns / 16] and global scale float32 [1], a divisor."""


@dataclass(frozen=True)
class ActivationRounding:
    """How an activation is quantized, always to nearest.

    Attributes:
        four_over_six: choose between two scales a block.
        metric: the error by which that is chosen.
    """

    four_over_six: bool = False
    metric: str = "mse"


def quantized_activation(x: Tensor, rounding: ActivationRounding) -> Parts:
    """X [rows, columns] in NVFP4 1x16; columns a multiple of 16."""
    parts: Parts = torch.ops.surogate.quantize_nvfp4(x, False, rounding.four_over_six, rounding.metric, False)
    return parts


def quantized_gradient(gradient: Tensor, stochastic: bool, noise: tuple[Tensor, Tensor]) -> Parts:
    """A gradient [rows, columns] in NVFP4 1x16: unbiased, or to nearest. Never Four-Over-Six.

    Args:
        gradient: columns a multiple of 16.
        stochastic: round so that the expectation is the gradient.
        noise: seed and offset of the generator; the offset is counted up.
    """
    if not stochastic:
        return quantized_activation(gradient, ActivationRounding())
    parts: Parts = torch.ops.surogate.quantize_nvfp4_stochastic(gradient, *noise)
    return parts


def dequantized(parts: Parts) -> Tensor:
    """What the parts stand for, float32 [rows, columns]."""
    values: Tensor = torch.ops.surogate.dequantize_nvfp4(*parts, torch.float32, None)
    return values
