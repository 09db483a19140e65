"""Reads weights that are to be quantized, and the largest magnitudes of their fused groups, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from surogate_formats.checkpoint import Checkpoint
from surogate_formats.dtypes import NUMPY
from surogate_formats.errors import NonFiniteWeightError, OutOfRangeError
from surogate_formats.nf4 import NF4
from surogate_quantize.bands import Band
from surogate_quantize.engine import Engine
from surogate_quantize.kept import COPY_PIECE
from surogate_quantize.plan import Plan, PlannedTensor
from surogate_quantize.source import Source


@dataclass(frozen=True)
class Weight:
    """Values of a weight, or of a band of it, and the whole weight's largest magnitude.

    Attributes:
        source: the values.
        amax: the whole weight's largest magnitude.
        buffer: the memory that the values stand in.
    """

    source: Source
    amax: np.float32
    buffer: NDArray[np.uint8]


class WeightReader:
    """Reads weights and their largest magnitudes; holds the members of a small fused group until they are asked for.

    Args:
        source: the open checkpoint.
        plan: the plan.
        engine: finds largest magnitudes.
        limit: bytes of weights held for later, and of memory kept for reuse.
        known: largest magnitudes that need not be looked for.
    """

    def __init__(
        self, source: Checkpoint, plan: Plan, engine: Engine, limit: int, known: Mapping[str, np.float32]
    ) -> None:
        """Reads nothing yet."""
        self._source = source
        self._engine = engine
        self._limit = limit
        self._tensors = {tensor.info.name: tensor for tensor in plan.tensors}
        fmt = plan.options.format
        self._dynamic = fmt if isinstance(fmt, NF4) and fmt.double_quant == "dynamic" else None
        self._held: dict[str, Weight] = {}
        self._amax: dict[str, np.float32] = dict(known)
        self._absmax_mean: dict[str, np.float32] = {}
        self._free: list[NDArray[np.uint8]] = []
        self._freeing = Lock()  # one thread reads ahead, another gives memory back

    def load(self, band: Band) -> Weight:
        """The band's values; the largest magnitudes of the weight's fused group are known from then on."""
        name = band.tensor.info.name
        loaded = self._held.pop(name, None) or (self._read(band.tensor) if band.whole else self._read_band(band))
        others = [self._tensors[member] for member in band.tensor.group if member not in self._amax]
        held = sum(held.source.raw.nbytes for held in self._held.values())
        hold = held + sum(member.info.nbytes for member in others) <= self._limit
        for member in others:
            if hold:
                self._held[member.info.name] = self._read(member)
            else:
                self.measure(member)
        return loaded

    @property
    def known(self) -> Mapping[str, np.float32]:
        """The largest magnitudes that are known so far."""
        return self._amax

    def group_amax(self, tensor: PlannedTensor) -> np.float32:
        """The largest magnitude over the tensor's fused group, whose members `load` has seen."""
        return max(self._amax[member] for member in tensor.group)

    def absmax_mean(self, tensor: PlannedTensor) -> np.float32 | None:
        """The mean absmax of a weight that came in bands, where the format asks for it."""
        return self._absmax_mean.get(tensor.info.name)

    def measure(self, tensor: PlannedTensor) -> np.float32:
        """Finds a weight's largest magnitude in pieces, without holding the weight; and its mean absmax."""
        info, largest, absmax = tensor.info, np.float32(0), []
        buffer = np.empty(min(COPY_PIECE, info.nbytes), np.uint8)
        with named(self._source, tensor):
            for offset in range(0, info.nbytes, COPY_PIECE):
                count = self._source.read_into(info.name, buffer.data, offset)
                values = buffer[:count].view(NUMPY[info.dtype])
                piece = Source.of(values.reshape(1, -1), info.dtype)
                try:
                    largest = max(largest, self._engine.amax(piece))
                except NonFiniteWeightError:
                    raise _non_finite(tensor, values, offset) from None
                if self._dynamic:
                    absmax.append(self._engine.block_absmax(self._dynamic, piece))
        if absmax:
            from surogate_quantize.kernels.nf4_absmax import mean_absmax

            self._absmax_mean[info.name] = mean_absmax(np.concatenate(absmax))
        self._amax[info.name] = largest
        return largest

    def _read(self, tensor: PlannedTensor) -> Weight:
        source, buffer = self._values(Band(tensor, 0, tensor.info.shape[0]))
        with named(self._source, tensor):
            amax = self._amax[tensor.info.name] = self._engine.amax(source)
        return Weight(source, amax, buffer)

    def _read_band(self, band: Band) -> Weight:
        name = band.tensor.info.name
        if name not in self._amax or (self._dynamic and name not in self._absmax_mean):
            self.measure(band.tensor)
        source, buffer = self._values(band)
        return Weight(source, self._amax[name], buffer)

    def _values(self, band: Band) -> tuple[Source, NDArray[np.uint8]]:
        info, buffer = band.tensor.info, self._take(band.nbytes)
        payload = buffer[: band.nbytes]
        self._source.read_into(info.name, payload.data, band.offset)
        return Source.of(payload.view(NUMPY[info.dtype]).reshape(band.shape), info.dtype), buffer

    def release(self, weight: Weight) -> None:
        """Takes back the memory of a weight that nobody reads any more.

        The allocator would give it to the system, and get it back for the next weight page by page.
        """
        with self._freeing:
            self._free.append(weight.buffer)
            while sum(buffer.nbytes for buffer in self._free) > self._limit:
                del self._free[min(range(len(self._free)), key=lambda index: self._free[index].nbytes)]

    def _take(self, size: int) -> NDArray[np.uint8]:
        with self._freeing:
            fitting = [index for index, buffer in enumerate(self._free) if buffer.nbytes >= size]
            if fitting:
                return self._free.pop(min(fitting, key=lambda index: self._free[index].nbytes))
        return self._engine.host_memory(size)


def _non_finite(tensor: PlannedTensor, values: NDArray[np.generic], offset: int) -> NonFiniteWeightError:
    """The error for the first NaN or infinity of a piece that starts at a byte of the weight."""
    widened = values.astype(np.float32)
    index = int(np.argmin(np.isfinite(widened)))
    row, column = divmod(offset // values.itemsize + index, tensor.info.shape[1])
    return NonFiniteWeightError(f"[{row}, {column}] is {widened[index]}")


@contextmanager
def named(source: Checkpoint, tensor: PlannedTensor) -> Iterator[None]:
    """Puts file and tensor in front of the message of an error that lies in the weight, keeping its class."""
    try:
        yield
    except (NonFiniteWeightError, OutOfRangeError) as error:
        where = f"{source.directory / source.entry(tensor.info.name).file}: tensor {tensor.info.name}"
        hint = f"repair the source, or leave it out with `skip` {tensor.module}"
        raise type(error)(f"{where}: {error}; {hint}") from None
