"""What rounding costs at the outputs of a model's linears, block by block, from what a manifest records."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from surogate_formats.manifest import TensorRecord

_BLOCK = re.compile(r"\.(\d+)\.")


class OutputError(NamedTuple):
    """The mean over some linears of the relative error of their outputs on held-out text.

    Attributes:
        nearest: with codes that are nearest to the weights.
        packed: with the codes of the artifact, and its adapter where it has one.
        weights: how many linears.
    """

    nearest: float
    packed: float
    weights: int


def output_errors(records: Mapping[str, TensorRecord]) -> dict[int, OutputError]:
    """By the number of the block, in order; empty where the model was not run on text.

    Args:
        records: of tensors by name.
    """
    blocks: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for name, record in records.items():
        block = _BLOCK.search(name)
        if block is not None and record.nearest_output_error is not None and record.output_error is not None:
            blocks[int(block[1])].append((record.nearest_output_error, record.output_error))
    return {block: _mean(pairs) for block, pairs in sorted(blocks.items())}


def _mean(pairs: list[tuple[float, float]]) -> OutputError:
    nearest, packed = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    return OutputError(nearest, packed, len(pairs))
