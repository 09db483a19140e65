"""E4M3 and E5M2 quantization at run time, with the delayed scale of recipe fp8-hybrid."""

from __future__ import annotations

import torch
from torch import Tensor

from surogate_load.ops.library import define
from surogate_load.ops.rounding import FP8_MAX, constant, saturating_cast

SMALLEST_SCALE = 2.0**-126
LARGEST_SCALE = 2.0**126


def largest_magnitude(x: Tensor) -> Tensor:
    """max|x| as float32 [1]; 0 for an empty tensor."""
    amax = x.abs().amax() if x.numel() else x.new_zeros(())
    return amax.float().reshape(1)


def scale_for(amax: Tensor, dtype: torch.dtype, margin: int) -> Tensor:
    """The encoding scale fmax * 2^-margin / amax within [2^-126, 2^126]; 1 where amax is 0 or not finite."""
    reach = constant(FP8_MAX[dtype] * 2.0**-margin, amax.device)
    usable = (amax > 0) & torch.isfinite(amax)
    scale = (reach / amax).clamp(SMALLEST_SCALE, LARGEST_SCALE)
    return torch.where(usable, scale, torch.ones_like(scale))


def _quantize(
    x: Tensor,
    column_scale: Tensor | None,
    scale: Tensor,
    current: Tensor,
    record: bool,
    margin: int,
    dtype: torch.dtype,
    copies: int = 1,
) -> tuple[Tensor, Tensor]:
    values = x.float() if column_scale is None else x.float() * column_scale
    amax = largest_magnitude(values)
    if record:
        current.copy_(torch.maximum(current, amax))
    used = torch.where(scale > 0, scale, scale_for(amax, dtype, margin))
    return saturating_cast(values * used, dtype), (constant(1.0, x.device) / used).repeat(copies)


def _fake(
    x: Tensor,
    column_scale: Tensor | None,
    scale: Tensor,
    current: Tensor,
    record: bool,
    margin: int,
    dtype: torch.dtype,
    copies: int = 1,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), scale.new_empty(copies)


# x: floating [..., n]. column_scale: float32 [n], multiplied into x first. scale: float32 [1], the delayed encoding
# scale, 0 before the first step, which takes its own amax. current: float32 [1]; with `record` it becomes
# max(current, amax). Results: codes of `dtype` in x's shape, and the factor that decodes them as float32 [copies].
define(
    "quantize_fp8(Tensor x, Tensor? column_scale, Tensor scale, Tensor(a!) current, bool record, int margin, "
    "ScalarType dtype, SymInt copies=1) -> (Tensor, Tensor)",
    _quantize,
    _fake,
)
