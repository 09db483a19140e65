"""The CUDA sources as NVRTC takes them: generated constants, then the parts of a module one after the other."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from pathlib import Path

from surogate_formats.dynamic_absmax import DYNAMIC_MAP
from surogate_formats.fp8 import TILE
from surogate_formats.nf4 import BLOCKS_PER_GROUP
from surogate_formats.nvfp4 import BLOCK, LARGEST_GLOBAL_SCALE
from surogate_formats.tables import E2M1_MAX, E2M1_VALUES, E4M3_MAX, E5M2_MAX, NF4_CODEBOOK

OPTIONS = ("-fmad=false",)
"""Compiler options: no product is fused with a sum; the numpy definition rounds each on its own."""

MODULES = {
    **{name: ("conversions", "dequantize", name) for name in ("nf4", "nvfp4", "fp8")},
    "cross_entropy": ("conversions", "cross_entropy"),
    "quantize_fp8": ("conversions", "quantize_fp8"),
    "transpose": ("conversions", "transpose"),
    "quantize_nvfp4": ("conversions", "e2m1", "philox", "nvfp4_block", "quantize_nvfp4"),
    "hadamard": ("conversions", "hadamard"),
}
"""Module name to the `.cu` files that make it up, in order."""

LANES = 32
"""Threads of a warp."""

CHUNK = 8
"""Values that a lane stores at a time."""

CHUNKS = 4
"""Chunks that a lane loads before it uses the first."""

WARPS = 16
"""Warps of a thread block."""

TILE_VALUES = LANES * CHUNK * CHUNKS * WARPS
"""Values that a thread block dequantizes."""

_KERNELS = re.compile(r"^KERNELS\((\w+),", re.MULTILINE)
_NAMED = re.compile(r"^(?:CROSS_ENTROPY|HADAMARD)\((\w+),", re.MULTILINE)
_FP8_KERNELS = re.compile(r"^FP8_KERNELS\((\w+),", re.MULTILINE)
_FP4_KERNELS = re.compile(r"^FP4_KERNELS\((\w+),", re.MULTILINE)
_SINGLE = re.compile(r"^extern \"C\" __global__ void .* (\w+)\(const __grid", re.MULTILINE)

FP8_KERNELS = ("fp8_amax", "to_e4m3", "to_e5m2")
"""The kernels of quantize_fp8.cu, which exist for every dtype of their source."""

FP4_KERNELS = ("fp4_amax", "fp4_nearest", "fp4_four_over_six", "fp4_tiles", "fp4_stochastic")
"""The kernels of quantize_nvfp4.cu, which exist for every dtype of their source."""

RESULTS = ("float32", "bfloat16", "float16", "float8_e4m3fn")
"""The dtypes that each kernel exists for, as its name ends."""

SCALINGS = {"tensor": 0, "channel": 1, "block": 2}
"""FP8's scaling as kernels get it."""


WEIGHT = struct.Struct("=5Q3q6I")
"""`Weight` of dequantize.cu."""

LAUNCH = struct.Struct("=3Qq")
"""`Launch` of dequantize.cu, before the `Weight` at its end."""

CROSS_ENTROPY = struct.Struct("=4Qq2f2I")
"""`CrossEntropy` of cross_entropy.cu."""

QUANTIZE_FP8 = struct.Struct("=7Q3q3f2I4x")
"""`QuantizeFp8` of quantize_fp8.cu."""

FP8_THREADS = 256
"""Threads of a block there."""

FP8_BLOCKS = 264
"""Blocks that look for an amax: two for each multiprocessor of the largest GPUs of today."""

TRANSPOSE = struct.Struct("=2Q2q")
"""`Transpose` of transpose.cu."""

TRANSPOSE_SIDE = 128
"""Rows and columns of bytes that a thread block transposes."""

TRANSPOSE_THREADS = 256
"""Threads of a block there."""

CROSS_ENTROPY_THREADS = 1024
"""Threads of a block there: a multiprocessor holds one such block of the compiler's size, or two."""

METRICS = {"mse": 0, "l1": 1, "absmax": 2}
"""Four-Over-Six's metric as kernels get it."""

QUANTIZE_NVFP4 = struct.Struct("=8Q2qf3I")
"""`QuantizeNvfp4` of quantize_nvfp4.cu."""

FP4_THREADS = 256
"""Threads of a block there."""

FP4_BLOCKS = 264
"""Blocks that look for an amax there, as `FP8_BLOCKS`."""

