"""FP8: E4M3 codes with one scale a tensor, a row, or a 128x128 tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from surogate_formats.dtypes import NUMPY
from surogate_formats.format import Parts, Shape, TensorSpec, check_choice, largest_magnitude
from surogate_formats.rounding import bfloat16_up, to_e4m3
from surogate_formats.search import FP8_MULTIPLIERS, reciprocal, tile_errors
from surogate_formats.tables import E4M3_MAX, F32_MIN_NORMAL

F32 = NDArray[np.float32]

TILE = 128
"""Side of a tile of block scaling (DeepSeek-V3, arXiv:2412.19437, 3.3.2)."""


_ONE = np.float32(1)


@dataclass(frozen=True)
class FP8:
    """FP8 E4M3 with multiplying scales: W = codes * scale.

    Parts of a weight [N, K]:
        codes: F8_E4M3 [N, K].
        scale: [1] (`tensor`), [N, 1] (`channel`) or [ceil(N/128), ceil(K/128)] (`block`), in `scale_dtype`.

    Attributes:
        scaling: what shares a scale: the `tensor`, a `channel` (row, output feature), or a 128x128 `block`.
        scale_dtype: `float32`, or `bfloat16` where readers hold scales in the model's dtype: it is then rounded up
            before the codes are chosen, so that all readers agree.
    """

    name: ClassVar[str] = "fp8"

    scaling: Literal["tensor", "channel", "block"] = "tensor"
    scale_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        """Refuses parameter values that the format doesn't have."""
        check_choice(self.name, "scaling", self.scaling, ("tensor", "channel", "block"))
        check_choice(self.name, "scale_dtype", self.scale_dtype, ("float32", "bfloat16"))

    @property
    def shares_amax(self) -> bool:
        """With one scale a tensor, fused loaders keep one scale for the whole fused group."""
        return self.scaling == "tensor"

    def keep_reason(self, shape: Shape) -> str | None:
        """FP8 takes every shape: tiles at the edges are clipped."""
        return None

    def scale_shape(self, shape: Shape) -> Shape:
        """Shape of the scales of a weight [N, K]."""
        rows, columns = shape
        return {"tensor": (1,), "channel": (rows, 1), "block": (-(-rows // TILE), -(-columns // TILE))}[self.scaling]

    def part_specs(self, shape: Shape) -> dict[str, TensorSpec]:
        """Dtype and shape of the parts."""
        scale = {"float32": "F32", "bfloat16": "BF16"}[self.scale_dtype]
        return {"codes": TensorSpec("F8_E4M3", shape), "scale": TensorSpec(scale, self.scale_shape(shape))}

    def band_rows(self, shape: Shape) -> int:
        """Rows of a tile, or one."""
        return TILE if self.scaling == "block" else 1

    def quantize(self, weight: F32, amax: np.float32 | None = None, *, search: bool = False) -> Parts:
        """Quantizes float32 [N, K]: E4M3(clamp(fl(x / scale), ±448)).

        With one scale a tensor `search` changes nothing: no other scale is better by more than chance.
        """
        largest = largest_magnitude(weight)
        if self.scaling == "tensor":
            scale = self.scales(np.array([largest if amax is None else amax], dtype=np.float32))
        else:
            tile_amax = self._amax(weight)
            scale = self._searched(weight, tile_amax) if search else self.scales(tile_amax)
        codes = to_e4m3(weight / self._spread(scale, weight.shape))
        return {"codes": codes, "scale": scale.astype(NUMPY[self.part_specs(weight.shape)["scale"].dtype])}

    def dequantize(self, parts: Parts, shape: Shape) -> F32:
        """float32 [N, K]: fl(code * scale)."""
        scale = self._spread(parts["scale"].astype(np.float32), shape)
        values: F32 = parts["codes"].astype(np.float32) * scale
        return values

    def scales(self, amax: F32, multiplier: np.float32 | F32 = _ONE) -> F32:
        """float32 scales, of the shape of `amax`: fl(amax / 448), at least the smallest normal, 1 where amax is 0.

        `multiplier` is what amax / 448 is multiplied by before the bounds are kept.
        """
        scale = np.where(amax > 0, np.maximum(amax / E4M3_MAX * multiplier, F32_MIN_NORMAL), np.float32(1))
        return bfloat16_up(scale) if self.scale_dtype == "bfloat16" else scale

    def _searched(self, weight: F32, amax: F32) -> F32:
        """The scale of each channel or tile, of the shape of `amax`, that leaves the least squared error."""
        scale, error = self.scales(amax), np.full(amax.shape, np.inf, np.float32)
        for multiplier in FP8_MULTIPLIERS:
            tried = self.scales(amax, multiplier)
            missed = self._errors(weight, tried)
            scale, error = np.where(missed < error, tried, scale), np.where(missed < error, missed, error)
        return scale

    def _errors(self, weight: F32, scale: F32) -> F32:
        spread, inverse = (self._spread(each, weight.shape) for each in (scale, reciprocal(scale)))
        with np.errstate(over="ignore"):
            values = to_e4m3(weight * inverse).astype(np.float32) * spread
        return tile_errors(values, weight, *((TILE, TILE) if self.scaling == "block" else (1, weight.shape[1])))

    def _amax(self, weight: F32) -> F32:
        magnitude: F32 = np.abs(weight)
        if self.scaling == "channel":
            rows_amax: F32 = magnitude.max(axis=1, keepdims=True, initial=0)
            return rows_amax
        rows, columns = self.scale_shape(weight.shape)
        padded: F32 = np.zeros((rows * TILE, columns * TILE), dtype=np.float32)
        padded[: weight.shape[0], : weight.shape[1]] = magnitude
        tiles_amax: F32 = padded.reshape(rows, TILE, columns, TILE).max(axis=(1, 3))
        return tiles_amax

    def _spread(self, scale: F32, shape: Shape) -> F32:
        if self.scaling != "block":
            return scale
        rows, columns = shape
        return np.repeat(np.repeat(scale, TILE, axis=0)[:rows], TILE, axis=1)[:, :columns]
