"""NVFP4 operands on tensor cores: torch's block-scaled product, and the layouts that it reads.

Not run on hardware: no device of compute capability 10.0 was at hand. What torch and cuBLAS demand is taken from
torch's sources; everything around the product is tested on the CPU. torch (2.13) holds the product of the two global
scales in one place a process, so that only one device, and one stream of it, may multiply at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType

from surogate_formats.nvfp4 import BLOCK
from surogate_load.ops.library import define
from surogate_load.weight import WeightKind

_TILE_ROWS, _TILE_COLUMNS = 128, 4
_STRIPES, _STRIPE_ROWS = 4, 32

_SIDE = 32
"""Sides that either direction can contract over: cuBLAS wants rows of codes in multiples of 16 bytes."""

_SCALING = [ScalingType.BlockWise1x16, ScalingType.TensorWise]
_SWIZZLE = [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]


def tensor_core_obstacle(kind: WeightKind) -> str | None:
    """What keeps tensor cores from multiplying with a weight in both directions."""
    return f"N or K is not a multiple of {_SIDE}" if any(side % _SIDE for side in kind.shape) else None


def swizzle(scale: Tensor) -> Tensor:
    """Block scales in the order in which tensor cores read them.

    Args:
        scale: E4M3 [rows, blocks].

    Returns:
        E4M3, flat: 128x4 tiles row by row, zeros beyond the edges. Row r, column c of a tile stands at
        (r % 32) * 16 + (r // 32) * 4 + c.
    """
    rows, columns = scale.shape
    codes = scale.view(torch.uint8)
    if rows % _TILE_ROWS or columns % _TILE_COLUMNS:
        codes = torch.nn.functional.pad(codes, (0, -columns % _TILE_COLUMNS, 0, -rows % _TILE_ROWS))
    stripes = codes.reshape(-(-rows // _TILE_ROWS), _STRIPES, _STRIPE_ROWS, -(-columns // _TILE_COLUMNS), _TILE_COLUMNS)
    return stripes.permute(0, 3, 2, 1, 4).reshape(-1).view(scale.dtype)


def transpose_codes(codes: Tensor) -> Tensor:
    """The codes of W^T, uint8 [K, N/2], from those of W, uint8 [N, K/2]; N even."""
    upper, lower = codes[0::2], codes[1::2]
    pairs = torch.stack(((upper & 0x0F) | (lower << 4), (upper >> 4) | (lower & 0xF0)), dim=-1)
    transposed: Tensor = torch.ops.surogate.transpose_bytes(pairs.flatten(1))
    return transposed


def _transpose(gradient: Tensor, codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return transpose_codes(codes), swizzle(scale[::BLOCK].t().repeat_interleave(BLOCK, dim=0))


def _transpose_fake(gradient: Tensor, codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = 2 * codes.shape[1], codes.shape[0]
    tiles = -(-rows // _TILE_ROWS) * -(-columns // (BLOCK * _TILE_COLUMNS))
    return codes.new_empty((rows, columns // 2)), scale.new_empty((tiles * _TILE_ROWS * _TILE_COLUMNS,))


def _product(
    codes: Tensor,
    scale: Tensor,
    global_scale: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    weight_global_scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    return torch.nn.functional.scaled_mm(
        codes.view(torch.float4_e2m1fn_x2),
        weight_codes.view(torch.float4_e2m1fn_x2).t(),
        [swizzle(scale), global_scale.reciprocal()],
        _SCALING,
        [weight_scale, weight_global_scale.reciprocal()],
        _SCALING,
        _SWIZZLE,
        _SWIZZLE,
        output_dtype=dtype,
    )


def _product_fake(codes: Tensor, scale: Tensor, global_scale: Tensor, weight_codes: Tensor, *rest: Any) -> Tensor:
    return codes.new_empty((codes.shape[0], weight_codes.shape[0]), dtype=rest[-1])


# W^T from codes [N, K/2] and 16x16 scales [N, K/16], N and K multiples of 16: codes [K, N/2], and scales as
# `nvfp4_product` takes them. Made anew in each backward: kept, they would take as much memory as W. It takes the
# gradient, so that a compiler can't move it into the forward and keep its result.
define(
    "transpose_nvfp4_for_backward(Tensor gradient, Tensor codes, Tensor scale) -> (Tensor, Tensor)",
    _transpose,
    _transpose_fake,
)

# [M, N] in `dtype` (float32, bfloat16 or float16), rounded once, from the parts of two NVFP4 matrices [M, K] and
# [N, K], K a multiple of 32 and N of 16; `weight_scale` is swizzled. An op of its own because inductor refuses torch's
# product with swizzled scales (torch 2.13).
define(
    "nvfp4_product(Tensor codes, Tensor scale, Tensor global_scale, Tensor weight_codes, Tensor weight_scale, "
    "Tensor weight_global_scale, ScalarType dtype) -> Tensor",
    _product,
    _product_fake,
)
