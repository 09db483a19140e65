"""One run from source to artifact: the Python function behind the command line."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from surogate_formats.checkpoint import Checkpoint
from surogate_formats.checkpoint.index import INDEX
from surogate_formats.errors import SurogateError
from surogate_formats.format import to_dict
from surogate_formats.manifest import MANIFEST_NAME, Manifest
from surogate_quantize.advice import Comparison, warnings_before
from surogate_quantize.devices import open_engine
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

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""What the name of a model on the Hub looks like."""

Watch = Callable[[Plan], Callable[[PlannedTensor], None]]
"""Told the plan before the first tensor; returns what is called after each."""


class HubSourceError(SurogateError):
    """MODEL names no directory, but could name a model on the Hub."""


def dry_run(
    model: str | Path, options: Options, out: str | Path | None = None, *, overwrite: bool = False
) -> tuple[Plan, list[str]]:
    """What `quantize` would do, and what the user should know about it: reads headers and config only.

    Args:
        model: directory of a Hugging Face checkpoint in safetensors.
        options: what to do.
        out: directory of the artifact, checked as `quantize` checks it; None checks none.
        overwrite: an artifact may stand in `out`.

    Raises:
        OutputExistsError, OutputInSourceError: see `surogate_quantize.output.check_output`.
        CheckpointError: the source is not what it claims to be.
        SurogateError: see `surogate_quantize.plan.make_plan`.
    """
    with open_source(model) as source:
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
    watch: Watch | None = None,
) -> RunSummary:
    """Quantizes a checkpoint into an artifact.

    Args:
        model: directory of a Hugging Face checkpoint in safetensors.
        out: directory of the artifact; must not exist, or be empty.
        options: what to do.
        device: `cpu`, `cuda`, or `auto`: `cuda` where CuPy and a GPU can do it, else `cpu`. It changes no byte.
        workers: threads; None takes one a CPU.
        overwrite: replace an artifact that stands in `out`, once the new one is complete.
        watch: for progress bars.

    Raises:
        SurogateError: see the classes of `surogate_quantize` and `surogate_formats`; nothing is left in `out` then.
    """
    started = time.perf_counter()
    source_path, out_path = Path(model), Path(out)
    with ExitStack() as stack:
        source = stack.enter_context(open_source(model))
        check_output(out_path, source_path, overwrite=overwrite)
        sidecars = find_sidecars(source_path)
        made = make_plan(source, options)
        engine = stack.enter_context(open_engine(device, made.options.format, workers))
        comparison = Comparison(engine, made.options)
        needed = sum(tensor.stored_bytes for tensor in made.tensors) + HEADER_ROOM
        names, configs = shard_names(made.shards), quantized_configs(dict(source.config), made)
        with staged(out_path, needed) as staging:
            progress = watch(made) if watch else lambda tensor: None
            results = run_stream(source, made, engine, [staging / name for name in names], progress)
            carried = carry_over(source_path, sidecars, staging)
            own = {**configs, **({INDEX: shard_index(made, names)} if len(names) > 1 else {})}
            for name, data in own.items():
                write_synced(staging / name, data)
            hashes = carried | {name: hashlib.sha256(data).hexdigest() for name, data in own.items()}
            manifest = make_manifest(source, made, results, hashes)
            advice = [*warnings_before(source, made), *comparison.advice(source, made)]
            write_synced(staging / MANIFEST_NAME, manifest.to_json().encode())
            sync_directory(staging)
    seconds = time.perf_counter() - started
    told = {"out": str(out), "device": engine.device}
    return summarize_run(made, results, **told, seconds=seconds, carried=carried_names(sidecars), advice=advice)


def open_source(model: str | Path) -> Checkpoint:
    """Opens a local checkpoint.

    Raises:
        HubSourceError: the name is one of a model on the Hub, which this version doesn't download.
        CheckpointError: the directory is no checkpoint.
    """
    if not Path(model).exists() and HUB_ID.fullmatch(str(model)):
        raise HubSourceError(
            f"{model}: no such directory; if it is a model on the Hub, download it first: "
            f"hf download {model} --local-dir {Path(model).name}"
        )
    return Checkpoint.open(model)


def make_manifest(
    source: Checkpoint, made: Plan, results: Mapping[str, Result], sidecars: Mapping[str, str]
) -> Manifest:
    """Everything that determines the artifact's bytes, and the proof of them."""
    name, revision = source_identity(source.directory)
    return Manifest(
        tool_version=VERSION,
        source=name,
        revision=revision,
        files=source.files,
        format=to_dict(made.options.format),
        layout=made.options.layout.name,
        options=made.options.recorded(),
        recipe=asdict(made.options.recipe),
        lora=asdict(made.options.lora),
        sidecars=dict(sorted(sidecars.items())),
        tensors={tensor.info.name: results[tensor.info.name].record for tensor in made.tensors},
    )


def source_identity(directory: Path) -> tuple[str, str | None]:
    """Name and revision of a source: from the path of a Hub cache's snapshot, else the directory's name alone."""
    path = directory.absolute()
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/"), path.name
    return path.resolve().name, None
