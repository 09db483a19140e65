"""`quantize_nvfp4` and its stochastic form on CUDA; plain torch where a device can't run the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from surogate_formats.nvfp4 import BLOCK
from surogate_load.kernels.device import functions_on
from surogate_load.kernels.launch import launch
from surogate_load.kernels.source import FP4_BLOCKS, FP4_THREADS, METRICS, QUANTIZE_NVFP4
from surogate_load.ops.library import PLAIN, accelerate
from surogate_load.ops.quantize_nvfp4 import Parts, reach

_SOURCES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_ALIGNMENT = 16
"""Of the bytes that a thread loads at once."""

_MOST_BLOCKS = 1056
"""Eight for each multiprocessor of the largest GPUs of today; each finds the global scale anew."""

_GLOBAL_SCALE, _NOISE, _PARTIAL, _SCRATCH = 0, 8, 16, 4 + FP4_BLOCKS
"""Bytes before each result of the first kernel, and the float32 places of all."""


def _runs_kernels(x: Tensor) -> bool:
    return functions_on(x.get_device()) is not None and x.dtype in _SOURCES and x.numel() > 0


def _launch(kernel: str, x: Tensor, noise: tuple[Tensor, Tensor] | None, options: tuple[float, ...]) -> Parts:
    """Launches the amax, then `kernel` with a thread for each block, or for each tile.

    Args:
        kernel: its name without the dtype.
        x: [rows, columns] on the device.
        noise: seed and offset.
        options: the end of `QUANTIZE_NVFP4`, from `reach` on.
    """
    device = x.get_device()
    functions = functions_on(device)
    assert functions is not None
    x = x.contiguous()
    x = x.clone() if x.data_ptr() % _ALIGNMENT else x
    rows, columns = x.shape
    codes = torch.empty((rows, columns // 2), dtype=torch.uint8, device=x.device)
    scale = torch.empty((rows, columns // BLOCK), dtype=torch.float8_e4m3fn, device=x.device)
    scratch = torch.empty(_SCRATCH, dtype=torch.float32, device=x.device)
    first = scratch.data_ptr()
    seed, offset = (0, 0) if noise is None else (noise[0].data_ptr(), noise[1].data_ptr())
    results = (codes.data_ptr(), scale.data_ptr(), first + _GLOBAL_SCALE, first + _PARTIAL)
    packed = QUANTIZE_NVFP4.pack(x.data_ptr(), *results, seed, offset, first + _NOISE, rows, columns, *options)
    source = _SOURCES[x.dtype]
    launch(functions[f"fp4_amax_{source}"], device, FP4_BLOCKS, FP4_THREADS, packed)
    threads = (-(-rows // BLOCK) if kernel == "fp4_tiles" else rows) * (columns // BLOCK)
    launch(functions[f"{kernel}_{source}"], device, min(_MOST_BLOCKS, -(-threads // FP4_THREADS)), FP4_THREADS, packed)
    return codes, scale, scratch[:1]


def _quantize(x: Tensor, two_d: bool, four_over_six: bool, metric: str, power_of_two: bool) -> Parts:
    if not _runs_kernels(x) or metric not in METRICS:
        made: Parts = PLAIN["quantize_nvfp4"](x, two_d, four_over_six, metric, power_of_two)
        return made
    kernel = "fp4_tiles" if two_d else "fp4_four_over_six" if four_over_six else "fp4_nearest"
    return _launch(kernel, x, None, (reach(four_over_six), power_of_two, four_over_six, METRICS[metric]))


def _quantize_stochastic(x: Tensor, seed: Tensor, offset: Tensor) -> Parts:
    if not _runs_kernels(x):
        made: Parts = PLAIN["quantize_nvfp4_stochastic"](x, seed, offset)
        return made
    return _launch("fp4_stochastic", x, (seed, offset), (reach(False), False, False, METRICS["mse"]))


accelerate("quantize_nvfp4", _quantize)
accelerate("quantize_nvfp4_stochastic", _quantize_stochastic)
