"""Reads weights that are to be quantized, and the largest magnitudes of their fused groups, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from surogate_formats.checkpoint import Checkpoint
from surogate_formats.dtypes import NUMPY
from surogate_formats.errors import NonFiniteWeightError, OutOfRangeError
from surogate_quantize.engine import Engine
from surogate_quantize.kept import COPY_PIECE
from surogate_quantize.plan import Plan, PlannedTensor
from surogate_quantize.source import Source

READ_AHEAD = 128 << 20
"""Bytes: a larger weight is not read while another is quantized, and fused groups are held up to this sum."""


@dataclass(frozen=True)
class Weight:
    """A weight's values and its own largest magnitude; `buffer` is the memory that they stand in."""

    source: Source
    amax: np.float32
    buffer: NDArray[np.uint8]


class WeightReader:
    """Reads weights and their largest magnitudes; holds the members of a small fused group until they are asked for."""

    def __init__(self, source: Checkpoint, plan: Plan, engine: Engine) -> None:
        self._source = source
        self._engine = engine
        self._tensors = {tensor.info.name: tensor for tensor in plan.tensors}
        self._held: dict[str, Weight] = {}
        self._amax: dict[str, np.float32] = {}
        large = [tensor.info.nbytes for tensor in plan.quantized if tensor.info.nbytes > READ_AHEAD]
        self._large = engine.host_memory(max(large, default=0))
        self._free: list[NDArray[np.uint8]] = []

    def load(self, tensor: PlannedTensor) -> Weight:
        """The weight's values, and the largest magnitude of its fused group."""
        name = tensor.info.name
        loaded = self._held.pop(name, None) or self._read(tensor)
        others = [self._tensors[member] for member in tensor.group if member not in self._amax]
        held = sum(held.source.raw.nbytes for held in self._held.values())
        hold = held + sum(member.info.nbytes for member in others) <= READ_AHEAD
        for member in others:
            if hold:
                self._held[member.info.name] = self._read(member)
            else:
                self._measure(member)
        return loaded

    def group_amax(self, tensor: PlannedTensor) -> np.float32:
        """The largest magnitude over the tensor's fused group, whose members `load` has seen."""
        return max(self._amax[member] for member in tensor.group)

    def _measure(self, tensor: PlannedTensor) -> None:
        """Finds a weight's largest magnitude in pieces, without holding the weight."""
        info, largest = tensor.info, np.float32(0)
        buffer = np.empty(min(COPY_PIECE, info.nbytes), np.uint8)
        try:
            for offset in range(0, info.nbytes, COPY_PIECE):
                count = self._source.read_into(info.name, buffer.data, offset)
                piece = buffer[:count].view(NUMPY[info.dtype]).reshape(1, -1)
                largest = max(largest, self._engine.amax(Source.of(piece, info.dtype)))
        except NonFiniteWeightError:
            self._read(tensor)  # raises with the index in the whole weight
        self._amax[info.name] = largest

    def _read(self, tensor: PlannedTensor) -> Weight:
        info = tensor.info
        # Large weights come one by one, into one buffer: a thread slow to let go of the last one's pieces
        # would otherwise keep it in memory beside the next.
        buffer = self._large if info.nbytes > READ_AHEAD else self._take(info.nbytes)
        payload = buffer[: info.nbytes]
        self._source.read_into(info.name, payload.data)
        source = Source.of(payload.view(NUMPY[info.dtype]).reshape(info.shape), info.dtype)
        with named(self._source, tensor):
            amax = self._amax[info.name] = self._engine.amax(source)
        return Weight(source, amax, buffer)

    def release(self, weight: Weight) -> None:
        """Takes back the memory of a weight that nobody reads any more.

        The allocator would give it to the system, and get it back for the next weight page by page.
        """
        if weight.buffer is not self._large:
            self._free.append(weight.buffer)
            while sum(buffer.nbytes for buffer in self._free) > READ_AHEAD:
                del self._free[min(range(len(self._free)), key=lambda index: self._free[index].nbytes)]

    def _take(self, size: int) -> NDArray[np.uint8]:
        fitting = [index for index, buffer in enumerate(self._free) if buffer.nbytes >= size]
        if not fitting:
            return self._engine.host_memory(size)
        return self._free.pop(min(fitting, key=lambda index: self._free[index].nbytes))


@contextmanager
def named(source: Checkpoint, tensor: PlannedTensor) -> Iterator[None]:
    """Puts file and tensor in front of the message of an error that lies in the weight, keeping its class."""
    try:
        yield
    except (NonFiniteWeightError, OutOfRangeError) as error:
        where = f"{source.directory / source.tensors[tensor.info.name].file}: tensor {tensor.info.name}"
        hint = f"repair the source, or leave it out with `skip` {tensor.module}"
        raise type(error)(f"{where}: {error}; {hint}") from None
