"""NF4: 4-bit codes into a fixed table of normal quantiles, one absmax a block, itself quantized on request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from surogate_formats.dynamic_absmax import NESTED_BLOCK, quantize_dynamic, restore_dynamic
from surogate_formats.format import Parts, Shape, TensorSpec, check_choice, largest_magnitude
from surogate_formats.rounding import pack_nibbles, unpack_nibbles
from surogate_formats.tables import NF4_CODEBOOK, NF4_MIDPOINTS, NF4_ZERO_CODE

F32 = NDArray[np.float32]

BLOCKS_PER_GROUP = NESTED_BLOCK
"""Consecutive blocks whose absmax share what reverses their double quantization, of either kind."""

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

    def quantize(self, weight: F32, amax: np.float32 | None = None) -> Parts:
        """Quantizes float32 [N, K].

        Codes are chosen against the absmax that the reader will use; with `dynamic` against the blocks' own, as
        bitsandbytes chooses them.
        """
        largest_magnitude(weight)
        blocks = self._blocks(weight)
        absmax: F32 = np.max(np.abs(blocks), axis=1)
        parts: Parts = {"absmax": absmax}
        if self.double_quant == "affine":
            parts = quantize_absmax(absmax)
            absmax = block_absmax(parts)
        elif self.double_quant == "dynamic":
            parts = quantize_dynamic(absmax)
        inverse = np.float32(1) / np.maximum(absmax, ABSMAX_FLOOR)
        with np.errstate(over="ignore"):
            normalized = blocks * inverse[:, None]
        codes = np.searchsorted(NF4_MIDPOINTS, normalized, side="left").astype(np.uint8)
        codes[absmax == 0] = NF4_ZERO_CODE
        packed = pack_nibbles(codes.reshape(-1)[: weight.size], first_high=True, pad=NF4_ZERO_CODE)
        return {"codes": packed.reshape(self.part_specs(weight.shape)["codes"].shape), **parts}

    def dequantize(self, parts: Parts, shape: Shape) -> F32:
        """float32 [N, K]: fl(codebook[code] * absmax)."""
        n, _, _ = self.counts(shape)
        values = NF4_CODEBOOK[unpack_nibbles(parts["codes"].reshape(-1), n, first_high=True)]
        absmax = np.repeat(block_absmax(parts), self.block_size)[:n]
        return (values * absmax).reshape(shape)

    def _blocks(self, weight: F32) -> F32:
        n, blocks, _ = self.counts(weight.shape)
        padded: F32 = np.zeros(blocks * self.block_size, dtype=np.float32)
        padded[:n] = weight.reshape(-1)
        return padded.reshape(blocks, self.block_size)


def quantize_absmax(absmax: F32) -> Parts:
    """Double quantization of float32 [nb]: 8 bits a block around the mid-range of each group of 256.

    The mid-range, not the mean: beside one outlier block the mean pushes the small absmax of its group below zero,
    which would flip the sign of all their weights.
    """
    groups = -(-absmax.size // BLOCKS_PER_GROUP)
    padded = np.pad(absmax, (0, groups * BLOCKS_PER_GROUP - absmax.size), mode="edge").reshape(groups, BLOCKS_PER_GROUP)
    low, high = padded.min(axis=1), padded.max(axis=1)
    offset = low / np.float32(2) + high / np.float32(2)
    scale = (high - low) / np.float32(254)
    divisor = np.where(scale == 0, np.float32(1), scale)
    steps = np.rint((padded - offset[:, None]) / divisor[:, None])
    steps = np.where(scale[:, None] == 0, np.float32(0), np.clip(steps, -127, 127))
    stored = (steps + 128).astype(np.uint8).reshape(-1)[: absmax.size]
    return {"absmax": stored, "absmax_scale": scale, "absmax_offset": offset}


def block_absmax(parts: Parts) -> F32:
    """The float32 [nb] absmax that decodes the codes; reverses the double quantization where there is one."""
    if "nested_absmax" in parts:
        return restore_dynamic(parts)
    if "absmax_scale" not in parts:
        stored: NDArray[Any] = parts["absmax"]
        return stored
    steps = parts["absmax"].astype(np.float32) - np.float32(128)
    group = np.arange(steps.size) // BLOCKS_PER_GROUP
    restored: F32 = steps * parts["absmax_scale"][group] + parts["absmax_offset"][group]
    return np.maximum(restored, np.float32(0))
