"""Activations and gradients as FP8 operands: by one op, or by operators that a compiler fuses with their producer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from surogate_load.ops.rounding import saturating_cast


class Rounding(NamedTuple):
    """How one operand is quantized; static.

    Attributes:
        dtype: E4M3 or E5M2.
        margin: of the recipe.
        record: whether its amax is recorded.
        fused: whether to leave quantization to the compiler: only where the scale is known not to be 0.
    """

    dtype: torch.dtype
    margin: int
    record: bool
    fused: bool


def quantize(
    x: Tensor, column_scale: Tensor | None, state: tuple[Tensor, Tensor], rounding: Rounding, copies: int = 1
) -> tuple[Tensor, Tensor]:
    """As the op `quantize_fp8`, whose bytes these are.

    Args:
        x: [..., n].
        column_scale: float32 [n], multiplied in first.
        state: float32 [1] each, the delayed scale and the largest amax since the last step, which is updated.
        rounding: see there.
        copies: how often the factor is wanted.

    Returns:
        Codes in x's shape, and the factor that decodes them, float32 [copies].
    """
    scale, current = state
    if not rounding.fused:
        codes, decode = torch.ops.surogate.quantize_fp8(
            x, column_scale, scale, current, rounding.record, rounding.margin, rounding.dtype, copies
        )
        return codes, decode
    values = x.float() if column_scale is None else x.float() * column_scale
    if rounding.record:
        # Row by row first: that the compiler fuses with what makes the rows, of all values at once it would not.
        current.copy_(torch.maximum(current, values.abs().amax(-1).amax()))
    return saturating_cast(values * scale, rounding.dtype), (1 / scale).repeat(copies)
