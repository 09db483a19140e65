"""The shards of a run that are still to be made, by which rank, and those that an earlier run has finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from surogate_formats.checkpoint import Checkpoint
from surogate_quantize.bands import enough_memory
from surogate_quantize.engine import Engine
from surogate_quantize.output_shards import OutputShards, finished_shards
from surogate_quantize.plan import Plan, PlannedTensor
from surogate_quantize.ranks.team import Team
from surogate_quantize.results import Results
from surogate_quantize.staging import Staging
from surogate_quantize.stream import Progress, Solved, run_stream
from surogate_quantize.weight_reader import WeightReader


@dataclass(frozen=True)
class Work:
    """What is left to do of a plan.

    Attributes:
        team: who does it.
        plan: the plan.
        shards: where it goes.
        todo: indices of the shards that each rank is to make.
        reused: what became of the tensors in the others.
        amax: largest magnitudes that are known.
    """

    team: Team
    plan: Plan
    shards: OutputShards
    todo: tuple[tuple[int, ...], ...]
    reused: Results
    amax: Mapping[str, np.float32]

    @classmethod
    def found(cls, team: Team, plan: Plan, staging: Staging, workers: int) -> Work:
        """Looks for what an earlier run has finished, holds its bytes against their hashes, and divides the rest."""
        shards = OutputShards(plan, staging.files, staging.records)
        some = range(team.rank, plan.shards, team.size)
        finished = {
            index: done
            for found in team.together(lambda: finished_shards(shards, some, workers))
            for index, done in found.items()
        }
        reused = {name: result for results, _ in finished.values() for name, result in results.items()}
        amax = {name: np.float32(value) for _, known in finished.values() for name, value in known.items()}
        sizes = [sum(tensor.info.nbytes for tensor in tensors) for tensors in shards.tensors]
        left = [index for index in range(plan.shards) if index not in finished]
        return cls(team, plan, shards, divide(left, sizes, team.size), reused, amax)

    @property
    def own(self) -> list[PlannedTensor]:
        """The tensors that this rank is to make."""
        return [tensor for index in self.todo[self.team.rank] for tensor in self.shards.tensors[index]]

    @property
    def bytes_to_write(self) -> int:
        """Payload of the shards that all ranks are to make."""
        return sum(t.stored_bytes for shards in self.todo for index in shards for t in self.shards.tensors[index])

    @property
    def reused_shards(self) -> int:
        """How many shards are finished already."""
        return self.plan.shards - sum(map(len, self.todo))

    def measured(self, source: Checkpoint, engine: Engine, limit: int) -> Work:
        """The same with the largest magnitudes of all fused groups that stand on several ranks."""
        if self.team.size == 1 or not self.plan.options.format.shares_amax:
            return self
        reader = WeightReader(source, self.plan, engine, limit, self.amax)
        own = {tensor.info.name for tensor in self.own}
        torn = [tensor for tensor in self.own if any(n not in own and n not in self.amax for n in tensor.group)]

        def measure() -> dict[str, np.float32]:
            with enough_memory():
                return {tensor.info.name: reader.measure(tensor) for tensor in torn}

        amax = dict(self.amax)
        for found in self.team.together(measure):
            amax.update(found)
        return replace(self, amax=amax)

    def run(
        self, source: Checkpoint, engine: Engine, limit: int, progress: Progress, solved: Solved | None = None
    ) -> Results:
        """Makes this rank's shards while others make theirs; returns what became of every tensor, in the plan's order.

        Raises:
            SurogateError: see `run_stream` and `Team.together`.
        """
        which = self.todo[self.team.rank]

        def step() -> Results:
            with enough_memory():
                return run_stream(
                    source,
                    self.plan,
                    engine,
                    self.shards,
                    which,
                    limit=limit,
                    amax=self.amax,
                    progress=progress,
                    solved=solved,
                )

        done = dict(self.reused)
        for results in self.team.together(step):
            done.update(results)
        return {tensor.info.name: done[tensor.info.name] for tensor in self.plan.tensors}


def divide(indices: Sequence[int], sizes: Sequence[int], parts: int) -> tuple[tuple[int, ...], ...]:
    """Indices in `parts` runs of about the same size; neighbours stay together, as they share source files."""
    total = sum(sizes[index] for index in indices)
    divided: list[list[int]] = [[] for _ in range(parts)]
    before = 0
    for index in indices:
        middle = before + sizes[index] / 2
        divided[min(int(middle * parts / max(total, 1)), parts - 1)].append(index)
        before += sizes[index]
    return tuple(map(tuple, divided))
