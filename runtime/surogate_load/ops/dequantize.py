"""The dequantize ops, one pair a format: dense [N, K] from packed parts, bit-equal to the format's numpy `dequantize`.

Forward and backward use different ops, and the backward's takes the gradient as an argument: of one shared op
AOTAutograd would merge the two calls and save the dense weight in between.

Every op takes `dtype` (float32, bfloat16, float16, or float8_e4m3fn, saturating) and an optional `multiplier`, float32
[1]: the result is the float32 value, times the multiplier, rounded once. Work goes in pieces, to keep float32 scratch
small.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from surogate_formats.dynamic_absmax import DYNAMIC_MAP
from surogate_formats.fp8 import TILE
from surogate_formats.nf4 import BLOCKS_PER_GROUP
from surogate_formats.nvfp4 import BLOCK
from surogate_formats.tables import E2M1_VALUES, NF4_CODEBOOK
from surogate_load.ops.library import define
from surogate_load.ops.rounding import FP8_MAX, saturating_cast

PIECE = 1 << 18
"""Values dequantized at a time: 1 MiB of float32 scratch, which stays in the cache; a multiple of every block size."""


def _write(out: Tensor, values: Tensor, multiplier: Tensor | None) -> None:
    """Rounds float32 values into `out`; overwrites them on the way."""
    if multiplier is not None:
        values.mul_(multiplier)
    values = values.reshape(out.shape)
    out.copy_(saturating_cast(values, out.dtype) if out.dtype in FP8_MAX else values)


@cache
def _pair_table(first_high: bool, device: torch.device) -> Tensor:
    """int64 [256]: the bits of the two float32 values that each byte holds; one gather of 8 bytes gives both."""
    byte = torch.arange(256)
    high, low = byte >> 4, byte & 15
    table = torch.from_numpy(NF4_CODEBOOK if first_high else E2M1_VALUES)
    pairs = table[torch.stack((high, low) if first_high else (low, high), dim=-1)]
    return pairs.view(torch.int64).reshape(-1).to(device)


@cache
def _e4m3_table(device: torch.device) -> Tensor:
    """float32 [256]: the value of each E4M3 code; torch's own cast takes four times as long on a CPU."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)


def _gather(table: Tensor, codes: Tensor) -> Tensor:
    """A new flat float32 tensor of what the table holds for each byte of `codes`."""
    return table.index_select(0, codes.reshape(-1).int()).view(torch.float32)


@cache
def _dynamic_map(device: torch.device) -> Tensor:
    """float32 [256]: the value of each code of dynamic double quantization."""
    return torch.from_numpy(DYNAMIC_MAP).to(device)


def block_absmax(absmax: Tensor, scale: Tensor | None, offset: Tensor | None, double_quant: str) -> Tensor:
    """float32 [nb], as `surogate_formats.nf4.block_absmax`; `scale` and `offset` are the parts after absmax.

    In fused weights every group has a nested offset.
    """
    if scale is None or offset is None:
        return absmax
    group = torch.arange(absmax.numel(), device=absmax.device) // BLOCKS_PER_GROUP
    if double_quant == "dynamic":
        values = _gather(_dynamic_map(absmax.device), absmax).mul_(scale[group])
        return values.add_(offset[group] if len(offset) > 1 else offset)
    return ((absmax.float() - 128) * scale[group] + offset[group]).clamp(min=0)


