"""The weights of all experts of a layer dequantized in one launch, without waiting for the device.

The table of packed weights stands on the device. A call copies it and sets the size of what belongs to experts without
rows to 0 there, so their thread blocks end at once; the host never learns which these are.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from surogate_load.experts.kind import ExpertsKind
from surogate_load.kernels.device import functions_on
from surogate_load.kernels.launch import launch_group
from surogate_load.kernels.source import WEIGHT
from surogate_load.kernels.weights import DESCRIBE, SUFFIXES, Described
from surogate_load.ops import experts as _plain  # noqa: F401  (defines the ops)
from surogate_load.ops.library import PLAIN, accelerate

ALIGNMENT = 16
"""Bytes to which a kernel's stores are aligned, and so each weight's result."""

_SWEPT_FROM = 1 << 8
"""With fewer tables, those of weights that are gone may stay."""

_COUNT = 6
"""Place of `count` in `Weight`, in words of eight bytes."""


class _Table(NamedTuple):
    """The packed weights of one projection, on the device; its pointers stay right as long as the parts stand there."""

    kernel: str
    tiles: int
    weights: Tensor  # int64 [E * M, words of `Weight`]
    first_tiles: Tensor  # uint32 [E * M], as bytes
    described: Callable[[], Any]  # a weak reference to the codes' storage
    address: int  # of that


_tables: dict[tuple[Any, ...], _Table] = {}


def _dequantize(parts: Sequence[Tensor], ends: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    described = ExpertsKind.of_key(kind)
    device = ends.get_device()
    functions = functions_on(device)
    size = described.shape[0] * described.shape[1] * dtype.itemsize
    if functions is None or dtype not in SUFFIXES or size % ALIGNMENT or not all(p.is_contiguous() for p in parts):
        result: Tensor = PLAIN["dequantize_experts"](parts, ends, kind, dtype)
        return result
    table = _table(parts, described, kind, dtype)
    out = torch.empty((described.experts, described.rows, described.shape[1]), dtype=dtype, device=ends.device)
    weights = table.weights.clone()
    used = torch.diff(ends, prepend=ends.new_zeros(1)) > 0
    weights[:, _COUNT].view(described.experts, described.members).mul_(used[:, None])
    function = functions[table.kernel + SUFFIXES[dtype]]
    launch_group(function, device, table.tiles, out.data_ptr(), weights.data_ptr(), table.first_tiles.data_ptr(),
                 len(weights))  # fmt: skip
    return out


def _table(parts: Sequence[Tensor], kind: ExpertsKind, key: str, dtype: torch.dtype) -> _Table:
    """The table of these parts, built at the first call: before a CUDA graph is captured."""
    found = (key, dtype, *((part.data_ptr(), part.dtype) for part in parts))
    table = _tables.get(found)
    if table is None:
        _sweep()
        table = _tables[found] = _build(parts, kind, dtype)
    return table


def _sweep() -> None:
    """Drops tables of weights that are gone or gathered elsewhere by now, and no others.

    A captured graph reads a table as long as it is replayed. FSDP2, under which none is captured, frees what it has
    gathered but keeps the storage, empty, and fills that again at another address.
    """
    if len(_tables) >= _SWEPT_FROM:
        for key in [key for key, table in _tables.items() if _moved(table)]:
            del _tables[key]


def _moved(table: _Table) -> bool:
    storage = table.described()
    return storage is None or storage.data_ptr() != table.address


def _build(parts: Sequence[Tensor], kind: ExpertsKind, dtype: torch.dtype) -> _Table:
    places = [(expert, member) for expert in range(kind.experts) for member in range(kind.members)]
    described = [_described(kind, kind.parts_of(parts, *place)) for place in places]
    size = kind.shape[0] * kind.shape[1] * dtype.itemsize
    tiles = described[0].tiles
    firsts = range(0, tiles * len(places), tiles)
    table = b"".join(
        weight.packed(index * size, first) for index, (weight, first) in enumerate(zip(described, firsts, strict=True))
    )
    weights = torch.frombuffer(bytearray(table), dtype=torch.int64).view(len(places), WEIGHT.size // 8)
    first_tiles = torch.frombuffer(bytearray(struct.pack(f"={len(places)}I", *firsts)), dtype=torch.uint8)
    device = parts[0].device
    codes = parts[0].untyped_storage()
    return _Table(described[0].kernel, tiles * len(places), weights.to(device), first_tiles.to(device), ref(codes),
                  codes.data_ptr())  # fmt: skip


def _described(kind: ExpertsKind, parts: tuple[Tensor, ...]) -> Described:
    op, arguments = kind.weight.op_call(parts)
    return DESCRIBE[op](*arguments, None)


accelerate("dequantize_experts", _dequantize)
accelerate("dequantize_experts_for_backward", lambda gradient, *rest: _dequantize(*rest))
