"""Sums by neighbours, as `surogate_formats.search` defines them: each round is one long loop that vectorizes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from surogate_quantize.kernels.compiling import inner


@inner
def _add_neighbours(terms: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    for i in range(out.size):
        out[i] = terms[2 * i] + terms[2 * i + 1]


@inner
def pairwise_sums(
    terms: NDArray[np.float32], width: int, scratch: NDArray[np.float32], out: NDArray[np.float32]
) -> None:
    """The sum of each `width` (a power of two, at least 2) terms; `scratch` is as long as `terms`."""
    place = 0
    while width > 2:
        half = scratch[place : place + terms.size // 2]
        _add_neighbours(terms, half)
        terms = half
        place += half.size
        width //= 2
    _add_neighbours(terms, out)
