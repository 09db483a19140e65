"""One run from source to artifact: the Python function behind the command line."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surogate_formats.checkpoint import SourceFile
from surogate_formats.checkpoint.index import INDEX
from surogate_formats.format import to_dict
from surogate_formats.manifest import MANIFEST_NAME, Manifest
from surogate_quantize.advice import Comparison, warnings_before
from surogate_quantize.bands import DEFAULT_MAX_MEMORY, band_bytes, check_budget
from surogate_quantize.calibration.preparing import prepare_calibration
from surogate_quantize.devices import open_engine
from surogate_quantize.engine import Engine, available_cpus
from surogate_quantize.hub.opening import OpenedSource, open_source
from surogate_quantize.options import Options, parse_size
from surogate_quantize.output import check_output
from surogate_quantize.plan import Plan, PlannedTensor, make_plan
from surogate_quantize.ranks.environment import local_share
from surogate_quantize.ranks.errors import DifferentPlansError
from surogate_quantize.ranks.sharing import staged_together
from surogate_quantize.ranks.team import Alone, Team, joined
from surogate_quantize.report import codes_line
from surogate_quantize.results import Results
from surogate_quantize.run_identity import Identity, difference, run_identity
from surogate_quantize.sidecars import (
    carried_names,
    carry_over,
    find_sidecars,
    quantized_configs,
    shard_index,
    shard_names,
)
from surogate_quantize.staging import Staging
from surogate_quantize.stream import Solved
from surogate_quantize.summary import RunSummary, summarize_plan, summarize_run
from surogate_quantize.syncing import write_synced
from surogate_quantize.version import VERSION
from surogate_quantize.work import Work

if TYPE_CHECKING:
    from surogate_quantize.calibration.calibrate import Calibration
    from surogate_quantize.calibration.store import SolvedBlocks

ROOM_EACH = 4 << 10
"""Bytes of free disk asked for beyond each tensor: for its places in header, index and manifest."""

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
            made, settings = _with_calibration(made, calibration)
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

        def prepare() -> _Prepared:
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
            made, settings = _with_calibration(made, calibration)
            files = opened.checkpoint.hash_files() if hash_source and team.rank == 0 else opened.checkpoint.files
            identity = run_identity(opened, made, settings)
            return _Prepared(opened, sidecars, made, engine, identity, calibration, settings, files, out_path.name)

        job = prepared(team, prepare)
        with staged_together(team, out_path, job.identity, job.plan.shards, overwrite=overwrite) as staging:
            work = Work.found(team, job.plan, staging, threads)
            team.together(lambda: staging.check_room(work.bytes_to_write + _room_beside(job)))
            solved = _solved(job, staging.calibration, limit, told or _silent)
            results, advice = _stream(job, work, limit, watch, solved)
            team.together(lambda: _write_rest(job, staging.files, results, solved) if team.rank == 0 else None)
    return summarize_run(
        job.plan,
        results,
        out=str(out),
        reused_shards=work.reused_shards,
        device=job.engine.device,
        seconds=time.perf_counter() - started,
        carried=carried_names(job.sidecars),
        advice=advice,
    )


@dataclass(frozen=True)
class _Prepared:
    """What a run knows before it writes."""

    opened: OpenedSource
    sidecars: tuple[str, ...]
    plan: Plan
    engine: Engine
    identity: Identity
    calibration: Calibration | None
    settings: Mapping[str, Any]
    files: tuple[SourceFile, ...]
    out: str


def _with_calibration(made: Plan, calibration: Calibration | None) -> tuple[Plan, Mapping[str, Any]]:
    """The plan with what its calibrated pass is told to be, and what of it the manifest records."""
    if calibration is None:
        return made, {}
    settings = calibration.recorded()
    return replace(made, calibration={**settings, "estimated_seconds": round(calibration.seconds)}), settings


def _solved(job: _Prepared, folder: Path, limit: int, told: Callable[[str], None]) -> SolvedBlocks | None:
    if job.calibration is None:
        return None
    told(f"codes: {codes_line(summarize_plan(job.plan).codes)}")
    return job.calibration.solve(folder, job.engine, limit, told)


def _room_beside(job: _Prepared) -> int:
    """Bytes of disk that a run needs beside the tensors that it writes."""
    sidecars = sum((job.opened.checkpoint.directory / name).stat().st_size for name in job.sidecars)
    calibrating = job.calibration.room + job.opened.whole_room if job.calibration else job.opened.room
    return sidecars + ROOM_EACH * len(job.plan.tensors) + calibrating


def prepared(team: Team, prepare: Callable[[], _Prepared]) -> _Prepared:
    """What `prepare` returns here, once it has returned the same on every rank.

    Raises:
        DifferentPlansError: ranks were asked for different things, or see different sources.
    """
    here: list[_Prepared] = []

    def step() -> Identity:
        here.append(prepare())
        return here[0].identity

    for rank, identity in enumerate(team.together(step)):
        if (differs := difference(identity, here[0].identity)) is not None:
            raise DifferentPlansError(f"ranks {rank} and {team.rank} differ: {differs}; give all the same command")
    return here[0]


def _silent(text: str) -> None:
    pass


def _stream(
    job: _Prepared, work: Work, limit: int, watch: Watch | None, solved: Solved | None
) -> tuple[Results, list[str]]:
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


def _write_rest(job: _Prepared, files: Path, results: Results, solved: SolvedBlocks | None) -> None:
    """Writes everything beside the shards, the manifest last."""
    job.opened.checkpoint.check_unchanged()
    hashes = carry_over(job.opened.checkpoint.directory, job.sidecars, files)
    if job.calibration and solved:
        hashes.update(job.calibration.write_adapter(solved, files, job.out))
    names = shard_names(job.plan.shards)
    own = quantized_configs(dict(job.opened.checkpoint.config), job.plan)
    if len(names) > 1:
        own[INDEX] = shard_index(job.plan, names)
    for name, data in own.items():
        write_synced(files / name, data)
        hashes[name] = hashlib.sha256(data).hexdigest()
    manifest = make_manifest(job, results, hashes)
    write_synced(files / MANIFEST_NAME, manifest.to_json().encode())


def make_manifest(job: _Prepared, results: Results, sidecars: Mapping[str, str]) -> Manifest:
    """Everything that determines the artifact's bytes, and the proof of them."""
    opened, options = job.opened, job.plan.options
    return Manifest(
        tool_version=VERSION,
        source=opened.name,
        revision=opened.revision,
        files=job.files,
        format=to_dict(options.format),
        layout=options.layout.name,
        options={**options.recorded(), **job.settings},
        recipe=asdict(options.recipe),
        lora=asdict(options.lora),
        sidecars=dict(sorted(sidecars.items())),
        tensors={tensor.info.name: results[tensor.info.name].record for tensor in job.plan.tensors},
    )
