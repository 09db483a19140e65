"""NF4: 4-bit codes into a fixed table of normal quantiles, one absmax a block, itself quantized on request."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from surogate_formats.double_quant import BLOCKS_PER_GROUP, block_absmax, grain, legal_absmax, quantize_absmax
from surogate_formats.dynamic_absmax import quantize_dynamic
from surogate_formats.format import Parts, Shape, TensorSpec, check_choice, largest_magnitude
from surogate_formats.rounding import pack_nibbles, unpack_nibbles
from surogate_formats.search import NF4_COARSE, NF4_MULTIPLIERS, best_nf4_multiplier, pairwise_sum, squares
from surogate_formats.tables import NF4_CODEBOOK, NF4_MIDPOINTS, NF4_ZERO_CODE

F32 = NDArray[np.float32]

__all__ = ["ABSMAX_FLOOR", "BLOCKS_PER_GROUP", "NF4", "block_absmax", "quantize_absmax"]

ABSMAX_FLOOR = np.float32(1e-38)
"""Below this the reciprocal of an absmax would overflow, and a zero times it would be NaN."""


@dataclass(frozen=True)
class NF4:
    """NF4 with blocks of consecutive values of the flattened weight.

    Parts of a weight with n = N*K values, nb = ceil(n / block_size) blocks and ng = ceil(nb / 256) groups:
        codes: U8 [N, K/2] (flat [ceil(n/2)] where K is odd), value 2i in the high nibble.
        absmax: F32 [nb], or U8 [nb]: with `affine` a signed step count + 128, with `dynamic` a code of `DYNAMIC_MAP`.
        absmax_scale, absmax_offset: F32 [ng], with `affine` only.
        nested_absmax: F32 [ng], nested_offset: F32 [1], with `dynamic` only.

    Attributes:
        block_size: 64 or 128 values a block.
        double_quant: `affine` stores absmax in 8 bits with a scale and an offset a group, `dynamic` as
            bitsandbytes does (`surogate_formats.dynamic_absmax`), `none` in float32.
    """

    name: ClassVar[str] = "nf4"
    shares_amax: ClassVar[bool] = False

    block_size: int = 64
    double_quant: Literal["none", "affine", "dynamic"] = "affine"

    def __post_init__(self) -> None:
        """Refuses parameter values that the format doesn't have."""
        check_choice(self.name, "block_size", self.block_size, (64, 128))
        check_choice(self.name, "double_quant", self.double_quant, ("none", "affine", "dynamic"))

    def keep_reason(self, shape: Shape) -> str | None:
        """NF4 takes every shape: blocks run over the flattened weight."""
        return None

    def counts(self, shape: Shape) -> tuple[int, int, int]:
        """(values, blocks, groups of blocks) of a weight of this shape."""
        n = int(np.prod(shape, dtype=np.int64))
        blocks = -(-n // self.block_size)
        return n, blocks, -(-blocks // BLOCKS_PER_GROUP)

    def part_specs(self, shape: Shape) -> dict[str, TensorSpec]:
        """Dtype and shape of the parts."""
        n, blocks, groups = self.counts(shape)
        codes = (-(-n // 2),) if shape[-1] % 2 else (*shape[:-1], shape[-1] // 2)
        specs = {"codes": TensorSpec("U8", codes), "absmax": TensorSpec("F32", (blocks,))}
        if self.double_quant != "none":
            specs["absmax"] = TensorSpec("U8", (blocks,))
        if self.double_quant == "affine":
            specs["absmax_scale"] = specs["absmax_offset"] = TensorSpec("F32", (groups,))
        elif self.double_quant == "dynamic":
            specs["nested_absmax"], specs["nested_offset"] = TensorSpec("F32", (groups,)), TensorSpec("F32", (1,))
        return specs

    def band_rows(self, shape: Shape) -> int:
        """Rows that hold whole groups of blocks."""
        span = self.block_size * BLOCKS_PER_GROUP
        return span // math.gcd(shape[-1], span)

    def quantize(self, weight: F32, amax: np.float32 | None = None, *, search: bool = False) -> Parts:
        """Quantizes float32 [N, K].

        Codes are chosen against the absmax that the reader will use; with `dynamic` and without `search` against the
        blocks' own, as bitsandbytes chooses them. What reverses a double quantization is the same with `search`.
        """
        largest_magnitude(weight)
        blocks = self._blocks(weight)
        absmax: F32 = np.max(np.abs(blocks), axis=1)
        parts: Parts = {"absmax": absmax}
        if self.double_quant == "affine":
            parts = quantize_absmax(absmax)
        elif self.double_quant == "dynamic":
            parts = quantize_dynamic(absmax)
        if search:
            parts = self._searched(blocks, absmax, parts)
        codes = _round(blocks, block_absmax(parts) if search or self.double_quant == "affine" else absmax)
        packed = pack_nibbles(codes.reshape(-1)[: weight.size], first_high=True, pad=NF4_ZERO_CODE)
        return {"codes": packed.reshape(self.part_specs(weight.shape)["codes"].shape), **parts}

    def dequantize(self, parts: Parts, shape: Shape) -> F32:
        """float32 [N, K]: fl(codebook[code] * absmax)."""
        n, _, _ = self.counts(shape)
        values = NF4_CODEBOOK[unpack_nibbles(parts["codes"].reshape(-1), n, first_high=True)]
        absmax = np.repeat(block_absmax(parts), self.block_size)[:n]
        return (values * absmax).reshape(shape)

    def _searched(self, blocks: F32, absmax: F32, parts: Parts) -> Parts:
        """The parts of absmax with those of the stored values under which each block's error is least.

        Tried are the legal value next to the multiple of absmax that is best by bins, or, where legal values are far
        apart, those next to each multiple.
        """
        coarse = grain(parts, absmax.size) * NF4_COARSE > absmax
        found, error = dict(parts), _errors(blocks, block_absmax(parts))
        with np.errstate(over="ignore"):
            best = best_nf4_multiplier(blocks * _inverse(absmax)[:, None]) * absmax
            tried = [(best, ~coarse), *((multiplier * absmax, coarse) for multiplier in NF4_MULTIPLIERS)]
        for wanted, where in tried:
            candidate = {**parts, "absmax": legal_absmax(parts, wanted)}
            missed = _errors(blocks, block_absmax(candidate))
            better = where & (missed < error)
            found["absmax"] = np.where(better, candidate["absmax"], found["absmax"])
            error = np.where(better, missed, error)
        return found

    def _blocks(self, weight: F32) -> F32:
        n, blocks, _ = self.counts(weight.shape)
        padded: F32 = np.zeros(blocks * self.block_size, dtype=np.float32)
        padded[:n] = weight.reshape(-1)
        return padded.reshape(blocks, self.block_size)


def _round(blocks: F32, absmax: F32) -> NDArray[np.uint8]:
    """The codes of float32 [nb, block] under the absmax [nb]; a block whose absmax is not positive gets code 7."""
    with np.errstate(over="ignore"):
        normalized = blocks * (_inverse(absmax) * (absmax > 0))[:, None]
    return np.searchsorted(NF4_MIDPOINTS, normalized, side="left").astype(np.uint8)


def _errors(blocks: F32, absmax: F32) -> F32:
    """The squared error of each block, float32 [nb], when it is rounded to nearest under the absmax [nb]."""
    with np.errstate(over="ignore", invalid="ignore"):
        values: F32 = NF4_CODEBOOK[_round(blocks, absmax)] * absmax[:, None]
    return pairwise_sum(squares(values, blocks))


def _inverse(absmax: F32) -> F32:
    return np.reciprocal(np.maximum(absmax, ABSMAX_FLOOR))
