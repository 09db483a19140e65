"""The calibrated pass over one block: its linears are solved in the order in which they run."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from torch import Tensor

from surogate_load.block_runner import BlockRunner, NoBlocksError
from surogate_quantize.calibration.activations import Activations
from surogate_quantize.calibration.block_experts import BlockExperts, block_experts
from surogate_quantize.calibration.expert_pass import ExpertPass
from surogate_quantize.calibration.inputs import original_inputs
from surogate_quantize.calibration.observing import Linears, Watched, choices_of, stages
from surogate_quantize.calibration.originals import FoundInputs, KeptInputs, OriginalInputs
from surogate_quantize.calibration.streams import (
    ADAPTED,
    ORIGINAL,
    QUANTIZED,
    Follower,
    Run,
    Streams,
    kept_inputs,
    observed,
)
from surogate_quantize.calibration.weight_pass import SolvedBlock, WeightPass
from surogate_quantize.engine import Engine
from surogate_quantize.options import Options
from surogate_quantize.plan import PlannedTensor
from surogate_quantize.weight_reader import WeightReader


def streams_of(options: Options) -> tuple[str, ...]:
    """The hidden states that a pass carries along: only calibrated codes, and their adapter, follow the original.

    Nearest codes make up for no error of the layers before, and their adapter is the better for not doing so either.
    """
    if options.codes != "calibrated":
        return (ORIGINAL,)
    if options.calibration.adapter_joint:
        return (ORIGINAL, ADAPTED)
    return (ORIGINAL, QUANTIZED) if options.adapter_init is None else (ORIGINAL, QUANTIZED, ADAPTED)


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
        self._runner, self._options, self._tensors, self._folder = runner, options, tensors, folder
        self._weights = WeightPass(options, tensors, weights, engine, runner.device)
        self.streams = streams_of(options)

    def solve(self, index: int, before: Streams, after: Streams) -> SolvedBlock:
        """Solves a block's weights; writes the hidden states behind the block."""
        prefix = f"{self._runner.prefix}.{index}."
        with self._runner.block(index) as block:
            names = [name for name in self._tensors if name.startswith(prefix)]
            linears: Linears = {name: self._runner.module(name) for name in names}  # type: ignore[misc]
            experts = block_experts(block, linears)
            watched: Watched = {name: linear for name, linear in linears.items() if not (experts and name in experts)}
            if experts and self._options.codes == "calibrated":
                watched = {**watched, experts.name: experts.module}

            def run(hidden: Tensor) -> Tensor:
                return self._runner.run(index, block, hidden)

            order = stages(watched, lambda: run(before[ORIGINAL].read(0)))
            leaders = [stage[0] for stage in order]
            with choices_of(experts.module if experts else None) as choices:
                seen = self._originals(leaders, linears, watched, run, before[ORIGINAL], after[ORIGINAL])
            followers = {name: Follower(run, linears, watched, before[name]) for name in self.streams[1:]}
            found = SolvedBlock()
            for stage in order:
                original = seen.pop(stage[0])
                if experts and stage[0] == experts.name:
                    self._solve_experts(experts, followers, original, choices, found)
                else:
                    self._solve_stage(stage, followers, original, found)
                original.forget()
            later = experts.planned if experts and experts.name not in watched else frozenset()  # not calibrated
            if missed := next((name for name in names if name not in found.parts and name not in later), None):
                raise NoBlocksError(f"{self._runner.name}: {missed} isn't used by its block; leave it out with `skip`")
            for name, follower in followers.items():
                follower.advance(after[name])
        return found

    @property
    def _keeps_inputs(self) -> bool:
        return self._runner.device.type == "cpu"

    def _originals(
        self, leaders: list[str], linears: Linears, watched: Watched, run: Run, before: Activations, after: Activations
    ) -> dict[str, OriginalInputs]:
        """What the original gives to the leaders of stages; writes the hidden states behind it."""
        if self._keeps_inputs:
            return dict(observed(leaders, watched, run, before, after, self._folder))
        block = Follower(run, linears, watched, before)
        block.advance(after)
        return {leader: FoundInputs(partial(block.input, leader), before) for leader in leaders}

    def _solve_experts(
        self,
        experts: BlockExperts,
        followers: Mapping[str, Follower],
        original: OriginalInputs,
        choices: list[Tensor],
        found: SolvedBlock,
    ) -> None:
        """Their adapters are none: PEFT's for experts have another form."""
        leading, *others = followers.values()
        followed = leading.all_inputs(experts.name, self._folder / f"{experts.name}.followed")
        with ExitStack() as stack:
            stack.callback(followed.forget)
            if not isinstance(original, KeptInputs):  # they are read for many experts in turn
                batches = (original.read(position) for position in range(original.count))
                original = kept_inputs(self._folder / f"{experts.name}.inputs", batches, followed)
                stack.callback(original.forget)
            all_followers = [leading, *others]
            ExpertPass(experts, self._weights, all_followers, original, followed, choices, leading.rows, found).solve()

    def _solve_stage(
        self, stage: list[str], followers: dict[str, Follower], original: OriginalInputs, found: SolvedBlock
    ) -> None:
        rounded = {name: self._weights.rounded(name) for name in stage}
        values = {name: one.values for name, one in rounded.items()}
        if (follower := followers.get(QUANTIZED)) is not None:
            inputs = follower.inputs(stage[0], original)
            for name, one in rounded.items():
                values[name] = self._weights.calibrate(name, one, inputs, found)
                follower.take(name, values[name])
        if self._options.adapter_init is None:
            return
        follower = followers.get(ADAPTED)
        inputs = follower.inputs(stage[0], original) if follower else original_inputs(stage[0], original)
        for name, one in rounded.items():
            if self._options.calibration.adapter_joint:
                adapted = self._weights.calibrate_and_adapt(name, one, inputs, found)
            else:
                adapted = self._weights.adapt(name, one, values[name], inputs, found)
            if follower:
                follower.take(name, adapted)
