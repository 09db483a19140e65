"""The shards of a run: each is written, synced, named and recorded, so that a rerun can take it as it is."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from surogate_formats.checkpoint.files import open_regular, read_at
from surogate_formats.errors import CheckpointError
from surogate_formats.layouts import StoredTensor
from surogate_quantize.plan import Plan, PlannedTensor
from surogate_quantize.results import Results, from_json, to_json
from surogate_quantize.shard import ShardWriter, shard_header
from surogate_quantize.sidecars import shard_names
from surogate_quantize.syncing import replace_synced, write_synced

PART = ".part"
"""Ending of a shard's name while it is written."""

PIECE = 4 << 20
"""Bytes of a shard that are in memory at a time while it is verified."""


class OutputShards:
    """The shards of a plan in a staging folder; a context manager that closes their files.

    Args:
        plan: the plan.
        files: folder of the shards.
        records: folder of what became of the tensors in each finished shard.
    """

    def __init__(self, plan: Plan, files: Path, records: Path) -> None:
        """Opens nothing yet."""
        self.names = shard_names(plan.shards)
        self.tensors: list[list[PlannedTensor]] = [[] for _ in self.names]
        for tensor in plan.tensors:
            self.tensors[tensor.shard].append(tensor)
        self._files, self._records = files, records
        self._open: dict[int, ShardWriter] = {}

    def __enter__(self) -> OutputShards:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes what is open."""
        for shard in self._open.values():
            shard.__exit__(None, None, None)

    def writer(self, index: int) -> ShardWriter:
        """Where the tensors of a shard are written to."""
        if index not in self._open:
            path = self._files / (self.names[index] + PART)
            path.unlink(missing_ok=True)
            self._open[index] = ShardWriter(path, self._contents(index))
        return self._open[index]

    def finish(self, index: int, results: Results, amax: Mapping[str, Any]) -> None:
        """Gives a shard, whose tensors are all written, its name, and records what became of them.

        Args:
            index: which shard.
            results: what became of its tensors.
            amax: the largest magnitudes that are known, so that a rerun need not look for those of a fused group.
        """
        shard = self.writer(index)
        shard.sync()
        self._open.pop(index).__exit__(None, None, None)  # before its name changes: Windows renames no open file
        replace_synced(shard.path, self._files / self.names[index])
        groups = {name: float(amax[name]) for tensor in self.tensors[index] for name in tensor.group if name in amax}
        record = {"amax": groups, "tensors": {name: to_json(result) for name, result in results.items()}}
        path = self._record(index)
        part = path.with_suffix(PART)
        part.unlink(missing_ok=True)
        write_synced(part, json.dumps(record).encode())
        replace_synced(part, path)

    def finished(self, index: int) -> tuple[Results, dict[str, float]] | None:
        """What became of the tensors of a shard that an earlier run has finished, and largest magnitudes that it knew.

        None where there is no such shard, or where its bytes are not those that were written.
        """
        try:
            record = json.loads(self._record(index).read_bytes())
            results = {
                tensor.info.name: from_json(record["tensors"][tensor.info.name], tensor)
                for tensor in self.tensors[index]
            }
            amax = {str(name): float(value) for name, value in record["amax"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        hashes = {name: digest for result in results.values() for name, digest in result.record.stored.items()}
        if self._holds(index, hashes):
            return results, amax
        self._record(index).unlink()
        return None

    def _contents(self, index: int) -> list[StoredTensor]:
        return [stored for tensor in self.tensors[index] for stored in tensor.stored.values()]

    def _record(self, index: int) -> Path:
        return self._records / f"{index + 1:05d}.json"

    def _holds(self, index: int, hashes: Mapping[str, str]) -> bool:
        header, places = shard_header(self._contents(index))
        path = self._files / self.names[index]
        end = max((end for _, end in places.values()), default=len(header))
        try:
            descriptor = open_regular(path, str(path))
        except (FileNotFoundError, CheckpointError):
            return False
        try:
            if os.fstat(descriptor).st_size != end:
                return False
            found = bytearray(len(header))
            read_at(descriptor, memoryview(found), 0, str(path))
            return found == header and all(
                _sha256(descriptor, *places[name], path) == expected for name, expected in hashes.items()
            )
        except CheckpointError:
            return False
        finally:
            os.close(descriptor)


def finished_shards(
    shards: OutputShards, which: Iterable[int], workers: int
) -> dict[int, tuple[Results, dict[str, float]]]:
    """Those of the shards that an earlier run has finished, verified in several threads."""
    indices: Sequence[int] = list(which)
    with ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
        found = pool.map(shards.finished, indices)
        return {index: done for index, done in zip(indices, found, strict=True) if done is not None}


def _sha256(descriptor: int, start: int, end: int, path: Path) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(PIECE))
    for offset in range(start, end, PIECE):
        piece = buffer[: min(PIECE, end - offset)]
        read_at(descriptor, piece, offset, str(path))
        digest.update(piece)
    return digest.hexdigest()