HADAMARD = struct.Struct("=2Qq")
"""`Hadamard` of hadamard.cu."""

HADAMARD_THREADS = 256
"""Threads of a block there."""


def _float(value: float) -> str:
    return f"{value.hex()}f"


def _floats(values: Iterable[float]) -> str:
    return "{" + ", ".join(_float(float(value)) for value in values) + "}"


def _noise_and_rotation() -> dict[str, str]:
    # Here, since importing an op imports its binding, which imports this module.
    from surogate_load.ops.hadamard import SIGNS
    from surogate_load.ops.philox import KEY_INCREMENTS, MULTIPLIERS, ROUNDS

    return {
        "PHILOX_ROUNDS": str(ROUNDS),
        **{f"PHILOX_MULTIPLIER_{i}": f"{value}u" for i, value in enumerate(MULTIPLIERS)},
        **{f"PHILOX_INCREMENT_{i}": f"{value}u" for i, value in enumerate(KEY_INCREMENTS)},
        "HADAMARD_NEGATIVE": f"{sum(1 << i for i, sign in enumerate(SIGNS) if sign < 0)}u",
    }


def _constants() -> dict[str, str]:
    return {
        **_noise_and_rotation(),
        "LANES": str(LANES),
        "CHUNK": str(CHUNK),
        "CHUNKS": str(CHUNKS),
        "WARPS": str(WARPS),
        "NF4_CODEBOOK": _floats(NF4_CODEBOOK),
        "DYNAMIC_MAP": _floats(DYNAMIC_MAP),
        "BLOCKS_PER_GROUP": str(BLOCKS_PER_GROUP),
        "E2M1_VALUES": _floats(E2M1_VALUES),
        "E4M3_MAX": _float(float(E4M3_MAX)),
        "E2M1_MAX": _float(float(E2M1_MAX)),
        "LARGEST_GLOBAL_SCALE": _float(float(LARGEST_GLOBAL_SCALE)),
        "WEIGHT_BYTES": str(WEIGHT.size),
        "LAUNCH_BYTES": str(LAUNCH.size + WEIGHT.size),
        "TILE_SIDE": str(TILE),
        "E5M2_MAX": _float(float(E5M2_MAX)),
        "QUANTIZE_FP8_BYTES": str(QUANTIZE_FP8.size),
        "FP8_THREADS": str(FP8_THREADS),
        "FP8_BLOCKS": str(FP8_BLOCKS),
        "TRANSPOSE_BYTES": str(TRANSPOSE.size),
        "TRANSPOSE_SIDE": str(TRANSPOSE_SIDE),
        "TRANSPOSE_THREADS": str(TRANSPOSE_THREADS),
        "CROSS_ENTROPY_BYTES": str(CROSS_ENTROPY.size),
        "CROSS_ENTROPY_THREADS": str(CROSS_ENTROPY_THREADS),
        "QUANTIZE_NVFP4_BYTES": str(QUANTIZE_NVFP4.size),
        "FP4_BLOCK": str(BLOCK),
        "FP4_THREADS": str(FP4_THREADS),
        "FP4_BLOCKS": str(FP4_BLOCKS),
        "HADAMARD_BYTES": str(HADAMARD.size),
        "HADAMARD_THREADS": str(HADAMARD_THREADS),
        **{f"METRIC_{name.upper()}": str(value) for name, value in METRICS.items()},
        **{f"SCALE_PER_{name.upper().replace('BLOCK', 'TILE')}": str(value) for name, value in SCALINGS.items()},
    }


def source(module: str) -> str:
    """The whole text of a module: nothing is included, no header is needed."""
    folder = Path(__file__).parent
    defines = [f"#define {name} {value}" for name, value in _constants().items()]
    parts = [(folder / f"{part}.cu").read_text(encoding="utf-8") for part in MODULES[module]]
    return "\n".join([*defines, *parts])


def kernel_names(module: str) -> list[str]:
    """Every kernel of a module."""
    text = (Path(__file__).parent / f"{module}.cu").read_text(encoding="utf-8")
    made = [f"{kernel}_{result}" for kernel in _KERNELS.findall(text) for result in RESULTS]
    made += [f"{kernel}_{source}" for source in _FP8_KERNELS.findall(text) for kernel in FP8_KERNELS]
    made += [f"{kernel}_{source}" for source in _FP4_KERNELS.findall(text) for kernel in FP4_KERNELS]
    return made + _NAMED.findall(text) + _SINGLE.findall(text)
