"""A source weight by its bits, as engines take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surogate_formats.dtypes import NUMPY

RAW_DTYPES: dict[str, Any] = {"F32": np.uint32, "BF16": np.uint16, "F16": np.uint16}
"""The unsigned integers that hold the bits of each source dtype."""

KINDS = {"F32": 0, "BF16": 1, "F16": 2}
"""How the CPU kernels' `widen` reads the bits of each source dtype."""

INFINITY_BITS = {"F32": 0x7F800000, "BF16": 0x7F80, "F16": 0x7C00}
"""Magnitude bits from here on are an infinity or a NaN."""


@dataclass(frozen=True)
class Source:
    """A source weight [N, K] by its bits.

    Attributes:
        raw: uint16 or uint32 [N, K].
        dtype: the safetensors dtype that the bits are of.
    """

    raw: NDArray[Any]
    dtype: str

    @classmethod
    def of(cls, weight: NDArray[Any], dtype: str) -> Source:
        """Wraps an array of the source's own dtype."""
        return cls(weight.view(RAW_DTYPES[dtype]), dtype)

    @property
    def float32(self) -> NDArray[np.float32]:
        """The values, float32 [N, K]."""
        values: NDArray[np.float32] = self.raw.view(NUMPY[self.dtype]).astype(np.float32)
        return values

    @property
    def kind(self) -> int:
        """How kernels read the bits."""
        return KINDS[self.dtype]

    @property
    def mask(self) -> Any:
        """All bits but the sign, in the dtype of `raw`."""
        return self.raw.dtype.type(2 ** (8 * self.raw.itemsize - 1) - 1)

    @property
    def infinity(self) -> int:
        """Magnitude bits from here on are not finite."""
        return INFINITY_BITS[self.dtype]

    def magnitudes(self, bits: NDArray[Any]) -> NDArray[np.float32]:
        """float32 of magnitude bits in the source's dtype."""
        return bits.view(NUMPY[self.dtype]).astype(np.float32)
