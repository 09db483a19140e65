"""The stream: source tensors in, shards out; reading, quantizing and writing overlap, and memory stays bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from surogate_formats.checkpoint import Checkpoint
from surogate_formats.dtypes import NUMPY
from surogate_formats.errors import NonFiniteWeightError, SurogateError
from surogate_formats.format import Parts
from surogate_formats.layouts import StoredTensor
from surogate_formats.manifest import TensorRecord
from surogate_quantize.engine import CpuEngine, Errors
from surogate_quantize.kept import COPY_PIECE, KeptTensor
from surogate_quantize.pieces import Source
from surogate_quantize.plan import Plan, PlannedTensor
from surogate_quantize.shard import ShardWriter

READ_AHEAD = 128 << 20
"""Bytes: a larger weight is not read while another is quantized, and fused groups are held up to this sum."""

WRITES_IN_FLIGHT = 3
BYTES_IN_FLIGHT = 64 << 20
"""Quantized tensors wait to be written up to this many, and up to this sum of bytes."""


@dataclass(frozen=True)
class Result:
    """What became of one tensor."""

    record: TensorRecord
    errors: Errors | None
    finite: bool


@dataclass(frozen=True)
class _Loaded:
    source: Source
    amax: np.float32


Progress = Callable[[PlannedTensor], None]


def run_stream(
    source: Checkpoint, plan: Plan, engine: CpuEngine, paths: list[Path], progress: Progress
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
        loader = _Loader(source, plan, engine)
        pending: deque[tuple[PlannedTensor, Future[Result]]] = deque()

        def settle(tensors: int, size: int) -> None:
            while len(pending) > tensors or sum(_size_in_memory(tensor) for tensor, _ in pending) > size:
                tensor, future = pending.popleft()
                results[tensor.info.name] = future.result()
                progress(tensor)

        for tensor, loaded in _read_ahead(plan, loader, reader):
            shard = shards[tensor.shard]
            if loaded is None:
                future = writer.submit(_copy, source, tensor, shard)
            else:
                parts, errors = _quantize(source, plan, engine, loader, tensor, loaded)
                future = writer.submit(_write, tensor, shard, parts, errors)
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
    plan: Plan, loader: _Loader, reader: ThreadPoolExecutor
) -> Iterator[tuple[PlannedTensor, _Loaded | None]]:
    """Tensors in order, weights to be quantized with their values; the next one is read while one is worked on."""
    ahead: dict[str, Future[_Loaded]] = {}
    upcoming = deque(plan.quantized)

    def start_next() -> None:
        if upcoming and upcoming[0].info.name not in ahead and upcoming[0].info.nbytes <= READ_AHEAD:
            ahead[upcoming[0].info.name] = reader.submit(loader.load, upcoming[0])

    for tensor in plan.tensors:
        if not tensor.decision.quantize:
            start_next()
            yield tensor, None
            continue
        upcoming.popleft()
        waiting = ahead.pop(tensor.info.name, None)
        loaded = waiting.result() if waiting else loader.load(tensor)
        start_next()
        del waiting
        yield tensor, loaded
        del loaded


class _Loader:
    """Reads weights and their largest magnitudes; holds the members of a small fused group until they are asked for."""

    def __init__(self, source: Checkpoint, plan: Plan, engine: CpuEngine) -> None:
        self._source = source
        self._engine = engine
        self._tensors = {tensor.info.name: tensor for tensor in plan.tensors}
        self._held: dict[str, _Loaded] = {}
        self._amax: dict[str, np.float32] = {}
        large = [tensor.info.nbytes for tensor in plan.quantized if tensor.info.nbytes > READ_AHEAD]
        self._large = np.empty(max(large, default=0), np.uint8)

    def load(self, tensor: PlannedTensor) -> _Loaded:
        """The weight's values, and the largest magnitude of its fused group."""
        name = tensor.info.name
        loaded = self._held.pop(name, None) or self._read(tensor)
        others = [self._tensors[member] for member in tensor.group if member not in self._amax]
        held = sum(held.source.raw.nbytes for held in self._held.values())
        hold = held + sum(member.info.nbytes for member in others) <= READ_AHEAD
        for member in others:
            if hold:
                self._held[member.info.name] = self._read(member)
            else:
                self._measure(member)
        return loaded

    def group_amax(self, tensor: PlannedTensor) -> np.float32:
        """The largest magnitude over the tensor's fused group, whose members `load` has seen."""
        return max(self._amax[member] for member in tensor.group)

    def _measure(self, tensor: PlannedTensor) -> None:
        """Finds a weight's largest magnitude in pieces, without holding the weight."""
        info, largest = tensor.info, np.float32(0)
        buffer = np.empty(min(COPY_PIECE, info.nbytes), np.uint8)
        try:
            for offset in range(0, info.nbytes, COPY_PIECE):
                count = self._source.read_into(info.name, buffer.data, offset)
                piece = buffer[:count].view(NUMPY[info.dtype]).reshape(1, -1)
                largest = max(largest, self._engine.amax(Source.of(piece, info.dtype)))
        except NonFiniteWeightError:
            self._read(tensor)  # raises with the index in the whole weight
        self._amax[info.name] = largest

    def _read(self, tensor: PlannedTensor) -> _Loaded:
        info = tensor.info
        # Large weights come one by one, into one buffer: a thread slow to let go of the last one's pieces
        # would otherwise keep it in memory beside the next.
        buffer = self._large[: info.nbytes] if info.nbytes > READ_AHEAD else np.empty(info.nbytes, np.uint8)
        self._source.read_into(info.name, buffer.data)
        source = Source.of(buffer.view(NUMPY[info.dtype]).reshape(info.shape), info.dtype)
        with _named(self._source, tensor):
            amax = self._amax[info.name] = self._engine.amax(source)
        return _Loaded(source, amax)


@contextmanager
def _named(source: Checkpoint, tensor: PlannedTensor) -> Iterator[None]:
    """Puts file and tensor in front of an error's message, keeping its class."""
    try:
        yield
    except SurogateError as error:
        where = f"{source.directory / source.tensors[tensor.info.name].file}: tensor {tensor.info.name}"
        hint = f"repair the source, or leave it out with `skip` {tensor.module}"
        raise type(error)(f"{where}: {error}; {hint}") from None


def _quantize(
    source: Checkpoint, plan: Plan, engine: CpuEngine, loader: _Loader, tensor: PlannedTensor, loaded: _Loaded
) -> tuple[Parts, Errors]:
    with _named(source, tensor):
        return engine.quantize(plan.options.format, loaded.source, loaded.amax, loader.group_amax(tensor))


def _write(tensor: PlannedTensor, shard: ShardWriter, parts: Parts, errors: Errors) -> Result:
    hashes = {}
    for part, stored in tensor.stored.items():
        hashes[stored.name] = shard.write(stored.name, [parts[part].reshape(-1).view(np.uint8).data])
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
