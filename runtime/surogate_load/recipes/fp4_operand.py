"""Activations and gradients as NVFP4 operands in 1x16 blocks, emulated: what the operand stands for, in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ActivationRounding:
    """How an activation is quantized, always to nearest.

    Attributes:
        four_over_six: choose between two scales a block.
        metric: the error by which that is chosen.
    """

    four_over_six: bool = False
    metric: str = "mse"


def rounded_activation(x: Tensor, rounding: ActivationRounding) -> Tensor:
    """X [rows, columns] through NVFP4 1x16, float32; columns a multiple of 16."""
    parts = torch.ops.surogate.quantize_nvfp4(x, False, rounding.four_over_six, rounding.metric, False)
    values: Tensor = torch.ops.surogate.dequantize_nvfp4(*parts, torch.float32, None)
    return values


def rounded_gradient(gradient: Tensor, stochastic: bool, noise: tuple[Tensor, Tensor]) -> Tensor:
    """A gradient [rows, columns] through NVFP4 1x16, float32: unbiased, or to nearest. Never Four-Over-Six.

    Args:
        gradient: columns a multiple of 16.
        stochastic: round so that the expectation is the gradient.
        noise: seed and offset of the generator; the offset is counted up.
    """
    if not stochastic:
        return rounded_activation(gradient, ActivationRounding())
    parts = torch.ops.surogate.quantize_nvfp4_stochastic(gradient, *noise)
    values: Tensor = torch.ops.surogate.dequantize_nvfp4(*parts, torch.float32, None)
    return values
