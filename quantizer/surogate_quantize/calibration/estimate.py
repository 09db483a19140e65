"""How long a calibrated pass will take, about: operations over the rate of a matrix product that is timed here.

The constants are those of SmolLM2's shapes on one core, where they come within some 30 %; on GPUs launches are guessed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from surogate_quantize.calibration import text

SIDE, TIMES = 1024, 3
"""Of the product that is timed, and how often."""

FOLLOWED = 2.5
"""Runs of a block for each stream that follows the original: up to each of its stages, and once as a whole."""

LEADERS = 4 / 7
"""Share of the linears, about, that have inputs of their own."""

EACH_VALUE, EACH_SVD = 130_000, 150
"""Operations of the products' rate that a weight's value takes in the solver, and min^2 max of its sides in the SVD."""

EACH_COLUMN = {"cpu": 1e-3, "cuda": 5e-4}
"""Seconds of launches for a column in the solver."""

EACH_LAYER = {"cpu": 1.5e-3, "cuda": 5e-4}
"""Seconds of launches for a layer in a step of writing, which reaches WRITING of the products' rate beside them."""

WRITING = 0.5


@dataclass(frozen=True)
class PassSize:
    """What a pass will do.

    Attributes:
        shapes: [N, K] of each weight that is quantized.
        shares: of the tokens, that each weight multiplies: an expert's few.
        width: of hidden states.
        blocks: of the model.
        tokens: of text.
        row: tokens of a row.
        streams: of hidden states.
        solves: how often codes are calibrated for each weight.
        adapts: how often an adapter is found for each.
        written: values of the model that writes the text; 0 if that is given.
    """

    shapes: tuple[tuple[int, ...], ...]
    shares: tuple[float, ...]
    width: int
    blocks: int
    tokens: int
    row: int
    streams: int
    solves: int
    adapts: int
    written: int

    @property
    def operations(self) -> float:
        """Of the pass, as many as take the time of a float32 product's."""
        values = sum(rows * columns for rows, columns in self.shapes)
        runs = 1 + FOLLOWED * (self.streams - 1)
        used = sum(rows * columns * share for (rows, columns), share in zip(self.shapes, self.shares, strict=True))
        columns = sum(columns**2 * share for (_, columns), share in zip(self.shapes, self.shares, strict=True))
        squares = LEADERS * columns * (2 * self.streams - 1)
        spectra = sum(min(shape) ** 2 * max(shape) for shape in self.shapes)
        return (
            2 * self.tokens * (used * runs + squares + self._of_everyone)
            + EACH_VALUE * values * self.solves
            + EACH_SVD * spectra * self.adapts
            + 2 * self.tokens * self.written / WRITING
        )

    @property
    def _of_everyone(self) -> float:
        """Operations for each token, whoever's it is, that stand in for those that experts lack.

        Gates and ups share a sum a block, which is always counted, as no router is even; each down has its own, of what
        its expert's gate and up make of all tokens in both streams.
        """
        pairs = zip(self.shapes, self.shares, strict=True)
        experts = [(*shape, share * self.tokens) for shape, share in pairs if share < 1]
        if not experts or not self.solves:
            return 0
        downs = [(rows, columns) for rows, columns, tokens in experts if columns != self.width and tokens < columns]
        shared = 2 * self.width**2 * self.blocks
        return shared + sum(4 * rows * columns + 2 * columns**2 for rows, columns in downs)

    def seconds(self, device: str) -> float:
        """On `cpu` or `cuda`, with the threads that torch has now."""
        columns = sum(columns for _, columns in self.shapes) * self.solves
        steps = -(-self.tokens // (self.row * text.ROWS_AT_ONCE)) * self.row if self.written else 0
        waits = columns * EACH_COLUMN[device] + steps * self.blocks * EACH_LAYER[device]
        return self.operations / product_rate(device) + waits


def product_rate(device: str) -> float:
    """Operations a second of a float32 product, the best of a few."""
    one = torch.ones(SIDE, SIDE, device=device)
    return 2 * SIDE**3 / min(_timed(one) for _ in range(TIMES))


def _timed(one: torch.Tensor) -> float:
    started = time.perf_counter()
    (one @ one)[0, 0].item()
    return time.perf_counter() - started
