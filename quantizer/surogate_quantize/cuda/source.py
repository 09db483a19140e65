"""The CUDA sources as NVRTC takes them: generated constants, then the parts of a module one after the other."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from pathlib import Path

from surogate_formats.fp8 import TILE
from surogate_formats.nf4 import ABSMAX_FLOOR, BLOCKS_PER_GROUP
from surogate_formats.search import (
    CHANNEL_LANES,
    E4M3_LEAST_NORMAL,
    FP8_MULTIPLIERS,
    NF4_BIN_ERRORS,
    NF4_COARSE,
    NF4_MULTIPLIERS,
    NVFP4_CLIPPING,
    NVFP4_NORMAL,
    NVFP4_OFFSETS,
)
from surogate_formats.tables import E2M1_MAX, E4M3_MAX, E4M3_MIN, F32_MIN_NORMAL, NF4_CODEBOOK, NF4_MIDPOINTS

OPTIONS = ("-fmad=false",)
"""Compiler options: no product is fused with a sum; the numpy definition rounds each on its own."""

MODULES = {name: ("ptx", "common", name) for name in ("amax", "nf4", "nvfp4", "fp8")}
"""Module name to the `.cu` files that make it up, in order."""

SOURCES = ("F32", "BF16", "F16")
"""The dtypes that every kernel exists for, as its name ends."""

THREADS = 256
"""Threads of a block, in every kernel."""

CHUNK = 8
"""Values that a thread reads at a time, where it is not a row of a format's block."""

FP8_VALUES = 512 * THREADS // 32
"""Values that a thread block of fp8.cu takes at most."""

METRICS = {"mse": 0, "l1": 1, "absmax": 2}
"""How nvfp4.cu takes the metric of Four-Over-Six."""

TOTALS = struct.Struct("=2Q2I")
"""`Totals` of common.cu."""

LEDGER = struct.Struct("=QIf")
"""`Ledger` of common.cu."""

AMAX = struct.Struct("=QqQ")
"""`Amax` of amax.cu."""

NF4 = struct.Struct("=q2I4Q")
"""`Nf4` of nf4.cu."""

NVFP4 = struct.Struct("=q3If2Q")
"""`Nvfp4` of nvfp4.cu."""

FP8 = struct.Struct("=q6I3Q")
"""`Fp8` of fp8.cu."""

FP8_SEARCH = struct.Struct("=2q2I2Q")
"""`Fp8Search` of fp8.cu."""

_STRUCTURES = {
    "TOTALS": TOTALS,
    "LEDGER": LEDGER,
    "AMAX": AMAX,
    "NF4": NF4,
    "NVFP4": NVFP4,
    "FP8": FP8,
    "FP8_SEARCH": FP8_SEARCH,
}

_KERNELS = re.compile(r"^ +(\w+)_##Source\(", re.MULTILINE)


def _float(value: float) -> str:
    return f"{float(value).hex()}f"


def _floats(values: Iterable[float]) -> str:
    return "{" + ", ".join(_float(value) for value in values) + "}"


def _bin_errors() -> str:
    """Rows of a bin, fours of multipliers."""
    fours = [[f"{{{', '.join(map(str, four))}}}" for four in row.reshape(-1, 4)] for row in NF4_BIN_ERRORS]
    return "{" + ", ".join(f"{{{', '.join(row)}}}" for row in fours) + "}"


def _constants() -> dict[str, str]:
    return {
        "THREADS": str(THREADS),
        "CHUNK": str(CHUNK),
        "FP8_VALUES": str(FP8_VALUES),
        "NF4_CODEBOOK": _floats(NF4_CODEBOOK),
        "NF4_MIDPOINTS": _floats(NF4_MIDPOINTS),
        "ABSMAX_FLOOR": _float(float(ABSMAX_FLOOR)),
        "BLOCKS_PER_GROUP": str(BLOCKS_PER_GROUP),
        "E2M1_MAX": _float(float(E2M1_MAX)),
        "E4M3_MAX": _float(float(E4M3_MAX)),
        "E4M3_MIN": _float(float(E4M3_MIN)),
        "TILE_SIDE": str(TILE),
        "NF4_MULTIPLIERS": _floats(NF4_MULTIPLIERS),
        "NF4_COARSE": _float(float(NF4_COARSE)),
        "NF4_BIN_ERRORS": _bin_errors(),
        "NVFP4_OFFSETS": "{" + ", ".join(map(str, NVFP4_OFFSETS)) + "}",
        "NVFP4_NORMAL": str(NVFP4_NORMAL),
        "NVFP4_CLIPPING": str(NVFP4_CLIPPING),
        "E4M3_LEAST_NORMAL": f"{E4M3_LEAST_NORMAL}u",
        "FP8_MULTIPLIERS": str(FP8_MULTIPLIERS.size),
        "CHANNEL_LANES": str(CHANNEL_LANES),
        "LEAST_NORMAL": _float(float(F32_MIN_NORMAL)),
        **{f"METRIC_{name.upper()}": str(value) for name, value in METRICS.items()},
        **{f"{name}_BYTES": str(layout.size) for name, layout in _STRUCTURES.items()},
    }


def source(module: str) -> str:
    """The whole text of a module: nothing is included, no header is needed."""
    defines = [f"#define {name} {value}" for name, value in _constants().items()]
    return "\n".join([*defines, *(_text(part) for part in MODULES[module])])


def kernel_names(module: str) -> list[str]:
    """Every kernel of a module."""
    return [f"{kernel}_{dtype}" for kernel in _KERNELS.findall(_text(module)) for dtype in SOURCES]


def _text(part: str) -> str:
    return (Path(__file__).parent / f"{part}.cu").read_text(encoding="utf-8")
