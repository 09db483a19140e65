"""The grid of each format; a new format is one class and one row in `GRIDS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from surogate_formats.dynamic_absmax import DYNAMIC_MAP, NESTED_FLOOR
from surogate_formats.format import Format, Parts
from surogate_formats.fp8 import FP8, TILE
from surogate_formats.nf4 import BLOCKS_PER_GROUP, NF4, block_absmax
from surogate_formats.nvfp4 import BLOCK, NVFP4
from surogate_formats.rounding import pack_nibbles
from surogate_formats.tables import (
    E2M1_VALUES,
    E4M3_MAX,
    E4M3_MIN,
    F32_MIN_NORMAL,
    NF4_CODEBOOK,
    NF4_MIDPOINTS,
    NF4_ZERO_CODE,
)
from surogate_quantize.calibration.grid import Blocks, Grid

_E2M1 = np.unique(E2M1_VALUES)
"""The 15 values, ascending."""

_E2M1_MIDPOINTS = (_E2M1[:-1] + _E2M1[1:]) / np.float32(2)


class NF4Grid:
    """See `Grid`. The double quantization's own scale and offset stay those of rounding to nearest."""

    asymmetric = True
    multipliers = tuple(np.linspace(0.62, 1.06, 23).tolist())

    def __init__(self, fmt: NF4, parts: Parts, weight: Tensor, amax: np.float32) -> None:
        """Takes the double quantization from the parts of rounding to nearest."""
        rows, columns = weight.shape
        flat = columns % fmt.block_size != 0
        self.blocks = Blocks((rows, columns), 0 if flat else 1, fmt.block_size)
        self._fmt, self._parts = fmt, parts
        self._codebook, self._midpoints = _on(weight, NF4_CODEBOOK), _on(weight, NF4_MIDPOINTS)
        self._map = _on(weight, DYNAMIC_MAP)
        self.scales = _on(weight, block_absmax(parts)).reshape(self.blocks.count)
        group = torch.arange(self.scales.numel(), device=weight.device) // BLOCKS_PER_GROUP
        if fmt.double_quant == "affine":
            step, offset = (_on(weight, parts[key])[group] for key in ("absmax_scale", "absmax_offset"))
            self._step, self._offset = step.reshape(self.blocks.count), offset.reshape(self.blocks.count)
        elif fmt.double_quant == "dynamic":
            self._step = _on(weight, parts["nested_absmax"])[group].reshape(self.blocks.count)
            self._offset = _on(weight, parts["nested_offset"]).expand(self.blocks.count)

    def nearest(self, x: Tensor) -> Tensor:
        """See `Grid`."""
        return self._codebook[torch.bucketize(x, self._midpoints)]

    def legal(self, scales: Tensor, place: slice = slice(None)) -> Tensor:
        """See `Grid`; never negative."""
        if self._fmt.double_quant == "none":
            return scales.clamp(min=0)
        codes, step, offset = self._absmax_codes(scales, place), self._step[..., place], self._offset[..., place]
        factor = codes - 128 if self._fmt.double_quant == "affine" else self._map[codes]
        return (factor * step + offset).clamp(min=0)

    def parts(self, values: Tensor, scales: Tensor) -> Parts:
        """See `Grid`."""
        codes = torch.bucketize(values.reshape(-1), self._midpoints).to(torch.uint8).cpu().numpy()
        packed = pack_nibbles(codes, first_high=True, pad=NF4_ZERO_CODE)
        found = dict(self._parts)
        found["codes"] = packed.reshape(self._parts["codes"].shape)
        stored = scales if self._fmt.double_quant == "none" else self._absmax_codes(scales).to(torch.uint8)
        found["absmax"] = stored.reshape(-1).cpu().numpy()
        return found

    def _absmax_codes(self, absmax: Tensor, place: slice = slice(None)) -> Tensor:
        step, offset = self._step[..., place], self._offset[..., place]
        if self._fmt.double_quant == "affine":
            steps = ((absmax - offset) / torch.where(step == 0, 1, step)).round().clamp(-127, 127)
            return torch.where(step == 0, 0, steps).to(torch.int64) + 128
        x = (absmax - offset) / step.clamp(min=float(NESTED_FLOOR))
        return torch.bucketize(x, (self._map[:-1] + self._map[1:]) / 2)


