"""Rounding of tensors onto the small floating-point types; `surogate_formats.rounding` in torch."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from surogate_formats.tables import E2M1_VALUES, E4M3_MAX, E4M3_MIN, E5M2_MAX

FP8_MAX = {torch.float8_e4m3fn: float(E4M3_MAX), torch.float8_e5m2: float(E5M2_MAX)}
"""The largest finite value of each fp8 dtype."""

_E4M3_MAX_CODE = 0x7E
_EXPONENT_MASK = 0x7F800000


@cache
def constant(value: float, device: torch.device) -> Tensor:
    """A 0-d float32 on the device.

    torch divides a CUDA tensor by a Python number as a multiplication by its reciprocal, which rounds differently.
    """
    return torch.tensor(value, dtype=torch.float32, device=device)


def power_of_two_floor(x: Tensor) -> Tensor:
    """The largest power of two that is at most x, for positive normal float32."""
    return (x.view(torch.int32) & _EXPONENT_MASK).view(torch.float32)


def saturating_cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds float32 to an fp8 dtype, to nearest even, saturating at its largest finite value; NaN stays NaN."""
    return x.clamp(-FP8_MAX[dtype], FP8_MAX[dtype]).to(dtype)


def to_e4m3_up(x: Tensor) -> Tensor:
    """The smallest E4M3 value that is at least x, for float32 0 <= x; at most 448."""
    nearest = saturating_cast(x, torch.float8_e4m3fn)
    below = nearest.float() < x
    codes = (nearest.view(torch.uint8) + below.to(torch.uint8)).clamp(max=_E4M3_MAX_CODE)
    return codes.view(torch.float8_e4m3fn)


def e4m3_block_scale(wanted: Tensor, block_amax: Tensor, *, up: bool = False) -> Tensor:
    """E4M3 scales as float32: rounded, at most 448, at least 2^-9 where the block has magnitude, else 0."""
    rounded = to_e4m3_up(wanted) if up else saturating_cast(wanted, torch.float8_e4m3fn)
    floored = rounded.float().clamp(min=float(E4M3_MIN))
    return torch.where(block_amax > 0, floored, torch.zeros_like(floored))


@cache
def _e2m1_magnitudes(device: torch.device) -> Tensor:
    return torch.from_numpy(E2M1_VALUES[:8].copy()).to(device)


@cache
def _e2m1_thresholds(device: torch.device) -> Tensor:
    """Midpoints between neighbours, moved down by one ulp where the tie goes up, to the even code."""
    values = _e2m1_magnitudes(device)
    middle = (values[:-1] + values[1:]) / 2
    upper_is_even = torch.arange(1, 8, device=device) % 2 == 0
    return torch.where(upper_is_even, torch.nextafter(middle, torch.zeros_like(middle)), middle)


def _with_sign(index: Tensor, x: Tensor) -> Tensor:
    return index.to(torch.uint8) | (torch.signbit(x).to(torch.uint8) << 3)


def to_e2m1_codes(x: Tensor) -> Tensor:
    """Rounds float32 to E2M1, ties to even, saturating at 6: uint8 codes sign << 3 | index, one a byte."""
    return _with_sign(torch.bucketize(x.abs(), _e2m1_thresholds(x.device), out_int32=True), x)


def to_e2m1_codes_stochastic(x: Tensor, uniform: Tensor) -> Tensor:
    """Rounds float32 to one of the two neighbouring E2M1 values, up with probability (|x| - lower) / (upper - lower).

    Args:
        x: float32; magnitudes above 6 become 6.
        uniform: float32 in [0, 1), of the shape of x.
    """
    values = _e2m1_magnitudes(x.device)
    magnitude = x.abs().clamp(max=float(values[-1]))
    lower = (torch.bucketize(magnitude, values, right=True, out_int32=True) - 1).clamp(0, 6)
    low, high = values[lower], values[lower + 1]
    return _with_sign(lower + (uniform < (magnitude - low) / (high - low)), x)


@cache
def _e2m1_values(device: torch.device) -> Tensor:
    return torch.from_numpy(E2M1_VALUES).to(device)


def from_e2m1_codes(codes: Tensor) -> Tensor:
    """The float32 values of uint8 E2M1 codes, one a byte."""
    return _e2m1_values(codes.device)[codes.int()]


def pack_low_first(codes: Tensor) -> Tensor:
    """uint8 [..., n/2] from codes 0..15 [..., n], n even; element 2i in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)
