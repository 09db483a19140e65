"""What stands beside the shards: configuration, index, the source's other files, an adapter, and the manifest last."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from surogate_formats.checkpoint.index import INDEX
from surogate_formats.format import to_dict
from surogate_formats.manifest import MANIFEST_NAME, Manifest
from surogate_quantize.job import Job
from surogate_quantize.results import Results
from surogate_quantize.sidecars import carry_over, quantized_configs, shard_index, shard_names
from surogate_quantize.syncing import write_synced
from surogate_quantize.version import VERSION

if TYPE_CHECKING:
    from surogate_quantize.calibration.store import SolvedBlocks


def write_rest(job: Job, files: Path, results: Results, solved: SolvedBlocks | None) -> None:
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


def make_manifest(job: Job, results: Results, sidecars: Mapping[str, str]) -> Manifest:
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