def _nf4(
    codes: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    rows: int,
    columns: int,
    block_size: int,
    double_quant: str,
    dtype: torch.dtype,
    multiplier: Tensor | None,
) -> Tensor:
    n = rows * columns
    out = torch.empty(n, dtype=dtype, device=codes.device)
    table, flat = _pair_table(True, codes.device), codes.reshape(-1)
    scales = block_absmax(absmax, absmax_scale, absmax_offset, double_quant)
    for start in range(0, n, PIECE):
        stop = min(start + PIECE, n)
        values = _gather(table, flat[start // 2 : -(-stop // 2)])[: stop - start]
        first, whole = start // block_size, (stop - start) // block_size
        values[: whole * block_size].view(whole, block_size).mul_(scales[first : first + whole, None])
        values[whole * block_size :].mul_(scales[first + whole : first + whole + 1])
        _write(out[start:stop], values, multiplier)
    return out.reshape(rows, columns)


def _nf4_fake(codes: Tensor, *rest: Any) -> Tensor:
    rows, columns, _, _, dtype, _ = rest[-6:]
    return codes.new_empty((rows, columns), dtype=dtype)


def _nvfp4(codes: Tensor, scale: Tensor, global_scale: Tensor, dtype: torch.dtype, multiplier: Tensor | None) -> Tensor:
    return _from_steps(codes, scale, lambda scales: scales / global_scale, dtype, multiplier)


def _nvfp4_multiplied(
    codes: Tensor, scale: Tensor, scale_2: Tensor, dtype: torch.dtype, multiplier: Tensor | None
) -> Tensor:
    return _from_steps(codes, scale, lambda scales: scales * scale_2, dtype, multiplier)


def _from_steps(
    codes: Tensor,
    scale: Tensor,
    to_step: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    multiplier: Tensor | None,
) -> Tensor:
    rows, half = codes.shape
    out = torch.empty((rows, 2 * half), dtype=dtype, device=codes.device)
    table, steps = _pair_table(False, codes.device), _e4m3_table(codes.device)
    height = max(1, PIECE // max(1, 2 * half))
    for start in range(0, rows, height):
        stop = min(start + height, rows)
        step = to_step(_gather(steps, scale[start:stop].view(torch.uint8)))
        values = _gather(table, codes[start:stop]).view(-1, BLOCK)
        _write(out[start:stop], values.mul_(step[:, None]), multiplier)
    return out


def _nvfp4_fake(codes: Tensor, *rest: Any) -> Tensor:
    return codes.new_empty((codes.shape[0], 2 * codes.shape[1]), dtype=rest[-2])


def _scale_rows(scale: Tensor, scaling: str, start: int, stop: int, columns: int) -> Tensor:
    """The float32 scales of rows start..stop, broadcastable to [stop - start, columns]."""
    if scaling == "tensor":
        return scale.float()
    if scaling == "channel":
        return scale[start:stop].float()
    row = torch.arange(start, stop, device=scale.device) // TILE
    column = torch.arange(columns, device=scale.device) // TILE
    return scale.float()[row][:, column]


def _fp8(codes: Tensor, scale: Tensor, scaling: str, dtype: torch.dtype, multiplier: Tensor | None) -> Tensor:
    rows, columns = codes.shape
    out = torch.empty((rows, columns), dtype=dtype, device=codes.device)
    table, bytes_ = _e4m3_table(codes.device), codes.view(torch.uint8)
    height = max(1, PIECE // max(1, columns))
    for start in range(0, rows, height):
        stop = min(start + height, rows)
        values = _gather(table, bytes_[start:stop]).view(stop - start, columns)
        _write(out[start:stop], values.mul_(_scale_rows(scale, scaling, start, stop, columns)), multiplier)
    return out


def _fp8_fake(codes: Tensor, *rest: Any) -> Tensor:
    return codes.new_empty(codes.shape, dtype=rest[-2])


def _define_pair(name: str, arguments: str, kernel: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    define(f"{name}({arguments}, ScalarType dtype, Tensor? multiplier) -> Tensor", kernel, fake)
    define(
        f"{name}_for_backward(Tensor gradient, {arguments}, ScalarType dtype, Tensor? multiplier) -> Tensor",
        lambda gradient, *rest: kernel(*rest),
        lambda gradient, *rest: fake(*rest),
    )


_define_pair(
    "dequantize_nf4",
    "Tensor codes, Tensor absmax, Tensor? absmax_scale, Tensor? absmax_offset, int rows, int columns, int block_size, "
    "str double_quant",
    _nf4,
    _nf4_fake,
)
_define_pair("dequantize_nvfp4", "Tensor codes, Tensor scale, Tensor global_scale", _nvfp4, _nvfp4_fake)
_define_pair(
    "dequantize_nvfp4_multiplied", "Tensor codes, Tensor scale, Tensor scale_2", _nvfp4_multiplied, _nvfp4_fake
)
_define_pair("dequantize_fp8", "Tensor codes, Tensor scale, str scaling", _fp8, _fp8_fake)
