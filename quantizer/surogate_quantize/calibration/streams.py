"""The hidden states that a pass carries from block to block, and what a block's linears are given on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from surogate_quantize.calibration.activations import Activations
from surogate_quantize.calibration.inputs import Inputs, summed
from surogate_quantize.calibration.observing import Linears, Watched, input_of, inputs_of, unused
from surogate_quantize.calibration.originals import KeptInputs, OriginalInputs

ORIGINAL, QUANTIZED, ADAPTED = "original", "quantized", "adapted"
"""Streams: of the original model, of the quantized one, and of that with its adapter."""

Run = Callable[[Tensor], Tensor]
"""Runs a block on hidden states."""


class Streams:
    """The hidden states of each stream at one border between blocks.

    Args:
        folder: where their files are.
        border: the number of the block behind it.
        names: of the streams.
        shape: of a batch.
        count: of batches.
        device: where the model runs.
    """

    def __init__(
        self,
        folder: Path,
        border: int,
        names: Iterable[str],
        shape: tuple[int, ...],
        count: int,
        device: torch.device,
    ) -> None:
        """Opens the files."""
        self.count = count
        self._files = {name: Activations(folder / f"{border}.{name}", shape, count, device=device) for name in names}

    def __getitem__(self, name: str) -> Activations:
        """A stream by its name."""
        return self._files[name]

    @property
    def whole(self) -> bool:
        """Whether all files have their size."""
        return all(file.whole for file in self._files.values())

    def start(self, position: int, hidden: Tensor) -> None:
        """Writes a batch that all streams have in common."""
        for file in self._files.values():
            file.write(position, hidden)

    def sync(self) -> None:
        """Waits until the disk has all."""
        for file in self._files.values():
            file.sync()

    def remove(self) -> None:
        """Removes the files."""
        for file in self._files.values():
            file.close()
            file.path.unlink()


class Follower:
    """A block with weights of its own in one of the streams that follow the original.

    Args:
        run: runs the block with the weights that its linears hold.
        linears: the block's, with the original weights.
        watched: the block's, see `Watched`.
        stream: the hidden states before it.
    """

    def __init__(self, run: Run, linears: Linears, watched: Watched, stream: Activations) -> None:
        """Starts with the original weights."""
        self._run, self._linears, self._watched, self._stream = run, linears, watched, stream
        self._weights: dict[str, Tensor] = {name: linear.weight.data for name, linear in linears.items()}

    @property
    def rows(self) -> int:
        """Rows of text in a batch."""
        return self._stream.rows

    def run(self, hidden: Tensor) -> Tensor:
        """The hidden states behind the block."""
        for name, linear in self._linears.items():
            linear.weight.data = self._weights[name]
        return self._run(hidden)

    def take(self, name: str, weight: Tensor) -> None:
        """Gives one of the linears another weight."""
        self._weights[name] = weight.to(self._weights[name].dtype)

    def advance(self, after: Activations) -> None:
        """Writes the hidden states behind the block."""
        for position, hidden in enumerate(self._stream):
            after.write(position, self.run(hidden))

    def input(self, leader: str, hidden: Tensor) -> Tensor:
        """What one of the modules is given, of hidden states before the block."""
        return input_of(self._watched, leader, partial(self.run, hidden))

    def all_inputs(self, leader: str, path: Path) -> KeptInputs:
        """The same of every batch, in a file."""
        batches = (self.input(leader, hidden) for hidden in self._stream)
        return kept_inputs(path, batches, self._stream)

    def inputs(self, leader: str, original: OriginalInputs) -> Inputs:
        """What a stage is given here, beside what the original gives it."""

        def pair(position: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
            x = self.input(leader, hidden).flatten(0, -2).float()
            return x, original.read(position).flatten(0, -2).to(x)

        pairs = (pair(*each) for each in enumerate(self._stream))
        return summed(leader, pairs, self._stream.count, self.rows)


def kept_inputs(path: Path, batches: Iterable[Tensor], stream: Activations) -> KeptInputs:
    """A module's inputs, one batch for each of a stream's, in a file."""
    kept: KeptInputs | None = None
    for position, batch in enumerate(batches):
        kept = kept or KeptInputs(path, tuple(batch.shape), stream.count, device=batch.device)
        kept.write(position, batch)
    assert kept is not None
    return kept


def observed(
    leaders: list[str], watched: Watched, run: Run, before: Activations, after: Activations, folder: Path
) -> dict[str, KeptInputs]:
    """Runs the original block; returns what the leaders of its stages are given, and writes what comes out."""
    kept: dict[str, KeptInputs] = {}
    with inputs_of(watched, leaders) as latest:
        for position, hidden in enumerate(before):
            latest.clear()
            after.write(position, run(hidden))
            for leader in leaders:
                if leader not in latest:
                    raise unused(leader)
                if leader not in kept:
                    path = folder / f"{leader}.inputs"
                    kept[leader] = KeptInputs(path, tuple(latest[leader].shape), before.count)
                kept[leader].write(position, latest[leader])
    return kept
