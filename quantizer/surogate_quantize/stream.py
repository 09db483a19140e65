"""The stream: source tensors in, shards out; reading, quantizing and writing overlap, and memory stays bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from threading import Barrier
from typing import Any, Protocol

import numpy as np

from surogate_formats.checkpoint import Checkpoint
from surogate_formats.format import Format, Parts
from surogate_formats.layouts import stored_arrays
from surogate_quantize.bands import Band, cut_bands
from surogate_quantize.engine import Engine
from surogate_quantize.kept import COPY_PIECE, KeptTensor
from surogate_quantize.options import Options
from surogate_quantize.output_shards import OutputShards
from surogate_quantize.plan import Plan, PlannedTensor
from surogate_quantize.results import Result, Results, kept_result, quantized_result
from surogate_quantize.shard import ShardWriter
from surogate_quantize.weight_errors import Errors, measured_errors
from surogate_quantize.weight_reader import Weight, WeightReader, named

WRITES_IN_FLIGHT = 3
BYTES_IN_FLIGHT = 32 << 20
"""Quantized bands wait to be written up to this many, and up to this sum of bytes."""

_THREADS = {"read": 1, "write": 2, "finish": 1}
"""Threads beside the engine's, by what they do; syncing a shard takes a while, and holds up nothing."""

Progress = Callable[[PlannedTensor], None]


class Solved(Protocol):
    """Weights whose codes have been found already."""

    @property
    def errors(self) -> Mapping[str, tuple[float, float]]:
        """Of each weight's output, by module, with nearest codes and with those that were found."""
        ...

    def parts(self, band: Band) -> Parts:
        """The parts of a band of a weight in `errors`."""
        ...


def run_stream(
    source: Checkpoint,
    plan: Plan,
    engine: Engine,
    shards: OutputShards,
    which: Sequence[int],
    *,
    limit: int,
    amax: Mapping[str, np.float32],
    progress: Progress,
    solved: Solved | None = None,
) -> Results:
    """Quantizes and writes the tensors of some shards; returns what became of each, in the plan's order.

    Args:
        source: the open checkpoint.
        plan: the plan.
        engine: quantizes weights.
        shards: where they go; each is finished when its last tensor is written.
        which: indices of the shards, ascending.
        limit: bytes of a band, see `bands.band_bytes`.
        amax: largest magnitudes that need not be looked for.
        progress: called after each tensor, in the plan's order.
        solved: weights whose codes have been found already; all others are rounded.

    Raises:
        SurogateError: a weight that can't be quantized; the message names its file and tensor.
    """
    tensors = [tensor for index in which for tensor in shards.tensors[index]]
    with ExitStack() as stack:
        # Before the threads, so that files are closed after them: a closed descriptor's number is soon another's.
        stack.enter_context(shards)
        pools = {name: stack.enter_context(_started(name, count)) for name, count in _THREADS.items()}
        weights = WeightReader(source, plan, engine, limit, amax)
        settling = _Settling(shards, weights, pools["finish"], progress)
        for tensor, loaded in _read_ahead(plan.options.format, tensors, weights, pools["read"], limit):
            shard = shards.writer(tensor.shard)
            if loaded is None:
                copied = pools["write"].submit(_copy, source, tensor, shard)
                settling.add(tensor, copied, min(COPY_PIECE, tensor.stored_bytes))
            else:
                band, weight = loaded
                parts, errors = _quantize(source, plan, engine, weights, band, weight, solved)
                weights.release(weight)
                size, before = sum(part.nbytes for part in parts.values()), settling.last if band.start else None
                written = pools["write"].submit(
                    _write, plan.options, band, shard, parts, errors, weight.amax, before, solved
                )
                del parts, weight
                settling.add(tensor, written, size)
            del loaded  # the next weight must not be read while this one is held
            settling.settle(WRITES_IN_FLIGHT, BYTES_IN_FLIGHT)
        settling.settle(0, 0)
        return settling.results()


def _started(name: str, count: int) -> ThreadPoolExecutor:
    """A pool whose threads run: one that a signal met while it was started would not be waited for at the end."""
    pool, running = ThreadPoolExecutor(count, thread_name_prefix=name), Barrier(count)
    try:
        for waiting in [pool.submit(running.wait) for _ in range(count)]:
            waiting.result()
    except BaseException:
        running.abort()
        raise
    return pool


