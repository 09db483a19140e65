"""What all ranks of a run agree on before any of them writes: the source, the plan, and what is done to its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from surogate_formats.checkpoint import SourceFile
from surogate_quantize.engine import Engine
from surogate_quantize.hub.opening import OpenedSource
from surogate_quantize.plan import Plan
from surogate_quantize.ranks.errors import DifferentPlansError
from surogate_quantize.ranks.team import Team
from surogate_quantize.run_identity import Identity, difference

if TYPE_CHECKING:
    from surogate_quantize.calibration.calibrate import Calibration

ROOM_EACH = 4 << 10
"""Bytes of free disk asked for beyond each tensor: for its places in header, index and manifest."""


@dataclass(frozen=True)
class Job:
    """What one run knows before it writes.

    Attributes:
        opened: the source.
        sidecars: names of its files that are carried over.
        plan: what becomes of each tensor.
        engine: quantizes weights.
        identity: what another run must share to go on with this one.
        calibration: the pass on text, if codes or an adapter ask for one.
        settings: what the manifest records of it.
        files: what identifies the source's shards.
        out: the artifact's name.
    """

    opened: OpenedSource
    sidecars: tuple[str, ...]
    plan: Plan
    engine: Engine
    identity: Identity
    calibration: Calibration | None
    settings: Mapping[str, Any]
    files: tuple[SourceFile, ...]
    out: str


def with_calibration(made: Plan, calibration: Calibration | None) -> tuple[Plan, Mapping[str, Any]]:
    """The plan with what its calibrated pass is told to be, and what of it the manifest records."""
    if calibration is None:
        return made, {}
    settings = calibration.recorded()
    return replace(made, calibration={**settings, "estimated_seconds": round(calibration.seconds)}), settings


def room_beside(job: Job) -> int:
    """Bytes of disk that a run needs beside the tensors that it writes."""
    sidecars = sum((job.opened.checkpoint.directory / name).stat().st_size for name in job.sidecars)
    calibrating = job.calibration.room + job.opened.whole_room if job.calibration else job.opened.room
    return sidecars + ROOM_EACH * len(job.plan.tensors) + calibrating


def agreed(team: Team, prepare: Callable[[], Job]) -> Job:
    """What `prepare` returns here, once it has returned the same on every rank.

    Raises:
        DifferentPlansError: ranks were asked for different things, or see different sources.
    """
    here: list[Job] = []

    def step() -> Identity:
        here.append(prepare())
        return here[0].identity

    for rank, identity in enumerate(team.together(step)):
        if (differs := difference(identity, here[0].identity)) is not None:
            raise DifferentPlansError(f"ranks {rank} and {team.rank} differ: {differs}; give all the same command")
    return here[0]