class NVFP4Grid:
    """See `Grid`. The global scale stays that of rounding to nearest."""

    asymmetric = True
    multipliers = tuple((2.0 ** np.linspace(-0.52, 0.68, 20)).tolist())

    def __init__(self, fmt: NVFP4, parts: Parts, weight: Tensor, amax: np.float32) -> None:
        """Takes the global scale from the parts of rounding to nearest."""
        rows, columns = weight.shape
        self.blocks = Blocks((rows, columns), BLOCK if fmt.two_d else 1, BLOCK)
        self._fmt, self._parts = fmt, parts
        self._global = float(parts["global_scale"][0])
        self._codes, self._midpoints = _on(weight, _E2M1), _on(weight, _E2M1_MIDPOINTS)
        self.scales = self.legal(self.blocks.largest(weight) / 6)

    def nearest(self, x: Tensor) -> Tensor:
        """See `Grid`."""
        return self._codes[torch.bucketize(x, self._midpoints)]

    def legal(self, scales: Tensor, place: slice = slice(None)) -> Tensor:
        """See `Grid`; 0 stays 0."""
        return self._step(self._e4m3(scales).float())

    def parts(self, values: Tensor, scales: Tensor) -> Parts:
        """See `Grid`."""
        magnitude = torch.searchsorted(self._codes[7:].contiguous(), values.abs().contiguous())
        codes = (magnitude + 8 * (values < 0)).to(torch.uint8).cpu().numpy()
        height = self.blocks.height
        stored = self._e4m3(scales).view(torch.uint8).repeat_interleave(height, 0)[: self.blocks.shape[0]]
        return {
            "codes": pack_nibbles(codes, first_high=False),
            "scale": stored.cpu().numpy().view(ml_dtypes.float8_e4m3fn),
            "global_scale": self._parts["global_scale"],
        }

    def _e4m3(self, scales: Tensor) -> Tensor:
        wanted = scales * self._global if self._fmt.step == "divide" else scales / self._global
        clamped = wanted.clamp(float(E4M3_MIN), float(E4M3_MAX))
        return torch.where(scales <= 0, 0, clamped).to(torch.float8_e4m3fn)

    def _step(self, stored: Tensor) -> Tensor:
        return stored / self._global if self._fmt.step == "divide" else stored * self._global


class FP8Grid:
    """See `Grid`."""

    asymmetric = False
    multipliers = tuple((2.0 ** np.linspace(-0.25, 0.875, 10)).tolist())

    def __init__(self, fmt: FP8, parts: Parts, weight: Tensor, amax: np.float32) -> None:
        """Takes the scales from the parts of rounding to nearest."""
        rows, columns = weight.shape
        tile = {"tensor": (rows, columns), "channel": (1, columns), "block": (TILE, TILE)}[fmt.scaling]
        self.blocks = Blocks((rows, columns), *tile)
        self._fmt, self._parts = fmt, parts
        self.scales = _on(weight, parts["scale"].astype(np.float32)).reshape(self.blocks.count)
        if fmt.scaling == "tensor":  # the group's: its members are one matrix to some readers
            self.multipliers = (1.0,)

    def nearest(self, x: Tensor) -> Tensor:
        """See `Grid`."""
        return x.clamp(-float(E4M3_MAX), float(E4M3_MAX)).to(torch.float8_e4m3fn).float()

    def legal(self, scales: Tensor, place: slice = slice(None)) -> Tensor:
        """See `Grid`."""
        if self._fmt.scaling == "tensor":
            return self.scales
        positive = scales.clamp(min=float(F32_MIN_NORMAL))
        return positive.bfloat16().float() if self._fmt.scale_dtype == "bfloat16" else positive

    def parts(self, values: Tensor, scales: Tensor) -> Parts:
        """See `Grid`."""
        codes = values.to(torch.float8_e4m3fn).view(torch.uint8).cpu().numpy()
        stored = self._parts["scale"]
        return {
            "codes": codes.view(ml_dtypes.float8_e4m3fn),
            "scale": scales.cpu().numpy().reshape(stored.shape).astype(stored.dtype),
        }


GRIDS: dict[str, Callable[..., Grid]] = {"nf4": NF4Grid, "fp4": NVFP4Grid, "fp8": FP8Grid}
"""By format name: what makes the grid of a weight from its parts under rounding to nearest."""


def make_grid(fmt: Format, parts: Parts, weight: Tensor) -> Grid:
    """The grid of a weight, float32 [N, K] on any device, from its parts under rounding to nearest."""
    return GRIDS[fmt.name](fmt, parts, weight, np.float32(0))


def _on(weight: Tensor, array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(weight.device)
