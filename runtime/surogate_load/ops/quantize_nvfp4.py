"""NVFP4 quantization at run time: numpy's `NVFP4.quantize` bit for bit, and a stochastic form for gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from surogate_formats.nvfp4 import BLOCK, LARGEST_GLOBAL_SCALE
from surogate_formats.tables import E2M1_MAX, E4M3_MAX, LARGEST_BLOCK_SCALE
from surogate_load.ops.library import define
from surogate_load.ops.philox import uniform
from surogate_load.ops.quantize_fp8 import largest_magnitude
from surogate_load.ops.rounding import (
    constant,
    e4m3_block_scale,
    from_e2m1_codes,
    pack_low_first,
    power_of_two_floor,
    to_e2m1_codes,
    to_e2m1_codes_stochastic,
)

Parts = tuple[Tensor, Tensor, Tensor]


def reach(four_over_six: bool) -> float:
    """T, what the global scale maps the largest magnitude to: the largest block scale times the largest code."""
    return float(LARGEST_BLOCK_SCALE[four_over_six] * E2M1_MAX)


def global_scale(amax: Tensor, four_over_six: bool, power_of_two: bool) -> Tensor:
    """g, float32 [1]: min(fl(T / amax), 2^123), rounded down to a power of two on request; 1 where amax is 0."""
    g = (constant(reach(four_over_six), amax.device) / amax).clamp(max=float(LARGEST_GLOBAL_SCALE))
    if power_of_two:
        g = power_of_two_floor(g)
    return torch.where(amax == 0, torch.ones_like(g), g)


def _tiles(x: Tensor, height: int) -> Tensor:
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x.float(), (0, 0, 0, -rows % height))
    return padded.reshape(-1, height, columns // BLOCK, BLOCK)


def _normalize(tiles: Tensor, scale: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """(tiles / step, step), both [row tiles, height, blocks, 16] or broadcastable; 0 / 1 where the step is 0."""
    step = (scale / g)[:, None, :, None]
    return torch.where(step == 0, 0.0, tiles / torch.where(step == 0, 1.0, step)), step


def _block_error(values: Tensor, tiles: Tensor, metric: str) -> Tensor:
    """[row tiles, blocks], summed in float32 in element order, as the numpy reference does."""
    difference = (values - tiles).abs()
    terms = difference * difference if metric == "mse" else difference
    total = terms.new_zeros((terms.shape[0], terms.shape[2]))
    for row in range(terms.shape[1]):
        for column in range(BLOCK):
            term = terms[:, row, :, column]
            total = torch.maximum(total, term) if metric == "absmax" else total + term
    return total


def _finish(codes: Tensor, scale: Tensor, g: Tensor, rows: int) -> Parts:
    height = codes.shape[1]
    stored = scale.to(torch.float8_e4m3fn).view(torch.uint8).repeat_interleave(height, dim=0)[:rows]
    flat = codes.reshape(codes.shape[0] * height, codes.shape[2] * BLOCK)[:rows]
    return pack_low_first(flat), stored.view(torch.float8_e4m3fn), g


def _quantize(x: Tensor, two_d: bool, four_over_six: bool, metric: str, power_of_two: bool) -> Parts:
    tiles = _tiles(x, BLOCK if two_d else 1)
    g = global_scale(largest_magnitude(tiles), four_over_six, power_of_two)
    block_amax = tiles.abs().amax(dim=(1, 3))
    sixth = block_amax / constant(float(E2M1_MAX), x.device) * g
    scale = e4m3_block_scale(sixth.clamp(max=float(E4M3_MAX)), block_amax)
    normalized, step = _normalize(tiles, scale, g)
    codes = to_e2m1_codes(normalized)
    if four_over_six:
        scale_4 = e4m3_block_scale((1.5 * sixth).clamp(max=float(E4M3_MAX)), block_amax)
        normalized_4, step_4 = _normalize(tiles, scale_4, g)
        codes_4 = to_e2m1_codes(normalized_4)
        error_4 = _block_error(from_e2m1_codes(codes_4) * step_4, tiles, metric)
        four = error_4 < _block_error(from_e2m1_codes(codes) * step, tiles, metric)
        scale = torch.where(four, scale_4, scale)
        codes = torch.where(four[:, None, :, None], codes_4, codes)
    return _finish(codes, scale, g, x.shape[0])


def _quantize_stochastic(x: Tensor, seed: Tensor, offset: Tensor) -> Parts:
    tiles = _tiles(x, 1)
    g = global_scale(largest_magnitude(tiles), False, False)
    block_amax = tiles.abs().amax(dim=(1, 3))
    sixth = block_amax / constant(float(E2M1_MAX), x.device) * g
    normalized, _ = _normalize(tiles, scale := e4m3_block_scale(sixth, block_amax, up=True), g)
    noise = uniform(x.numel(), seed, offset).reshape(normalized.shape)
    offset.add_(1)
    return _finish(to_e2m1_codes_stochastic(normalized, noise), scale, g, x.shape[0])


def _fake(x: Tensor, *rest: object) -> Parts:
    rows, columns = x.shape
    return (
        x.new_empty((rows, columns // 2), dtype=torch.uint8),
        x.new_empty((rows, columns // BLOCK), dtype=torch.float8_e4m3fn),
        x.new_empty((1,), dtype=torch.float32),
    )


# x: floating [rows, columns], columns a multiple of 16. Results: codes uint8 [rows, columns / 2], scale float8_e4m3fn
# [rows, columns / 16], global scale float32 [1], a divisor.
define(
    "quantize_nvfp4(Tensor x, bool two_d, bool four_over_six, str metric, bool power_of_two) "
    "-> (Tensor, Tensor, Tensor)",
    _quantize,
    _fake,
)

# 1x16 blocks whose scale is rounded up, so that no element saturates and the expectation of the result is x. seed:
# int64 [1]. offset: int64 [1], counted up by one, so that the next call draws other noise.
define(
    "quantize_nvfp4_stochastic(Tensor x, Tensor seed, Tensor(a!) offset) -> (Tensor, Tensor, Tensor)",
    _quantize_stochastic,
    _fake,
)
