"""How each format is quantized on the device; a new format is one function, one row in `QUANTIZERS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surogate_formats.fp8 import FP8, TILE
from surogate_formats.nf4 import BLOCKS_PER_GROUP, NF4
from surogate_formats.nvfp4 import BLOCK, NVFP4
from surogate_formats.search import FP8_MULTIPLIERS
from surogate_quantize.cuda import source as layouts
from surogate_quantize.cuda.job import Job
from surogate_quantize.cuda.source import FP8_VALUES, METRICS, THREADS

Known = Mapping[str, NDArray[Any]]
"""Parts that the host knows, by name."""


def _nf4(job: Job, fmt: NF4, amax: np.float32, search: bool) -> Known:
    count, _, groups = fmt.counts(job.source.raw.shape)
    doubled = fmt.double_quant == "affine"
    address = job.address
    packed = layouts.NF4.pack(
        count,
        fmt.block_size,
        doubled,
        address["codes"],
        address["absmax"],
        *(address[part] if doubled else 0 for part in ("absmax_scale", "absmax_offset")),
    )
    job.quantize("nf4_search" if search else "nf4", groups, fmt.block_size * BLOCKS_PER_GROUP, packed)
    return {}


def _nvfp4(job: Job, fmt: NVFP4, amax: np.float32, search: bool) -> Known:
    rows, columns = job.source.raw.shape
    g = fmt.divisor(amax)
    across, height = columns // BLOCK, BLOCK if fmt.two_d else 1
    choice = (METRICS[fmt.metric], fmt.four_over_six, float(g))
    packed = layouts.NVFP4.pack(rows, across, *choice, job.address["codes"], job.address["scale"])
    threads = -(-rows // height) * height * across
    kernel = ("nvfp4_2d" if fmt.two_d else "nvfp4_1d") + ("_search" if search else "")
    job.quantize(kernel, -(-threads // THREADS), THREADS * BLOCK, packed)
    return {"global_scale": fmt.stored_global_scale(g)}


def _fp8(job: Job, fmt: FP8, amax: np.float32, search: bool) -> Known:
    tensor, block = fmt.scaling == "tensor", fmt.scaling == "block"
    rows, columns = (1, job.source.raw.size) if tensor else job.source.raw.shape
    segment = FP8_VALUES * 32 // THREADS
    segments = -(-columns // segment)
    blocks = -(-rows * segments // (THREADS // 32))
    across = -(-columns // TILE) if block else 1
    head = (columns, segments, rows * segments, TILE if block else 1, across, block, 0)
    tile_amax = np.array([amax], np.float32) if tensor else _tile_amax(job, fmt, head, blocks)
    scale = _searched(job, fmt, tile_amax) if search and not tensor else fmt.scales(tile_amax)
    scales = job.device.upload(scale)
    job.quantize("fp8", blocks, FP8_VALUES, layouts.FP8.pack(*head, 0, scales.ptr, job.address["codes"]))
    return {"scale": scale}


def _tile_amax(job: Job, fmt: FP8, head: tuple[int, ...], blocks: int) -> NDArray[np.float32]:
    """The largest magnitudes of channels or tiles; the format makes scales of them, on the host."""
    shape = fmt.scale_shape(job.source.raw.shape)
    size = int(np.prod(shape)) * np.dtype(np.uint32).itemsize
    bits = job.device.zeros(size)
    job.launch("fp8_amax", blocks, layouts.FP8.pack(*head, bits.ptr, 0, 0))
    found = job.device.download(bits, size).view(np.uint32).astype(job.source.raw.dtype)
    return job.source.magnitudes(found).reshape(shape)


def _searched(job: Job, fmt: FP8, amax: NDArray[np.float32]) -> NDArray[np.float32]:
    """The scales of channels or tiles with the least error among those that the format makes of the multipliers."""
    tried = np.ascontiguousarray(fmt.scales(amax, FP8_MULTIPLIERS[:, None, None]))
    candidates, found = job.device.upload(tried), job.device.zeros(amax.nbytes)
    block = fmt.scaling == "block"
    across = amax.shape[1] if block else 1
    packed = layouts.FP8_SEARCH.pack(*job.source.raw.shape, across, amax.size, candidates.ptr, found.ptr)
    blocks = -(-amax.size // (THREADS // 32)) if block else amax.size
    job.launch("fp8_search_tiles" if block else "fp8_search_channels", blocks, packed)
    return job.device.download(found, amax.nbytes).view(np.float32).reshape(amax.shape)


@dataclass(frozen=True)
class Quantizer:
    """How a format is quantized on the device.

    Attributes:
        module: the module of its kernels.
        takes: the values of the format's parameters that the kernels know; all others go to the CPU.
        run: launches the kernels for a weight, with the largest magnitude of its fused group, and whether to search.
    """

    module: str
    takes: Mapping[str, tuple[Any, ...]]
    run: Callable[[Job, Any, np.float32, bool], Known]

    def knows(self, fmt: Any) -> bool:
        """Whether the kernels know every parameter of the format."""
        return all(value in self.takes.get(parameter, ()) for parameter, value in vars(fmt).items())


_EITHER = (False, True)

QUANTIZERS = {
    "nf4": Quantizer("nf4", {"block_size": (64, 128), "double_quant": ("none", "affine")}, _nf4),
    "fp4": Quantizer(
        "nvfp4",
        {
            "two_d": _EITHER,
            "four_over_six": _EITHER,
            "metric": tuple(METRICS),
            "global_scale": ("pow2", "amax"),
            "step": ("divide", "multiply"),
        },
        _nvfp4,
    ),
    "fp8": Quantizer("fp8", {"scaling": ("tensor", "channel", "block"), "scale_dtype": ("float32", "bfloat16")}, _fp8),
}
"""By format name."""
