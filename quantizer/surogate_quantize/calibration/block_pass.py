"""The calibrated pass over one block: its linears are solved in the order in which they run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from surogate_formats.format import Parts
from surogate_load.block_runner import BlockRunner, NoBlocksError
from surogate_quantize.bands import Band
from surogate_quantize.calibration.activations import Activations
from surogate_quantize.calibration.adapter import Factors, factors
from surogate_quantize.calibration.grids import make_grid
from surogate_quantize.calibration.observing import Linears, stages
from surogate_quantize.calibration.solver import solve
from surogate_quantize.calibration.streams import ADAPTED, ORIGINAL, QUANTIZED, Follower, Inputs, Streams, observed
from surogate_quantize.engine import Engine
from surogate_quantize.options import Options
from surogate_quantize.plan import PlannedTensor
from surogate_quantize.weight_reader import WeightReader


@dataclass(frozen=True)
class SolvedBlock:
    """What was found for a block.

    Attributes:
        parts: of each weight, by module.
        errors: of each weight, by module: the relative error of its output on held-out text, with codes that are
            nearest, and with those that were found and the adapter.
        updates: of each weight, by module, where an adapter is asked for.
    """

    parts: dict[str, Parts]
    errors: dict[str, tuple[float, float]]
    updates: dict[str, Factors]


@dataclass(frozen=True)
class _Rounded:
    """A weight, float32 [N, K], its parts under rounding, and what these stand for."""

    weight: Tensor
    parts: Parts
    values: Tensor


class BlockPass:
    """Solves the linears of blocks one after the other.

    Args:
        runner: runs the blocks.
        options: how codes are chosen, and the rank of the adapter.
        tensors: the weights to be quantized, by their modules' full names.
        weights: reads them.
        engine: rounds them.
        folder: for activations that memory need not hold.

    Attributes:
        streams: names of those that the pass carries along.
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
        self._weights, self._engine, self._folder = weights, engine, folder
        wanted = {QUANTIZED: options.codes == "calibrated", ADAPTED: options.adapter_init is not None}
        self.streams = (ORIGINAL, *(name for name, is_wanted in wanted.items() if is_wanted))

    def solve(self, index: int, before: Streams, after: Streams) -> SolvedBlock:
        """Solves a block's weights; writes the hidden states behind the block."""
        prefix = f"{self._runner.prefix}.{index}."
        with self._runner.block(index) as block:
            names = [name for name in self._tensors if name.startswith(prefix)]
            linears: Linears = {name: block.get_submodule(name.removeprefix(prefix)) for name in names}  # type: ignore[misc]

            def run(hidden: Tensor) -> Tensor:
                return self._runner.run(index, block, hidden)

            order = stages(linears, lambda: run(before[ORIGINAL].read(0)))
            leaders = [stage[0] for stage in order]
            seen = observed(leaders, linears, run, before[ORIGINAL], after[ORIGINAL], self._folder)
            followers = {name: Follower(run, linears, before[name]) for name in self.streams[1:]}
            found = SolvedBlock({}, {}, {})
            for stage in order:
                original = seen.pop(stage[0])
                self._solve_stage(stage, followers, original, found)
                original.close()
                original.path.unlink()
            if missed := next((name for name in names if name not in found.parts), None):
                raise NoBlocksError(f"{self._runner.name}: {missed} isn't used by its block; leave it out with `skip`")
            for name, follower in followers.items():
                follower.advance(after[name])
        return found

    def _solve_stage(
        self, stage: list[str], followers: dict[str, Follower], original: Activations, found: SolvedBlock
    ) -> None:
        rounded = {name: self._rounded(name) for name in stage}
        quantized = {name: one.values for name, one in rounded.items()}
        if (follower := followers.get(QUANTIZED)) is not None:
            inputs = follower.inputs(stage[0], original)
            for name, one in rounded.items():
                quantized[name] = self._calibrate(name, one, inputs, found)
                follower.weights[name] = quantized[name].to(follower.weights[name].dtype)
        if (follower := followers.get(ADAPTED)) is not None:
            inputs = follower.inputs(stage[0], original)
            for name, one in rounded.items():
                found.parts.setdefault(name, one.parts)
                adapted = self._adapt(name, one, quantized[name], inputs, found)
                follower.weights[name] = adapted.to(follower.weights[name].dtype)

    def _rounded(self, name: str) -> _Rounded:
        tensor = self._tensors[name]
        loaded = self._weights.load(Band(tensor, 0, tensor.info.shape[0]))
        known = (loaded.amax, self._weights.group_amax(tensor))
        fmt, search = self._options.format, self._options.codes == "search"
        parts, _ = self._engine.quantize(fmt, loaded.source, *known, search=search)
        weight = torch.from_numpy(loaded.source.float32).to(self._runner.device)
        self._weights.release(loaded)
        return _Rounded(weight, parts, torch.from_numpy(fmt.dequantize(parts, tensor.info.shape)).to(weight))

    def _calibrate(self, name: str, one: _Rounded, inputs: Inputs, found: SolvedBlock) -> Tensor:
        grid = make_grid(self._options.format, one.parts, one.weight)
        target = inputs.target(one.weight) if grid.asymmetric else one.weight
        solved = solve(target, grid, inputs.known)
        values = solved.dequantized(grid)
        found.parts[name] = grid.parts(solved.values, solved.scales)
        found.errors[name] = (inputs.error(one.weight, one.values), inputs.error(one.weight, values))
        return values

    def _adapt(self, name: str, one: _Rounded, values: Tensor, inputs: Inputs, found: SolvedBlock) -> Tensor:
        rank = self._options.adapter_init
        assert rank is not None
        a, b = found.updates[name] = factors(inputs.target(one.weight) - values, inputs.known.hessian, rank)
        adapted = values + b @ a
        before = found.errors[name][0] if name in found.errors else inputs.error(one.weight, one.values)
        found.errors[name] = (before, inputs.error(one.weight, adapted))
        return adapted
