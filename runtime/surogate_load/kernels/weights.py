"""The arguments of a dequantize op as the kernels' `Weight`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from surogate_load.kernels.source import CHUNK, LANES, SCALINGS, TILE_VALUES, WEIGHT

_MOST_CHUNKS = 1 << 32
"""Scales finer than a tensor's are found by a chunk's index, in 32 bits."""

SUFFIXES = {
    torch.float32: "_float32",
    torch.bfloat16: "_bfloat16",
    torch.float16: "_float16",
    torch.float8_e4m3fn: "_float8_e4m3fn",
}
"""Result dtype to the end of the kernel's name."""


class Described(NamedTuple):
    """A weight as a kernel takes it.

    Attributes:
        kernel: name of the kernel, without the dtype's suffix.
        shape: of the result.
        tiles: thread blocks that it takes.
        keep: the tensors that are pointed to: codes, scale, scale_2, offset, multiplier; None where there is none.
        options: the fields of `Weight` after `first_tile`.
    """

    kernel: str
    shape: tuple[int, int]
    tiles: int
    keep: tuple[Tensor | None, ...]
    options: tuple[int, int, int, int, int]

    def packed(self, out: int = 0, first_tile: int = 0) -> bytes:
        """A `WEIGHT`: its result begins `out` bytes into the launch's, its thread blocks with number `first_tile`."""
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in self.keep]
        rows, columns = self.shape
        return WEIGHT.pack(*addresses, out, rows * columns, columns, first_tile, *self.options)


NF4_KERNELS = {"none": "nf4", "affine": "nf4_affine", "dynamic": "nf4_dynamic"}
"""NF4's double quantization to the kernel that reverses it."""


def _tiles(shape: tuple[int, int]) -> int:
    return -(-shape[0] * shape[1] // TILE_VALUES)


def describe_nf4(
    codes: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    rows: int,
    columns: int,
    block_size: int,
    double_quant: str,
    multiplier: Tensor | None,
) -> Described:
    """The arguments of `dequantize_nf4`."""
    codes, shape = codes.contiguous(), (rows, columns)
    offset_a_group = absmax_offset is not None and absmax_offset.numel() > 1
    options = (block_size.bit_length() - 1, 0, codes.data_ptr() % 4 == 0, offset_a_group, 0)
    companions = (None if part is None else part.contiguous() for part in (absmax, absmax_scale, absmax_offset))
    keep = (codes, *companions, multiplier)
    return Described(NF4_KERNELS[double_quant], shape, _tiles(shape), keep, options)


def describe_nvfp4(
    codes: Tensor, scale: Tensor, global_scale: Tensor, multiplier: Tensor | None, multiplies: bool = False
) -> Described:
    """The arguments of `dequantize_nvfp4`; with `multiplies` those of `dequantize_nvfp4_multiplied`."""
    codes, shape = codes.contiguous(), (codes.shape[0], 2 * codes.shape[1])
    keep = (codes, scale.contiguous(), global_scale, None, multiplier)
    return Described("nvfp4", shape, _tiles(shape), keep, (multiplies, 0, codes.data_ptr() % 4 == 0, 0, 0))


def describe_fp8(codes: Tensor, scale: Tensor, scaling: str, multiplier: Tensor | None) -> Described:
    """The arguments of `dequantize_fp8`."""
    codes, shape = codes.contiguous(), (codes.shape[0], codes.shape[1])
    aligned, steps = codes.data_ptr() % 8 == 0, (0, 0)
    if scaling != "tensor":
        aligned = aligned and shape[1] % CHUNK == 0 and codes.numel() < CHUNK * _MOST_CHUNKS
        steps = divmod(LANES, shape[1] // CHUNK) if aligned and shape[1] else (0, 0)
    keep = (codes, scale.contiguous(), None, None, multiplier)
    options = (SCALINGS[scaling], scale.dtype == torch.bfloat16, aligned, *steps)
    return Described("fp8", shape, _tiles(shape), keep, options)


DESCRIBE: dict[str, Callable[..., Described]] = {
    "dequantize_nf4": describe_nf4,
    "dequantize_nvfp4": describe_nvfp4,
    "dequantize_nvfp4_multiplied": partial(describe_nvfp4, multiplies=True),
    "dequantize_fp8": describe_fp8,
}
"""Op name to what describes its arguments, all but the result's dtype."""
