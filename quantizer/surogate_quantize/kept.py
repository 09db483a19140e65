"""Copying a kept tensor into its shard: byte for byte, or into the dtype that readers take instead of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surogate_formats.checkpoint import Checkpoint
from surogate_formats.dtype_rules import QUANTIZABLE
from surogate_formats.dtypes import NUMPY
from surogate_formats.errors import OutOfRangeError
from surogate_quantize.plan import PlannedTensor
from surogate_quantize.source import Source

COPY_PIECE = 8 << 20
"""Bytes of a kept tensor that are in memory at a time; a multiple of every element's."""


class KeptTensor:
    """The payload of one kept tensor.

    Attributes:
        finite: whether what has been read so far holds no NaN and no infinity.
    """

    def __init__(self, source: Checkpoint, tensor: PlannedTensor) -> None:
        """Reads nothing yet."""
        self.finite = True
        self._source = source
        self._info = tensor.info
        self._stored = tensor.stored["kept"].spec.dtype

    def chunks(self) -> Iterator[memoryview]:
        """The stored bytes in order; a chunk is good until the next one is asked for.

        Raises:
            OutOfRangeError: a value has no place in the stored dtype.
        """
        info = self._info
        buffer = np.empty(min(COPY_PIECE, info.nbytes), np.uint8)
        for offset in range(0, info.nbytes, COPY_PIECE):
            read = buffer[: self._source.read_into(info.name, buffer.data, offset)]
            if self._stored != info.dtype:
                read = self._converted(read.view(NUMPY[info.dtype]))
            self.finite = self.finite and all_finite(read, self._stored)
            yield read.data

    def _converted(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        target = NUMPY[self._stored]
        if target.itemsize == values.dtype.itemsize:
            return values.view(np.uint8)
        with np.errstate(over="ignore", invalid="ignore"):
            converted = values.astype(target)
        lost = converted != values if target.kind == "i" else np.isinf(converted) & np.isfinite(values)
        if lost.any():
            where = f"{self._source.directory / self._source.tensors[self._info.name].file}: tensor {self._info.name}"
            raise OutOfRangeError(
                f"{where}: {values[lost][0]} does not fit into {self._stored}, and some readers refuse a file with a "
                f"tensor in {self._info.dtype}; repair the source"
            )
        return converted.view(np.uint8)


def all_finite(payload: NDArray[np.uint8], dtype: str) -> bool:
    """Whether a payload holds no NaN and no infinity; dtypes other than F32, F16 and BF16 are not looked into."""
    from surogate_quantize.kernels.source import largest_bits

    if dtype not in QUANTIZABLE:
        return True
    source = Source.of(payload.view(NUMPY[dtype]), dtype)
    return int(largest_bits(source.raw, source.mask)) < source.infinity