class _Settling:
    """Bands that wait to be written, and what became of tensors and shards.

    Attributes:
        last: the band that was added last.
    """

    def __init__(
        self, shards: OutputShards, weights: WeightReader, finisher: ThreadPoolExecutor, progress: Progress
    ) -> None:
        self._shards, self._weights, self._finisher, self._progress = shards, weights, finisher, progress
        self._pending: deque[tuple[PlannedTensor, Future[Any], int]] = deque()
        self._results: dict[int, Results] = {}
        self._finishing: list[Future[None]] = []
        self.last: Future[Any] | None = None

    def add(self, tensor: PlannedTensor, written: Future[Any], size: int) -> None:
        """Takes note of a band of `size` bytes in memory that is being written."""
        self.last = written
        self._pending.append((tensor, written, size))

    def settle(self, bands: int, size: int) -> None:
        """Waits until no more bands, and no more bytes, wait to be written."""
        while len(self._pending) > bands or sum(waiting for *_, waiting in self._pending) > size:
            tensor, written, _ = self._pending.popleft()
            done = written.result()
            if isinstance(done, Result):
                self._settled(tensor, done)
        for finished in self._finishing:
            if finished.done():
                finished.result()

    def results(self) -> Results:
        """What became of every tensor, once all shards are finished."""
        for finished in self._finishing:
            finished.result()
        return {name: result for results in self._results.values() for name, result in results.items()}

    def _settled(self, tensor: PlannedTensor, result: Result) -> None:
        results = self._results.setdefault(tensor.shard, {})
        results[tensor.info.name] = result
        self._progress(tensor)
        if len(results) == len(self._shards.tensors[tensor.shard]):
            arguments = (tensor.shard, results, dict(self._weights.known))
            self._finishing.append(self._finisher.submit(self._shards.finish, *arguments))


def _read_ahead(
    fmt: Format, tensors: Iterable[PlannedTensor], weights: WeightReader, thread: ThreadPoolExecutor, limit: int
) -> Iterator[tuple[PlannedTensor, tuple[Band, Weight] | None]]:
    """Tensors in order, weights to be quantized band by band; the next one is read while one is worked on."""
    upcoming = deque(band for t in tensors if t.decision.quantize for band in cut_bands(fmt, t, limit))
    ahead: Future[Weight] | None = None

    def start_next() -> Future[Weight] | None:
        return thread.submit(weights.load, upcoming[0]) if upcoming and upcoming[0].nbytes <= limit else None

    for tensor in tensors:
        if not tensor.decision.quantize:
            ahead = ahead or start_next()
            yield tensor, None
        while upcoming and upcoming[0].tensor is tensor:
            loaded = ahead.result() if ahead else weights.load(upcoming[0])
            band, ahead = upcoming.popleft(), None
            ahead = start_next()
            yield tensor, (band, loaded)
            del loaded


def _quantize(
    source: Checkpoint,
    plan: Plan,
    engine: Engine,
    weights: WeightReader,
    band: Band,
    weight: Weight,
    solved: Solved | None,
) -> tuple[Parts, Errors]:
    tensor = band.tensor
    if solved and tensor.module in solved.errors:
        parts = solved.parts(band)
        values = plan.options.format.dequantize(parts, band.shape)
        return parts, measured_errors(values, weight.source.float32, weight.amax)
    shared = (weights.group_amax(tensor), weights.absmax_mean(tensor))
    search = plan.options.codes == "search"
    with named(source, tensor):
        return engine.quantize(plan.options.format, weight.source, weight.amax, *shared, search=search)


def _write(
    options: Options,
    band: Band,
    shard: ShardWriter,
    parts: Parts,
    errors: Errors,
    amax: np.float32,
    before: Future[Errors] | None,
    solved: Solved | None,
) -> Result | Errors:
    """Writes a band after the one before it; returns the errors so far, after the last band what became of all."""
    errors = before.result() + errors if before else errors
    tensor = band.tensor
    arrays = stored_arrays(options.layout, options.format, parts, tensor.info.shape, tensor.info.dtype)
    for part, stored in tensor.stored.items():
        if band.start == 0 or arrays[part].nbytes < stored.spec.nbytes:  # else one value for all bands
            shard.append(stored.name, arrays[part].reshape(-1).view(np.uint8).data)
    if not band.last:
        return errors
    hashes = {stored.name: shard.digest(stored.name) for stored in tensor.stored.values()}
    return quantized_result(tensor, hashes, errors, amax, solved.errors.get(tensor.module) if solved else None)


def _copy(source: Checkpoint, tensor: PlannedTensor, shard: ShardWriter) -> Result:
    kept = KeptTensor(source, tensor)
    digest = shard.write(tensor.info.name, kept.chunks())
    return kept_result(tensor, digest, finite=kept.finite)
