"""One run from source to artifact: the Python function behind the command line."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surogate_quantize.advice import Comparison, starved_experts, warnings_before
from surogate_quantize.bands import DEFAULT_MAX_MEMORY, band_bytes, check_budget
from surogate_quantize.beside_shards import write_rest
from surogate_quantize.calibration.preparing import prepare_calibration
from surogate_quantize.devices import open_engine
from surogate_quantize.engine import available_cpus
from surogate_quantize.hub.opening import open_source
from surogate_quantize.job import Job, agreed, room_beside, with_calibration
from surogate_quantize.options import Options, parse_size
from surogate_quantize.output import check_output
from surogate_quantize.plan import Plan, PlannedTensor, make_plan
from surogate_quantize.ranks.environment import local_share
from surogate_quantize.ranks.sharing import staged_together
from surogate_quantize.ranks.team import Alone, Team, joined
from surogate_quantize.report import codes_line
from surogate_quantize.results import Results
from surogate_quantize.run_identity import run_identity
from surogate_quantize.sidecars import (
    carried_names,
    find_sidecars,
)
from surogate_quantize.staging import Staging
from surogate_quantize.stream import Solved
from surogate_quantize.summary import RunSummary, summarize_plan, summarize_run
from surogate_quantize.work import Work

if TYPE_CHECKING:
    from surogate_quantize.calibration.store import SolvedBlocks

Watch = Callable[[Plan, Sequence[PlannedTensor]], Callable[[PlannedTensor], None]]
"""Told the plan, and those of its tensors that will be worked on; returns what is called after each of them."""


def dry_run(
    model: str | Path,
    options: Options,
    out: str | Path | None = None,
    *,
    device: str = "auto",
    workers: int | None = None,
    max_memory: int | str = DEFAULT_MAX_MEMORY,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> tuple[Plan, list[str]]:
    """What `quantize` would do, and what the user should know about it: reads headers and config only.

    Where the model is to be run on text, it is built without its weights, the text is read, and a product is timed for
    the plan's estimate.

    Args:
        model: directory of a Hugging Face checkpoint in safetensors, or a name on the Hub such as `org/model`.
        options: what to do.
        out: directory of the artifact, checked as `quantize` checks it; None checks none.
        device: see `quantize`; without effect but on a calibrated pass.
        workers: see `quantize`.
        max_memory: see `quantize`.
        overwrite: an artifact may stand in `out`.
        revision: see `quantize`.
        token: see `quantize`.

    Raises:
        OutputExistsError, OutputInSourceError: see `surogate_quantize.output.check_output`.
        CheckpointError: the source is not what it claims to be.
        SurogateError: see `surogate_quantize.plan.make_plan`, and for a calibrated pass
            `surogate_quantize.calibration.calibrate.Calibration`.
    """
    with open_source(model, None, revision=revision, token=token, keep_source=False) as opened:
        source = opened.checkpoint
        if out is not None:
            check_output(Path(out), source.directory, overwrite=overwrite)
        find_sidecars(source.directory)
        made = make_plan(source, options)
        budget = parse_size(max_memory, "max_memory")
        check_budget(made, band_bytes(budget), budget)
        settings: Mapping[str, Any] = {}
        if options.calibrates:
            with open_engine(device, made.options.format, workers) as engine:
                calibration = prepare_calibration(source, made, engine, 1, budget, reading=False)
            made, settings = with_calibration(made, calibration)
        if out is not None:
            Staging(Path(out), made.shards).check(run_identity(opened, made, settings), overwrite=overwrite)
        return made, warnings_before(source, made)


def quantize(
    model: str | Path,
    out: str | Path,
    options: Options,
    *,
    device: str = "auto",
    workers: int | None = None,
    max_memory: int | str = DEFAULT_MAX_MEMORY,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | None = None,
    keep_source: bool = False,
    hash_source: bool = False,
    ranks: bool = False,
    watch: Watch | None = None,
    told: Callable[[str], None] | None = None,
) -> RunSummary:
    """Quantizes a checkpoint into an artifact.

    A model on the Hub comes shard by shard: each is downloaded beside `out`, held against the Hub's SHA-256, and
    deleted once its tensors are quantized. Shards in the Hub's cache are used where they stand.

    Args:
        model: directory of a Hugging Face checkpoint in safetensors, or a name on the Hub such as `org/model`; a
            directory that exists wins.
        out: directory of the artifact; must not exist, or be empty.
        options: what to do.
        device: `cpu`, `cuda`, or `auto`: `cuda` where CuPy and a GPU can do it, else `cpu`. It changes no byte.
        workers: threads; None takes one a CPU.
        max_memory: bytes, or a text such as `2GiB`, that the process should stay inside; it changes no byte.
        overwrite: replace an artifact that stands in `out`, once the new one is complete.
        revision: branch, tag or commit on the Hub; None takes its default branch.
        token: for the Hub; None takes HF_TOKEN, else the stored login.
        keep_source: leave downloaded shards in the Hub's cache.
        hash_source: record the SHA-256 of all bytes of every source file in the manifest: of a local checkpoint each is
            read once more, of one on the Hub they are the Hub's.
        ranks: take part in the run of the processes that torchrun has started, all of which call this function; the
            bytes are those that one process makes.
        watch: for progress bars.
        told: what a calibrated pass is doing, a line at a time.

    Raises:
        SurogateError: see the classes of `surogate_quantize` and `surogate_formats`. Nothing is left in `out` then but
            shards that were finished, with which the same call goes on.
    """
    started = time.perf_counter()
    out_path, budget = Path(out), parse_size(max_memory, "max_memory")
    limit = band_bytes(budget)
    with ExitStack() as stack:
        team: Team = stack.enter_context(joined()) if ranks else Alone()
        threads = workers or local_share(available_cpus())

        def prepare() -> Job:
            opened = stack.enter_context(
                open_source(model, out_path, revision=revision, token=token, keep_source=keep_source)
            )
            if team.rank == 0:
                check_output(out_path, opened.checkpoint.directory, overwrite=overwrite)
            sidecars = find_sidecars(opened.checkpoint.directory)
            made = make_plan(opened.checkpoint, options)
            check_budget(made, limit, budget)
            engine = stack.enter_context(open_engine(device, made.options.format, threads))
            calibration = prepare_calibration(opened.checkpoint, made, engine, team.size, budget)
            made, settings = with_calibration(made, calibration)
            files = opened.checkpoint.hash_files() if hash_source and team.rank == 0 else opened.checkpoint.files
            identity = run_identity(opened, made, settings)
            return Job(opened, sidecars, made, engine, identity, calibration, settings, files, out_path.name)

        job = agreed(team, prepare)
        with staged_together(team, out_path, job.identity, job.plan.shards, overwrite=overwrite) as staging:
            work = Work.found(team, job.plan, staging, threads)
            team.together(lambda: staging.check_room(work.bytes_to_write + room_beside(job)))
            solved = _solved(job, staging.calibration, limit, told or _silent)
            results, advice = _stream(job, work, limit, watch, solved)
            team.together(lambda: write_rest(job, staging.files, results, solved) if team.rank == 0 else None)
    return summarize_run(
        job.plan,
        results,
        out=str(out),
        reused_shards=work.reused_shards,
        device=job.engine.device,
        seconds=time.perf_counter() - started,
        carried=carried_names(job.sidecars),
        advice=[*advice, *starved_experts(solved.starved if solved else {})],
    )


def _solved(job: Job, folder: Path, limit: int, told: Callable[[str], None]) -> SolvedBlocks | None:
    if job.calibration is None:
        return None
    told(f"codes: {codes_line(summarize_plan(job.plan).codes)}")
    return job.calibration.solve(folder, job.engine, limit, told)


def _silent(text: str) -> None:
    pass


def _stream(job: Job, work: Work, limit: int, watch: Watch | None, solved: Solved | None) -> tuple[Results, list[str]]:
    """Makes the shards; returns what became of all tensors, and advice."""
    opened, plan, source = job.opened, job.plan, job.opened.checkpoint
    opened.expect(work.own)
    progress = watch(plan, work.own) if watch else lambda tensor: None

    def settled(tensor: PlannedTensor) -> None:
        opened.settled(tensor)
        progress(tensor)
        work.team.pulse()

    # Before the stream, which deletes what it has read of a model on the Hub.
    comparison = Comparison(job.engine, plan.options).advice(source, work.own, limit) if work.team.rank == 0 else []
    results = work.measured(source, job.engine, limit).run(source, job.engine, limit, settled, solved)
    return results, [*warnings_before(source, plan), *comparison]
