"""`quantize_fp8` and `transpose_bytes` on CUDA; plain torch where a device can't run the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from surogate_load.kernels.device import functions_on
from surogate_load.kernels.launch import launch
from surogate_load.kernels.source import (
    CHUNK,
    FP8_BLOCKS,
    FP8_THREADS,
    QUANTIZE_FP8,
    TRANSPOSE,
    TRANSPOSE_SIDE,
    TRANSPOSE_THREADS,
)
from surogate_load.ops import quantize_fp8 as _plain  # noqa: F401  (defines the op)
from surogate_load.ops import transpose as _transpose  # noqa: F401
from surogate_load.ops.library import PLAIN, accelerate
from surogate_load.ops.quantize_fp8 import LARGEST_SCALE, SMALLEST_SCALE
from surogate_load.ops.rounding import FP8_MAX

_SOURCES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_RESULTS = {torch.float8_e4m3fn: "to_e4m3", torch.float8_e5m2: "to_e5m2"}
_MOST_BLOCKS = 1056
"""Eight for each multiprocessor of the largest GPUs of today; a block takes many values, and one atomic operation."""

_PER_BLOCK = FP8_THREADS * CHUNK


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
    device = x.get_device()
    functions = functions_on(device)
    if functions is None or x.dtype not in _SOURCES or not x.numel():
        plain = PLAIN["quantize_fp8"]
        made: tuple[Tensor, Tensor] = plain(x, column_scale, scale, current, record, margin, dtype, copies)
        return made
    x = x.contiguous()
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    results = torch.empty(copies + FP8_BLOCKS, dtype=torch.float32, device=x.device)
    columns = x.shape[-1]
    wanted = (x, codes, column_scale, scale, current)
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in wanted]
    aligned = x.data_ptr() % (CHUNK * x.element_size()) == 0 and (column_scale is None or columns % CHUNK == 0)
    decode, partial = results.data_ptr(), results.data_ptr() + copies * results.element_size()
    reach = FP8_MAX[dtype] * 2.0**-margin
    packed = QUANTIZE_FP8.pack(
        *addresses, decode, partial, x.numel(), columns, copies, reach, SMALLEST_SCALE, LARGEST_SCALE, record, aligned
    )
    source = _SOURCES[x.dtype]
    launch(functions[f"fp8_amax_{source}"], device, FP8_BLOCKS, FP8_THREADS, packed)
    blocks = min(_MOST_BLOCKS, -(-x.numel() // _PER_BLOCK))
    launch(functions[f"{_RESULTS[dtype]}_{source}"], device, blocks, FP8_THREADS, packed)
    return codes, results[:copies]


def _transpose_bytes(x: Tensor) -> Tensor:
    device = x.get_device()
    functions = functions_on(device)
    rows, columns = x.shape
    if functions is None or rows % 4 or columns % 4 or not x.is_contiguous() or not x.numel():
        made: Tensor = PLAIN["transpose_bytes"](x)
        return made
    out = torch.empty((columns, rows), dtype=x.dtype, device=x.device)
    tiles = -(-rows // TRANSPOSE_SIDE) * -(-columns // TRANSPOSE_SIDE)
    packed = TRANSPOSE.pack(x.data_ptr(), out.data_ptr(), rows, columns)
    launch(functions["transpose_bytes"], device, tiles, TRANSPOSE_THREADS, packed)
    return out


accelerate("quantize_fp8", _quantize)
accelerate("transpose_bytes", _transpose_bytes)
accelerate("transpose_bytes_for_backward", lambda gradient, x: _transpose_bytes(x))
