"""The calibrated pass over one block: its linears are solved in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from surogate_formats.format import Parts
from surogate_load.block_runner import BlockRunner
from surogate_quantize.bands import Band
from surogate_quantize.calibration.activations import Activations
from surogate_quantize.calibration.adapter import Factors, factors
from surogate_quantize.calibration.grids import make_grid
from surogate_quantize.calibration.observing import Linears, input_of, inputs_of, stages
from surogate_quantize.calibration.solver import Statistics, solve, statistics
from surogate_quantize.engine import Engine
from surogate_quantize.options import Options
from surogate_quantize.plan import PlannedTensor
from surogate_quantize.weight_reader import WeightReader

Run = Callable[[Tensor], Tensor]
"""Runs a block on hidden states."""


@dataclass(frozen=True)
class Streams:
    """The hidden states at one border between blocks: of the original model, and of the quantized one."""

    original: Activations
    quantized: Activations

    names: ClassVar[tuple[str, ...]] = ("original", "quantized")

    def sync(self) -> None:
        """Waits until the disk has both."""
        for stream in (self.original, self.quantized):
            stream.sync()

    def remove(self) -> None:
        """Removes both files."""
        for stream in (self.original, self.quantized):
            stream.close()
            stream.path.unlink()


@dataclass(frozen=True)
class SolvedBlock:
    """What was found for a block.

    Attributes:
        parts: of each weight, by module.
        errors: of each weight, by module: the relative error of its output on held-out text, with codes that are
            nearest and with those that were found.
        updates: of each weight, by module, where an adapter is asked for.
    """

    parts: dict[str, Parts]
    errors: dict[str, tuple[float, float]]
    updates: dict[str, Factors]


class BlockPass:
    """Solves the linears of blocks one after the other.

    Args:
        runner: runs the blocks.
        fmt: the format.
        tensors: the weights to be quantized, by their modules' full names.
        weights: reads them.
        engine: rounds them.
        options: how codes are chosen, and the rank of the adapter.
        folder: for activations that memory need not hold.
    """

    def __init__(
        self,
        runner: BlockRunner,
        options: Options,
        tensors: Mapping[str, PlannedTensor],
        weights: WeightReader,
        engine: Engine,
        folder: Path,
    ) -> None:
        """Runs nothing yet."""
        self._runner, self._options, self._tensors = runner, options, tensors
        self._format = options.format
        self._weights, self._engine, self._folder = weights, engine, folder

    def solve(self, index: int, before: Streams, after: Streams) -> SolvedBlock:
        """Solves a block's weights; writes the hidden states behind the block."""
        prefix = f"{self._runner.prefix}.{index}."
        with self._runner.block(index) as block:
            names = [name for name in self._tensors if name.startswith(prefix)]
            linears = {name: block.get_submodule(name.removeprefix(prefix)) for name in names}

            def run(hidden: Tensor) -> Tensor:
                return self._runner.run(index, block, hidden)

            order = stages(linears, lambda: run(before.original.read(0)))
            observed = self._observe([stage[0] for stage in order], linears, run, before, after)
            found = SolvedBlock({}, {}, {})
            for stage in order:
                original = observed.pop(stage[0])
                inputs = _Inputs(stage[0], linears, run, original, before.quantized)
                known = inputs.statistics()
                for name in stage:
                    self._solve(name, linears[name], known, inputs, found)
                original.close()
                original.path.unlink()
            for position, hidden in enumerate(before.quantized):
                after.quantized.write(position, run(hidden))
        return found

    def _observe(
        self, leaders: list[str], linears: Linears, run: Run, before: Streams, after: Streams
    ) -> dict[str, Activations]:
        """Runs the original block; keeps what the leaders of its stages are given, and what comes out."""
        kept: dict[str, Activations] = {}
        with inputs_of(linears, leaders) as latest:
            for position, hidden in enumerate(before.original):
                after.original.write(position, run(hidden))
                for leader in leaders:
                    if leader not in kept:
                        path = self._folder / f"{leader}.inputs"
                        kept[leader] = Activations(path, tuple(latest[leader].shape), before.original.count)
                    kept[leader].write(position, latest[leader])
        return kept

    def _solve(self, name: str, linear: nn.Module, known: Statistics, inputs: _Inputs, found: SolvedBlock) -> None:
        tensor = self._tensors[name]
        loaded = self._weights.load(Band(tensor, 0, tensor.info.shape[0]))
        group = self._weights.group_amax(tensor)
        search = self._options.codes == "search"
        rounded, _ = self._engine.quantize(self._format, loaded.source, loaded.amax, group, search=search)
        weight = torch.from_numpy(loaded.source.float32).to(known.order.device)
        self._weights.release(loaded)
        before = values = torch.from_numpy(self._format.dequantize(rounded, tensor.info.shape)).to(weight)
        found.parts[name] = rounded
        if self._options.codes == "calibrated":
            grid = make_grid(self._format, rounded, weight)
            solved = solve(weight, grid, known)
            values, found.parts[name] = solved.dequantized(grid), grid.parts(solved.values, solved.scales)
        found.errors[name] = (inputs.error(weight, before), inputs.error(weight, values))
        if self._options.adapter_init:
            found.updates[name] = factors(known.target(weight) - values, known.hessian, self._options.adapter_init)
        assert isinstance(linear, nn.Linear)
        linear.weight.data = values.to(linear.weight)


class _Inputs:
    """What a stage is given in both models, behind what is quantized of the second; the last batch is held out."""

    def __init__(self, leader: str, linears: Linears, run: Run, original: Activations, quantized: Activations) -> None:
        self._leader, self._linears, self._run = leader, linears, run
        self._original, self._quantized = original, quantized
        self._last: tuple[Tensor, Tensor] | None = None

    def statistics(self) -> Statistics:
        """The statistics of all batches but the last, which is kept for `error`."""
        sums: list[Tensor] = []
        tokens = 0
        for position in range(self._quantized.count):
            x, wanted = self._pair(position)
            if position == self._quantized.count - 1 and position:
                self._last = (x, wanted)
                break
            new = [(x.T @ x).double(), ((wanted - x).T @ x).double()]
            sums = [total + more for total, more in zip(sums, new, strict=True)] if sums else new
            tokens += len(x)
        return statistics(sums[0] / tokens, sums[1] / tokens)

    def error(self, weight: Tensor, values: Tensor) -> float:
        """||Q x - W x'|| / ||W x'|| over the held-out batch, x' being the original model's inputs."""
        x, wanted = self._last or self._pair(0)
        expected = wanted @ weight.T
        size = float(expected.norm())
        return float((x @ values.T - expected).norm()) / size if size else 0.0

    def _pair(self, position: int) -> tuple[Tensor, Tensor]:
        hidden = self._quantized.read(position)
        x = input_of(self._linears, self._leader, lambda: self._run(hidden)).flatten(0, -2).float()
        return x, self._original.read(position).flatten(0, -2).to(x)
