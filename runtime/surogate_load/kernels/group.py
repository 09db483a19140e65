"""Several weights of one format dequantized in one launch: a fused group, or a whole decoder layer."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from surogate_load.kernels.device import functions_on
from surogate_load.kernels.launch import launch_group
from surogate_load.kernels.weights import DESCRIBE, SUFFIXES, Described
from surogate_load.weight import WeightKind

ALIGNMENT = 16
"""Bytes to which each result is aligned: a kernel's stores, and a matrix product's operand, need so much."""


class DequantizeGroup:
    """A table of packed weights, on the device; `into` dequantizes all of them.

    Results lie one after the other in one flat tensor, without gaps where N*K is a multiple of 16, so that weights
    with equal K can be multiplied as one matrix. The table points into the packed tensors, which the group keeps
    alive: build another one when they have been moved.

    Attributes:
        dtype: of the results.
        shapes: (N, K) of each weight, in the order given.
        offsets: where each weight begins in the flat result, in values.
        values: length of the flat result.
    """

    def __init__(
        self,
        kinds: Sequence[WeightKind],
        parts: Sequence[Sequence[Tensor]],
        dtype: torch.dtype,
        multipliers: Sequence[Tensor | None] | None = None,
    ) -> None:
        """Builds the table; copies a few hundred bytes to the device, so not while a CUDA graph is captured.

        Args:
            kinds: format and shape of each weight; at least one, all of one format with the same parts.
            parts: the packed tensors of each weight, in the order of `WeightKind.specs`, all on one device.
            dtype: of the results: float32, bfloat16, float16 or float8_e4m3fn.
            multipliers: float32 [1] each, or None; multiplied in before rounding.
        """
        self.dtype = dtype
        self.device = parts[0][0].device
        self.shapes = [kind.shape for kind in kinds]
        step = ALIGNMENT // dtype.itemsize
        sizes = [-(-rows * columns // step) * step for rows, columns in self.shapes]
        self.offsets = [0, *accumulate(sizes)][:-1]
        self.values = sum(sizes)
        self._weights = list(zip(kinds, parts, multipliers or [None] * len(kinds), strict=True))
        functions = functions_on(self.device.index) if self.device.type == "cuda" else None
        self._function = None
        if functions is not None:
            described = [_described(*weight) for weight in self._weights]
            kernels = {weight.kernel for weight in described}
            if len(kernels) > 1:
                raise ValueError(f"one launch dequantizes one format, not {', '.join(sorted(kernels))}")
            self._build(described)
            self._function = functions[kernels.pop() + SUFFIXES[dtype]]

    def _build(self, described: Sequence[Described]) -> None:
        first_tiles = [0, *accumulate(weight.tiles for weight in described)]
        self._tiles = first_tiles.pop()
        table = b"".join(
            weight.packed(offset * self.dtype.itemsize, first)
            for weight, offset, first in zip(described, self.offsets, first_tiles, strict=True)
        )
        packed = table + struct.pack(f"={len(first_tiles)}I", *first_tiles)
        self._table = torch.frombuffer(bytearray(packed), dtype=torch.uint8).to(self.device)
        self._first_tiles = self._table.data_ptr() + len(table)
        self._keep = [weight.keep for weight in described]

    def empty(self) -> Tensor:
        """An uninitialised flat result."""
        return torch.empty(self.values, dtype=self.dtype, device=self.device)

    def views(self, out: Tensor) -> list[Tensor]:
        """The dense weights [N, K] in a flat result."""
        return [
            out[offset : offset + rows * columns].view(rows, columns)
            for offset, (rows, columns) in zip(self.offsets, self.shapes, strict=True)
        ]

    def into(self, out: Tensor) -> None:
        """Dequantizes every weight into a flat result, on the current stream, in one launch."""
        if self._function is None:
            for view, (kind, tensors, multiplier) in zip(self.views(out), self._weights, strict=True):
                view.copy_(kind.dequantize(tensors, self.dtype, multiplier))
        elif self._tiles:
            table, size = self._table.data_ptr(), len(self.shapes)
            launch_group(self._function, self.device.index, self._tiles, out.data_ptr(), table, self._first_tiles, size)


def _described(kind: WeightKind, parts: Sequence[Tensor], multiplier: Tensor | None) -> Described:
    op, arguments = kind.op_call(parts)
    return DESCRIBE[op](*arguments, multiplier)
