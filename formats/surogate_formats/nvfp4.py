"""NVFP4: E2M1 codes, an E4M3 scale a block of 16, one float32 scale a tensor; optionally Four-Over-Six."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from surogate_formats.format import Parts, Shape, TensorSpec, check_choice, largest_magnitude
from surogate_formats.rounding import from_e2m1_codes, pack_nibbles, to_e2m1_codes, to_e4m3, unpack_nibbles
from surogate_formats.search import (
    E4M3_LEAST_NORMAL,
    NVFP4_CLIPPING,
    NVFP4_NORMAL,
    NVFP4_OFFSETS,
    pairwise_sum,
    reciprocal,
    squares,
)
from surogate_formats.tables import E2M1_MAX, E4M3_MAX, E4M3_MIN, LARGEST_BLOCK_SCALE

F32 = NDArray[np.float32]

BLOCK = 16
"""Values along K that share a scale; with 2-D scaling also rows."""

HOW_CHOSEN = ("two_d", "four_over_six", "metric", "global_scale")
"""Parameters that say how the parts were chosen; the parts mean the same without them, and don't show them."""

LARGEST_CODE = 126
"""The E4M3 code of 448."""

LARGEST_GLOBAL_SCALE = np.float32(2.0**123)


@dataclass(frozen=True)
class NVFP4:
    """NVFP4: W = e2m1 * step, the step of a block being its scale divided by the global scale g, or times 1/g.

    Parts of a weight [N, K], K a multiple of 16:
        codes: U8 [N, K/2], value 2i in the low nibble.
        scale: F8_E4M3 [N, K/16]; with 2-D scaling each tile's scale stands in all of its 16 rows.
        global_scale: F32 [1]: g, or with `step` multiply its reciprocal.

    Attributes:
        two_d: one scale a 16x16 tile (W and its transpose then share codes) instead of one a 1x16 block.
        four_over_six: each block takes the better of the scales that map its largest value to 6 or to 4
            (arXiv:2512.02010).
        metric: the error by which Four-Over-Six chooses, over the block in the original domain.
        global_scale: `pow2` rounds g down to a power of two, which makes every dequantized value exact in bfloat16;
            `amax` is the rule of the peers.
        step: `divide` scales by g, or `multiply` them with a stored 1/g (ModelOpt). Where g is a power of two, both
            give the same values.
    """

    name: ClassVar[str] = "fp4"
    shares_amax: ClassVar[bool] = True

    two_d: bool = True
    four_over_six: bool = True
    metric: Literal["mse", "l1", "absmax"] = "mse"
    global_scale: Literal["pow2", "amax"] = "pow2"
    step: Literal["divide", "multiply"] = "divide"

    def __post_init__(self) -> None:
        """Refuses parameter values that the format doesn't have."""
        check_choice(self.name, "metric", self.metric, ("mse", "l1", "absmax"))
        check_choice(self.name, "global_scale", self.global_scale, ("pow2", "amax"))
        check_choice(self.name, "step", self.step, ("divide", "multiply"))

    def keep_reason(self, shape: Shape) -> str | None:
        """Rows must divide into blocks of 16."""
        return f"K = {shape[-1]} is not a multiple of 16" if shape[-1] % BLOCK else None

    def part_specs(self, shape: Shape) -> dict[str, TensorSpec]:
        """Dtype and shape of the parts."""
        rows, columns = shape
        return {
            "codes": TensorSpec("U8", (rows, columns // 2)),
            "scale": TensorSpec("F8_E4M3", (rows, columns // BLOCK)),
            "global_scale": TensorSpec("F32", (1,)),
        }

    def band_rows(self, shape: Shape) -> int:
        """Rows of a tile, or one."""
        return BLOCK if self.two_d else 1

    def divisor(self, amax: np.float32) -> np.float32:
        """The global scale g: the reach of the codes (448 or 256, times 6) over the largest magnitude, capped."""
        if amax == 0:
            return np.float32(1)
        reach = LARGEST_BLOCK_SCALE[self.four_over_six] * E2M1_MAX
        with np.errstate(over="ignore"):
            g = min(np.float32(reach / amax), LARGEST_GLOBAL_SCALE)
        if self.global_scale == "amax":
            return g
        _, exponent = np.frexp(g)
        return np.float32(np.ldexp(1.0, int(exponent) - 1))

    def stored_global_scale(self, g: np.float32) -> F32:
        """The part `global_scale`, float32 [1], of a global scale g."""
        return np.array([g if self.step == "divide" else np.float32(1) / g], dtype=np.float32)

    def quantize(self, weight: F32, amax: np.float32 | None = None, *, search: bool = False) -> Parts:
        """Quantizes float32 [N, K]; `amax` is the fused group's largest magnitude, by default the weight's own.

        With `search` the choice of Four-Over-Six is one among more, always by the squared error.
        """
        largest = largest_magnitude(weight)
        g = self.divisor(largest if amax is None else amax)
        stored_g = self.stored_global_scale(g)
        tiles = self._tiles(weight)
        block_amax: F32 = np.abs(tiles).max(axis=(1, 3), initial=0)
        scale = self._scales(tiles, block_amax, g, search)
        codes, _ = _round_tiles(tiles, self._step(scale, stored_g))
        rows, columns = weight.shape
        stored = np.repeat(to_e4m3(scale), tiles.shape[1], axis=0)[:rows]
        return {
            "codes": pack_nibbles(codes.reshape(-1, columns)[:rows], first_high=False),
            "scale": stored,
            "global_scale": stored_g,
        }

    def dequantize(self, parts: Parts, shape: Shape) -> F32:
        """float32 [N, K]: fl(e2m1 * step), the step being fl(scale / g), or fl(scale * fl(1 / g))."""
        values = from_e2m1_codes(unpack_nibbles(parts["codes"], shape[-1], first_high=False))
        step = self._step(parts["scale"].astype(np.float32), parts["global_scale"])
        return (values.reshape(*step.shape, BLOCK) * step[..., None]).reshape(shape)

    def _scales(self, tiles: F32, block_amax: F32, g: np.float32, search: bool) -> F32:
        """The scale of each tile, float32 [row tiles, blocks]."""
        sixth = block_amax / E2M1_MAX * g
        scale = _block_scale(sixth, block_amax)
        if search:
            others = _around(scale, NVFP4_CLIPPING if self.two_d else 0)
        else:
            others = [_block_scale(np.float32(1.5) * sixth, block_amax)] if self.four_over_six else []
        error: F32 | None = None
        for other in others:
            error = self._error(tiles, scale, g, search) if error is None else error
            missed = self._error(tiles, other, g, search)
            scale, error = np.where(missed < error, other, scale), np.where(missed < error, missed, error)
        return scale

    def _error(self, tiles: F32, scale: F32, g: np.float32, search: bool) -> F32:
        step = self._step(scale, self.stored_global_scale(g))
        if not search:
            return block_error(_round_tiles(tiles, step)[1], tiles, self.metric)
        with np.errstate(over="ignore"):
            codes = to_e2m1_codes(tiles * np.where(step == 0, np.float32(0), reciprocal(step))[:, None, :, None])
        terms = squares(from_e2m1_codes(codes) * step[:, None, :, None], tiles).swapaxes(1, 2)
        return pairwise_sum(terms.reshape(*terms.shape[:2], tiles.shape[1] * BLOCK))

    def _step(self, scale: F32, stored_g: F32) -> F32:
        step: F32 = scale / stored_g if self.step == "divide" else scale * stored_g
        return step

    def _tiles(self, weight: F32) -> F32:
        height = BLOCK if self.two_d else 1
        rows, columns = weight.shape
        padded = np.pad(weight, ((0, -rows % height), (0, 0)))
        return padded.reshape(-1, height, columns // BLOCK, BLOCK)


def _block_scale(wanted: F32, block_amax: F32) -> F32:
    scale = to_e4m3(np.minimum(wanted, E4M3_MAX)).astype(np.float32)
    floored: F32 = np.where(block_amax > 0, np.maximum(scale, E4M3_MIN), np.float32(0))
    return floored


def _around(scale: F32, first: int) -> list[F32]:
    """The scales that are tried beside those of rounding to nearest, from an offset on."""
    codes = to_e4m3(scale).view(np.uint8).astype(np.int64)
    others = []
    for k, offset in list(enumerate(NVFP4_OFFSETS))[first:]:
        here = (codes > 0) & ((k < NVFP4_NORMAL) | (codes < E4M3_LEAST_NORMAL))
        tried = np.where(here, np.clip(codes + offset, 1, LARGEST_CODE), codes).astype(np.uint8)
        others.append(tried.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    return others


def _round_tiles(tiles: F32, block_step: F32) -> tuple[NDArray[np.uint8], F32]:
    step: F32 = block_step[:, None, :, None]
    divisor: F32 = np.where(step == 0, np.float32(1), step)
    codes = np.where(step == 0, np.uint8(0), to_e2m1_codes(tiles / divisor))
    return codes, from_e2m1_codes(codes) * step


def block_error(values: F32, tiles: F32, metric: str) -> F32:
    """The error of each tile, float32 [row tiles, blocks], of two float32 [row tiles, height, blocks, 16].

    Sums run in float32 in element order, row by row, so that every implementation chooses alike.
    """
    with np.errstate(over="ignore"):
        difference = np.abs(values - tiles)
        terms = difference * difference if metric == "mse" else difference
        total = np.zeros((tiles.shape[0], tiles.shape[2]), dtype=np.float32)
        for row in range(tiles.shape[1]):
            for column in range(BLOCK):
                term = terms[:, row, :, column]
                total = np.maximum(total, term) if metric == "absmax" else total + term
    return total
