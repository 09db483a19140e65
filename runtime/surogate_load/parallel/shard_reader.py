"""Reads what a rank keeps of a divided model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from surogate_formats.artifact import Artifact
from surogate_formats.artifact_values import check_values, scale_rules
from surogate_formats.dtypes import NUMPY
from surogate_load.errors import MismatchedModelError
from surogate_load.parallel.stored_places import Place
from surogate_load.weight import TORCH_DTYPES


class ShardReader:
    """Makes parameters of what an artifact stores."""

    def __init__(self, artifact: Artifact, device: torch.device, on_cpu: bool) -> None:
        self._artifact, self._rules, self._device = artifact, scale_rules(artifact), device
        self._kept_on = torch.device("cpu") if on_cpu else device

    def whole(self, old: nn.Parameter, place: Place) -> nn.Parameter:
        """All of what is stored, in the dtype that the parameter has."""
        shape = tuple(old.shape)
        return nn.Parameter(self._rows(place, shape, 0, shape).to(self._device, old.dtype), requires_grad=False)

    def share(self, old: Any, place: Place) -> nn.Parameter:
        """The rows of this rank.

        Raises:
            MismatchedModelError: the parameter isn't divided.
        """
        if not hasattr(old, "device_mesh"):
            raise MismatchedModelError(f"{place.tensors[0]} has no values, and belongs to no module that was sharded")
        first, shape = _own_rows(old)
        return self._divided(old, self._rows(place, tuple(old.shape), first, shape).to(old.dtype))

    def flat(self, old: Any, names: Sequence[str], places: Sequence[tuple[int, int]]) -> nn.Parameter:
        """The lines of this rank, in which stored tensors have their places (first byte, bytes)."""
        if not hasattr(old, "device_mesh"):
            raise MismatchedModelError(f"{names[0]} has no values, and belongs to no module that was sharded")
        first_line, (count, line) = _own_rows(old)
        own = torch.zeros(count * line, dtype=torch.uint8)
        begin, end = first_line * line, (first_line + count) * line
        for name, (start, size) in zip(names, places, strict=True):
            if self._artifact.checkpoint.tensors[name].info.nbytes != size:
                raise MismatchedModelError(f"{self._artifact.path}: {name} has changed since the model was made")
            low, high = max(start, begin), min(start + size, end)
            if low < high:
                self._read(name, own.numpy()[low - begin : high - begin], low - start)
        return self._divided(old, own.view(count, line))

    def _divided(self, old: Any, rows: Tensor) -> nn.Parameter:
        from torch.distributed.tensor import DTensor

        spread = DTensor.from_local(
            rows.to(self._kept_on),
            old.device_mesh,
            old.placements,
            run_check=False,
            shape=old.shape,
            stride=old.stride(),
        )
        return nn.Parameter(spread, requires_grad=old.requires_grad)

    def _rows(self, place: Place, whole: tuple[int, ...], first: int, shape: tuple[int, ...]) -> Tensor:
        """Rows [n, ...] of what is stored, from row `first` on; uint8 rows of what is packed."""
        infos = [self._artifact.checkpoint.tensors[name].info for name in place.tensors]
        stored = sum(info.nbytes for info in infos)
        if stored % prod(whole):
            raise MismatchedModelError(
                f"{self._artifact.path}: {place.tensors[0]} has changed since the model was made"
            )
        itemsize, dtype = stored // prod(whole), infos[0].dtype
        buffer = torch.empty(prod(shape) * itemsize, dtype=torch.uint8)
        filled = 0
        for name, start, size in _pieces(place.tensors, whole[0], stored // whole[0], first, shape[0]):
            self._read(name, buffer.numpy()[filled : filled + size], start)
            filled += size
        return buffer.view(torch.uint8 if itemsize == 1 else TORCH_DTYPES[dtype]).view(shape)

    def _read(self, name: str, piece: NDArray[np.uint8], start: int) -> None:
        """Bytes of a stored tensor from byte `start` on; scales among them are looked at."""
        self._artifact.checkpoint.read_into(name, piece.data, start)
        if name in self._rules:
            dtype = NUMPY[self._artifact.checkpoint.tensors[name].info.dtype]
            check_values(self._artifact, name, self._rules[name], np.frombuffer(piece, dtype), start)


def _own_rows(old: Any) -> tuple[int, tuple[int, ...]]:
    """(first row, shape) of what this rank keeps of a divided parameter."""
    mesh, axis = old.device_mesh, old.device_mesh.ndim - 1
    size, rank = mesh.size(axis), mesh.get_local_rank(axis)
    return min(rank * -(-old.shape[0] // size), old.shape[0]), tuple(old.to_local().shape)


def _pieces(
    tensors: Sequence[str], rows: int, row_bytes: int, first: int, count: int
) -> Iterator[tuple[str, int, int]]:
    """(stored tensor, first byte, bytes) of `count` rows: parts of the one tensor, or the whole tensors of experts."""
    if len(tensors) == 1:
        yield from [(tensors[0], first * row_bytes, count * row_bytes)] if count else ()
        return
    each = len(tensors) // rows
    for name in tensors[first * each : (first + count) * each]:
        yield name, 0, row_bytes // each
