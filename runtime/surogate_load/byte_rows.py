"""Packed tensors as rows of bytes, the form in which ranks divide them: what must not be cut is one row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd, prod

import torch
from torch import Tensor

from surogate_formats.fp8 import FP8, TILE
from surogate_formats.nf4 import NF4
from surogate_formats.nvfp4 import BLOCK, NVFP4
from surogate_load.weight import WeightKind


@dataclass(frozen=True)
class ByteRows:
    """One packed tensor as uint8 [rows, bytes]: no policy casts that, and every backend communicates it.

    Attributes:
        dtype: of the packed tensor.
        shape: of it.
        rows: how many it makes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    rows: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.nbytes // self.rows

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return prod(self.shape) * self.dtype.itemsize

    def take(self, packed: Tensor) -> Tensor:
        """The rows of a packed tensor, sharing its memory."""
        return packed.reshape(-1).view(torch.uint8).view(self.rows, self.row_bytes)

    def give(self, rows: Tensor) -> Tensor:
        """The packed tensor, sharing memory with its rows; a single value is of shape [1]."""
        return rows.view(self.dtype).view(self.shape or (1,))


def byte_rows(kind: WeightKind, tensors: Mapping[str, Tensor]) -> dict[str, ByteRows]:
    """How each packed tensor of a weight [N, K] is divided.

    A row is one of W, or as many as hold whole blocks: 128 of them where scales belong to 128x128 tiles. Codes and
    scales of the same rows of W go to the same rank. Tensors that have nothing to do with rows (a scale of the whole
    weight, one for each group of NF4's blocks) make a row of each value. Where N is no multiple of those rows (an edge
    tile), the weight is one row.

    Args:
        kind: format and shape.
        tensors: every packed tensor by name.
    """
    count = _units(kind)
    found = {}
    for name, tensor in tensors.items():
        size = tensor.numel()
        rows = count if size >= count and size % count == 0 else size
        found[name] = ByteRows(tensor.dtype, tuple(tensor.shape), rows)
    return found


def expert_rows(tensors: Mapping[str, Tensor]) -> dict[str, ByteRows]:
    """How packed tensors [E, ...] of all experts of a layer are divided: a row is what one expert has.

    Args:
        tensors: every packed tensor by name.
    """
    return {name: ByteRows(tensor.dtype, tuple(tensor.shape), len(tensor)) for name, tensor in tensors.items()}


def block_bytes(kind: WeightKind) -> int:
    """Codes of so many bytes, or of a multiple, hold whole blocks; those of tiles have no such rows of bytes."""
    if isinstance(kind.format, NF4):
        return kind.format.block_size // 2
    return BLOCK // 2 if isinstance(kind.format, NVFP4) else 1


def _units(kind: WeightKind) -> int:
    rows, columns = kind.shape
    least = 1
    if isinstance(kind.format, NF4):
        least = kind.format.block_size // gcd(columns, kind.format.block_size)
    elif isinstance(kind.format, FP8) and kind.format.scaling == "block":
        least = TILE
    return rows // least if rows % least == 0 else 1
