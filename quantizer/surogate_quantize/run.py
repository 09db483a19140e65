"""One run from source to artifact: the Python function behind the command line."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from surogate_formats.checkpoint.index import INDEX
from surogate_formats.format import to_dict
from surogate_formats.manifest import MANIFEST_NAME, Manifest
from surogate_quantize.advice import Comparison, warnings_before
from surogate_quantize.devices import open_engine
from surogate_quantize.hub.opening import OpenedSource, open_source
from surogate_quantize.options import Options
from surogate_quantize.output import check_output, staged
from surogate_quantize.plan import Plan, PlannedTensor, make_plan
from surogate_quantize.sidecars import (
    carried_names,
    carry_over,
    find_sidecars,
    quantized_configs,
    shard_index,
    shard_names,
)
from surogate_quantize.stream import Result, run_stream
from surogate_quantize.summary import RunSummary, summarize_run
from surogate_quantize.syncing import sync_directory, write_synced
from surogate_quantize.version import VERSION

HEADER_ROOM = 64 << 20
"""Bytes of free disk asked for beyond the tensors: headers, manifest, tokenizer."""

Watch = Callable[[Plan], Callable[[PlannedTensor], None]]
"""Told the plan before the first tensor; returns what is called after each."""


def dry_run(
    model: str | Path,
    options: Options,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> tuple[Plan, list[str]]:
    """What `quantize` would do, and what the user should know about it: reads headers and config only.

    Args:
        model: directory of a Hugging Face checkpoint in safetensors, or a name on the Hub such as `org/model`.
        options: what to do.
        out: directory of the artifact, checked as `quantize` checks it; None checks none.
        overwrite: an artifact may stand in `out`.
        revision: see `quantize`.
        token: see `quantize`.

    Raises:
        OutputExistsError, OutputInSourceError: see `surogate_quantize.output.check_output`.
        CheckpointError: the source is not what it claims to be.
        SurogateError: see `surogate_quantize.plan.make_plan`.
    """
    with open_source(model, None, revision=revision, token=token, keep_source=False) as opened:
        source = opened.checkpoint
        if out is not None:
            check_output(Path(out), source.directory, overwrite=overwrite)
        find_sidecars(source.directory)
        made = make_plan(source, options)
        return made, warnings_before(source, made)


def quantize(
    model: str | Path,
    out: str | Path,
    options: Options,
    *,
    device: str = "auto",
    workers: int | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | None = None,
    keep_source: bool = False,
    watch: Watch | None = None,
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
        overwrite: replace an artifact that stands in `out`, once the new one is complete.
        revision: branch, tag or commit on the Hub; None takes its default branch.
        token: for the Hub; None takes HF_TOKEN, else the stored login.
        keep_source: leave downloaded shards in the Hub's cache.
        watch: for progress bars.

    Raises:
        SurogateError: see the classes of `surogate_quantize` and `surogate_formats`; nothing is left in `out` then.
    """
    started = time.perf_counter()
    out_path = Path(out)
    with ExitStack() as stack:
        opened = stack.enter_context(
            open_source(model, out_path, revision=revision, token=token, keep_source=keep_source)
        )
        source = opened.checkpoint
        check_output(out_path, source.directory, overwrite=overwrite)
        sidecars = find_sidecars(source.directory)
        made = make_plan(source, options)
        engine = stack.enter_context(open_engine(device, made.options.format, workers))
        comparison = Comparison(engine, made.options)
        needed = sum(tensor.stored_bytes for tensor in made.tensors) + HEADER_ROOM + opened.room
        names, configs = shard_names(made.shards), quantized_configs(dict(source.config), made)
        with staged(out_path, needed) as staging:
            # Before the stream, which deletes what it has read of a model on the Hub.
            advice = [*warnings_before(source, made), *comparison.advice(source, made)]
            progress = _telling(opened, watch(made) if watch else lambda tensor: None)
            results = run_stream(source, made, engine, [staging / name for name in names], progress)
            carried = carry_over(source.directory, sidecars, staging)
            own = {**configs, **({INDEX: shard_index(made, names)} if len(names) > 1 else {})}
            for name, data in own.items():
                write_synced(staging / name, data)
            hashes = carried | {name: hashlib.sha256(data).hexdigest() for name, data in own.items()}
            manifest = make_manifest(opened, made, results, hashes)
            write_synced(staging / MANIFEST_NAME, manifest.to_json().encode())
            sync_directory(staging)
    seconds = time.perf_counter() - started
    told = {"out": str(out), "device": engine.device}
    return summarize_run(made, results, **told, seconds=seconds, carried=carried_names(sidecars), advice=advice)


def _telling(opened: OpenedSource, progress: Callable[[PlannedTensor], None]) -> Callable[[PlannedTensor], None]:
    def settled(tensor: PlannedTensor) -> None:
        opened.settled(tensor)
        progress(tensor)

    return settled


def make_manifest(
    opened: OpenedSource, made: Plan, results: Mapping[str, Result], sidecars: Mapping[str, str]
) -> Manifest:
    """Everything that determines the artifact's bytes, and the proof of them."""
    return Manifest(
        tool_version=VERSION,
        source=opened.name,
        revision=opened.revision,
        files=opened.checkpoint.files,
        format=to_dict(made.options.format),
        layout=made.options.layout.name,
        options=made.options.recorded(),
        recipe=asdict(made.options.recipe),
        lora=asdict(made.options.lora),
        sidecars=dict(sorted(sidecars.items())),
        tensors={tensor.info.name: results[tensor.info.name].record for tensor in made.tensors},
    )
