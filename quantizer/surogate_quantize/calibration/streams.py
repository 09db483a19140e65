"""The hidden states that a pass carries from block to block, and what a block's linears are given on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from surogate_formats.errors import SurogateError
from surogate_load.block_runner import NoBlocksError
from surogate_quantize.calibration.activations import Activations
from surogate_quantize.calibration.observing import Linears, input_of, inputs_of
from surogate_quantize.calibration.solver import Statistics, statistics

ORIGINAL, QUANTIZED, ADAPTED = "original", "quantized", "adapted"
"""Streams: of the original model, of the quantized one, and of that with its adapter."""

Run = Callable[[Tensor], Tensor]
"""Runs a block on hidden states."""


class NotFiniteError(SurogateError):
    """The model's own activations hold a NaN or an infinity in float32."""


class Streams:
    """The hidden states of each stream at one border between blocks.

    Args:
        folder: where their files are.
        border: the number of the block behind it.
        names: of the streams.
        shape: of a batch.
        count: of batches.
    """

    def __init__(self, folder: Path, border: int, names: Iterable[str], shape: tuple[int, ...], count: int) -> None:
        """Opens the files."""
        self.count = count
        self._files = {name: Activations(folder / f"{border}.{name}", shape, count) for name in names}

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
        stream: the hidden states before it.
    """

    def __init__(self, run: Run, linears: Linears, stream: Activations) -> None:
        """Starts with the original weights."""
        self._run, self._linears, self._stream = run, linears, stream
        self.weights: dict[str, Tensor] = {name: linear.weight.data for name, linear in linears.items()}

    def run(self, hidden: Tensor) -> Tensor:
        """The hidden states behind the block."""
        for name, linear in self._linears.items():
            linear.weight.data = self.weights[name]
        return self._run(hidden)

    def advance(self, after: Activations) -> None:
        """Writes the hidden states behind the block."""
        for position, hidden in enumerate(self._stream):
            after.write(position, self.run(hidden))

    def inputs(self, leader: str, original: Activations) -> Inputs:
        """What a stage is given here, beside what the original gives it."""
        sums: list[Tensor] = []
        last: tuple[Tensor, Tensor] | None = None
        tokens = 0
        for position, hidden in enumerate(self._stream):
            x = input_of(self._linears, leader, partial(self.run, hidden)).flatten(0, -2).float()
            wanted = original.read(position).flatten(0, -2).to(x)
            last = (x, wanted)
            if position and position == self._stream.count - 1:
                break
            new = [(x.T @ x).double(), ((wanted - x).T @ x).double()]
            sums = [total + more for total, more in zip(sums, new, strict=True)] if sums else new
            tokens += len(x)
        if last is None or not all(torch.isfinite(total).all() for total in sums):
            raise NotFiniteError(f"{leader}: its inputs on the calibration text are not finite; use `codes='search'`")
        return Inputs(statistics(sums[0] / tokens, sums[1] / tokens), *last)


class Inputs:
    """What the linears of a stage are given: statistics of all batches but the last, which is held out.

    Attributes:
        known: the statistics.
    """

    def __init__(self, known: Statistics, x: Tensor, wanted: Tensor) -> None:
        """Takes the held-out inputs of the follower and of the original, float32 [tokens, K]."""
        self.known, self._x, self._wanted = known, x, wanted

    def target(self, weight: Tensor) -> Tensor:
        """W + a W shift, float32 [N, K], with the share a of 0 to 1 that serves the held-out batch best.

        The whole shift fits the text that it was found on, and other text worse.
        """
        assert self.known.shift is not None
        shift = weight @ self.known.shift
        moved, missing = self._x @ shift.T, (self._wanted - self._x) @ weight.T
        size = float((moved * moved).sum())
        share = float((moved * missing).sum()) / size if size else 0.0
        return weight + min(max(share, 0.0), 1.0) * shift

    def error(self, weight: Tensor, values: Tensor) -> float:
        """||Q x - W x'|| / ||W x'|| over the held-out batch, x' being the original model's inputs."""
        expected = self._wanted @ weight.T
        size = float(expected.norm())
        return float((self._x @ values.T - expected).norm()) / size if size else 0.0


def observed(
    leaders: list[str], linears: Linears, run: Run, before: Activations, after: Activations, folder: Path
) -> dict[str, Activations]:
    """Runs the original block; returns what the leaders of its stages are given, and writes what comes out."""
    kept: dict[str, Activations] = {}
    with inputs_of(linears, leaders) as latest:
        for position, hidden in enumerate(before):
            latest.clear()
            after.write(position, run(hidden))
            for leader in leaders:
                if leader not in latest:
                    raise NoBlocksError(f"{leader}: isn't used for every text; leave it out with `skip`")
                if leader not in kept:
                    path = folder / f"{leader}.inputs"
                    kept[leader] = Activations(path, tuple(latest[leader].shape), before.count)
                kept[leader].write(position, latest[leader])
    return kept
