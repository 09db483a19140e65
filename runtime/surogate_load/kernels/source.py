"""The CUDA sources as NVRTC takes them: generated constants, then the parts of a module one after the other."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from pathlib import Path

from surogate_formats.fp8 import TILE
from surogate_formats.nf4 import BLOCKS_PER_GROUP
from surogate_formats.tables import E2M1_VALUES, E4M3_MAX, NF4_CODEBOOK

OPTIONS = ("-fmad=false",)
"""Compiler options: no product is fused with a sum; the numpy definition rounds each on its own."""

MODULES = {
    **{name: ("conversions", "dequantize", name) for name in ("nf4", "nvfp4", "fp8")},
    "cross_entropy": ("conversions", "cross_entropy"),
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
_CROSS_ENTROPIES = re.compile(r"^CROSS_ENTROPY\((\w+),", re.MULTILINE)

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

CROSS_ENTROPY_THREADS = 1024
"""Threads of a block there: a multiprocessor holds one such block of the compiler's size, or two."""


def _float(value: float) -> str:
    return f"{value.hex()}f"


def _floats(values: Iterable[float]) -> str:
    return "{" + ", ".join(_float(float(value)) for value in values) + "}"


def _constants() -> dict[str, str]:
    return {
        "LANES": str(LANES),
        "CHUNK": str(CHUNK),
        "CHUNKS": str(CHUNKS),
        "WARPS": str(WARPS),
        "NF4_CODEBOOK": _floats(NF4_CODEBOOK),
        "BLOCKS_PER_GROUP": str(BLOCKS_PER_GROUP),
        "E2M1_VALUES": _floats(E2M1_VALUES),
        "E4M3_MAX": _float(float(E4M3_MAX)),
        "WEIGHT_BYTES": str(WEIGHT.size),
        "LAUNCH_BYTES": str(LAUNCH.size + WEIGHT.size),
        "TILE_SIDE": str(TILE),
        "CROSS_ENTROPY_BYTES": str(CROSS_ENTROPY.size),
        "CROSS_ENTROPY_THREADS": str(CROSS_ENTROPY_THREADS),
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
    return made + _CROSS_ENTROPIES.findall(text)
