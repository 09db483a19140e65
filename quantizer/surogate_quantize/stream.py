"""The stream: source tensors in, shards out; reading, quantizing and writing overlap, and memory stays bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from surogate_formats.checkpoint import Checkpoint
from surogate_formats.format import Parts
from surogate_formats.layouts import StoredTensor, stored_arrays
from surogate_formats.manifest import TensorRecord
from surogate_quantize.engine import Engine
from surogate_quantize.kept import COPY_PIECE, KeptTensor
from surogate_quantize.options import Options
from surogate_quantize.plan import Plan, PlannedTensor
from surogate_quantize.shard import ShardWriter
from surogate_quantize.weight_errors import Errors
from surogate_quantize.weight_reader import READ_AHEAD, Weight, WeightReader, named

WRITES_IN_FLIGHT = 3
BYTES_IN_FLIGHT = 64 << 20
"""Quantized tensors wait to be written up to this many, and up to this sum of bytes."""


@dataclass(frozen=True)
class Result:
    """What became of one tensor."""

    record: TensorRecord
    errors: Errors | None
    finite: bool


Progress = Callable[[PlannedTensor], None]


def run_stream(
    source: Checkpoint, plan: Plan, engine: Engine, paths: list[Path], progress: Progress
) -> dict[str, Result]:
    """Quantizes and writes every tensor of the plan; returns what became of each, in the plan's order.

    Args:
        source: the open checkpoint.
        plan: the plan.
        engine: quantizes weights.
        paths: where each shard of the plan goes; each is synced to disk.
        progress: called after each tensor, in the plan's order.

    Raises:
        SurogateError: a weight that can't be quantized; the message names its file and tensor.
    """
    results: dict[str, Result] = {}
    with ExitStack() as stack:
        # Before the threads, so that the files are closed after them: a closed descriptor's number is soon another's.
        shards = [stack.enter_context(ShardWriter(path, _contents(plan, i))) for i, path in enumerate(paths)]
        reader = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="read"))
        writer = stack.enter_context(ThreadPoolExecutor(2, thread_name_prefix="write"))
        weights = WeightReader(source, plan, engine)
        pending: deque[tuple[PlannedTensor, Future[Result]]] = deque()

        def settle(tensors: int, size: int) -> None:
            while len(pending) > tensors or sum(_size_in_memory(tensor) for tensor, _ in pending) > size:
                tensor, future = pending.popleft()
                results[tensor.info.name] = future.result()
                progress(tensor)

        for tensor, loaded in _read_ahead(plan, weights, reader):
            shard = shards[tensor.shard]
            if loaded is None:
                future = writer.submit(_copy, source, tensor, shard)
            else:
                parts, errors = _quantize(source, plan, engine, weights, tensor, loaded)
                weights.release(loaded)
                future = writer.submit(_write, plan.options, tensor, shard, parts, errors)
                del parts
            del loaded  # the next weight must not be read while this one is held
            pending.append((tensor, future))
            settle(WRITES_IN_FLIGHT, BYTES_IN_FLIGHT)
        settle(0, 0)
        for shard in shards:
            shard.sync()
    return results


def _contents(plan: Plan, shard: int) -> list[StoredTensor]:
    return [stored for tensor in plan.tensors if tensor.shard == shard for stored in tensor.stored.values()]


def _size_in_memory(tensor: PlannedTensor) -> int:
    return tensor.stored_bytes if tensor.decision.quantize else min(COPY_PIECE, tensor.stored_bytes)


def _read_ahead(
    plan: Plan, weights: WeightReader, thread: ThreadPoolExecutor
) -> Iterator[tuple[PlannedTensor, Weight | None]]:
    """Tensors in order, weights to be quantized with their values; the next one is read while one is worked on."""
    ahead: dict[str, Future[Weight]] = {}
    upcoming = deque(plan.quantized)

    def start_next() -> None:
        if upcoming and upcoming[0].info.name not in ahead and upcoming[0].info.nbytes <= READ_AHEAD:
            ahead[upcoming[0].info.name] = thread.submit(weights.load, upcoming[0])

    for tensor in plan.tensors:
        if not tensor.decision.quantize:
            start_next()
            yield tensor, None
            continue
        upcoming.popleft()
        waiting = ahead.pop(tensor.info.name, None)
        loaded = waiting.result() if waiting else weights.load(tensor)
        start_next()
        del waiting
        yield tensor, loaded
        del loaded


def _quantize(
    source: Checkpoint, plan: Plan, engine: Engine, weights: WeightReader, tensor: PlannedTensor, loaded: Weight
) -> tuple[Parts, Errors]:
    with named(source, tensor):
        return engine.quantize(plan.options.format, loaded.source, loaded.amax, weights.group_amax(tensor))


def _write(options: Options, tensor: PlannedTensor, shard: ShardWriter, parts: Parts, errors: Errors) -> Result:
    hashes = {}
    arrays = stored_arrays(options.layout, options.format, parts, tensor.info.shape, tensor.info.dtype)
    for part, stored in tensor.stored.items():
        hashes[stored.name] = shard.write(stored.name, [arrays[part].reshape(-1).view(np.uint8).data])
    record = _record(tensor, hashes, errors)
    return Result(record, errors, finite=True)


def _copy(source: Checkpoint, tensor: PlannedTensor, shard: ShardWriter) -> Result:
    kept = KeptTensor(source, tensor)
    digest = shard.write(tensor.info.name, kept.chunks())
    return Result(_record(tensor, {tensor.info.name: digest}, None), None, kept.finite)


def _record(tensor: PlannedTensor, hashes: dict[str, str], errors: Errors | None) -> TensorRecord:
    return TensorRecord(
        decision="quantize" if tensor.decision.quantize else "keep",
        reason=tensor.decision.reason,
        dtype=tensor.info.dtype,
        shape=tensor.info.shape,
        bits_per_weight=tensor.bits_per_weight,
        stored=hashes,
        relative_error=errors.relative if errors else None,
        max_error=errors.max_error if errors else None,
    )
