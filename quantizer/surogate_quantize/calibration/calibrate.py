"""The calibrated pass over a model: text, then block after block, each of them kept once it is done."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from surogate_formats.artifact import ADAPTER
from surogate_formats.checkpoint import Checkpoint
from surogate_formats.codes_in_words import HELD_OUT, WRITTEN
from surogate_load.architecture import need_transformers, one_line
from surogate_load.block_runner import BlockRunner, NoBlocksError
from surogate_load.tokenizer import load_tokenizer
from surogate_quantize.bands import MIB, MemoryBudgetError, in_words
from surogate_quantize.calibration.adapter import ALPHA, write_adapter
from surogate_quantize.calibration.block_experts import sums_bytes
from surogate_quantize.calibration.block_pass import BlockPass, streams_of
from surogate_quantize.calibration.estimate import PassSize
from surogate_quantize.calibration.saving import save
from surogate_quantize.calibration.store import SolvedBlocks
from surogate_quantize.calibration.streams import Streams
from surogate_quantize.calibration.text import check_writes, rows_of_file, writing_dtype, written_rows
from surogate_quantize.calibration.text_file import CalibrationTextError, file_sha256
from surogate_quantize.calibration.weight_pass import ROUNDS
from surogate_quantize.calibration_options import ROW, CalibrationOptions
from surogate_quantize.engine import Engine
from surogate_quantize.plan import Plan, PlannedTensor
from surogate_quantize.syncing import replace_synced, sync_directory, sync_file
from surogate_quantize.weight_reader import WeightReader

ROWS_AT_ONCE = 4
"""Rows of text that run through a block at a time."""

DIVIDED = 4
"""Rows of text that are enough to hold two or more out; of fewer one is, and nothing chooses but what is solved on."""

WRITING = 4 * 1.5
"""Bytes for each value of a model that writes: float32, and what it remembers of the rows."""

BASE_CALIBRATED = 512 << 20
"""Bytes that the interpreter with torch and transformers takes, about."""

BLOCKS, MATRICES = 3, 5
"""Blocks in float32, and matrices [K, K] in float64, that are in memory at a time, about."""

Told = Callable[[str], None]


class Calibration:
    """The calibrated pass of one run.

    Args:
        source: the dense checkpoint.
        plan: the plan.
        options: what calibration is asked for.
        device: `cpu` or `cuda`.
        threads: of torch on the CPU: its sums depend on their number.
        max_memory: bytes that the whole model must fit into where it writes the text.
        reading: whether weights are read; without them the pass can be looked at, and not be run.

    Raises:
        NoBlocksError: the model can't be run block by block.
        CalibrationTextError: there is no text to calibrate on.
    """

    def __init__(
        self,
        source: Checkpoint,
        plan: Plan,
        options: CalibrationOptions,
        device: str,
        threads: int,
        max_memory: int,
        *,
        reading: bool = True,
    ) -> None:
        """Builds the model without its blocks, and looks whether every weight of the plan is a linear of a block."""
        self._source, self._plan, self._options = source, plan, options
        self._device, self._threads = device, threads
        self._runner = BlockRunner(source, device if reading else "meta", torch.float32)
        prefix = f"{self._runner.prefix}."
        self._tensors = {t.module: t for t in plan.quantized if t.module.startswith(prefix)}
        if not self._tensors:
            raise NoBlocksError(
                f"{self._runner.name}: no weight of its decoder blocks is quantized; nothing to calibrate"
            )
        for module, tensor in self._tensors.items():
            self._check(module, tensor)
        self._runner.check_blocks()
        if device == "cpu":
            self._check_memory(max_memory)
        self._tokenizer = load_tokenizer(source.directory)
        self._length = min(ROW, self._runner.longest)
        if options.text is None:
            self._check_writer(max_memory)
        self._given = self._rows_of_file() if options.text is not None else None

    def _check_memory(self, max_memory: int) -> None:
        """Raises `MemoryBudgetError` unless a block, its solver's matrices, and what is no block fit."""
        prefix = f"{self._runner.prefix}."
        sizes: Counter[str] = Counter()
        for name, entry in self._source.tensors.items():
            block = name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else ""
            sizes[block] += 4 * math.prod(entry.info.shape)
        widest = max(tensor.info.shape[1] for tensor in self._tensors.values())
        blocks = max(size for block, size in sizes.items() if block)
        needed = BASE_CALIBRATED + sizes[""] + BLOCKS * blocks + MATRICES * 8 * widest**2
        needed += self._sums_of_experts()
        if needed > max_memory:
            raise MemoryBudgetError(
                f"`max_memory` {in_words(max_memory)}: calibrating {self._runner.name} takes about {needed // MIB} "
                "MiB (a block in float32, its solver's matrices, embeddings)"
            )

    def _sums_of_experts(self) -> int:
        """Bytes of sums that wait for their turn in the solver, where experts are calibrated."""
        experts = {name: tensor.info.shape for name, tensor in self._tensors.items() if self._runner.share(name) < 1}
        if not experts or self._plan.options.codes != "calibrated":
            return 0
        outer = self._runner.width
        inner = max(rows if columns == outer else columns for rows, columns in experts.values())
        return sums_bytes(outer, inner, len({name.rpartition(".")[0] for name in experts}))

    @property
    def room(self) -> int:
        """Bytes of disk that the pass takes beside the artifact: hidden states, inputs of a block, solved weights."""
        tokens = self._length * (self._rows() + HELD_OUT)
        hidden = self._runner.width
        streams = 2 * 4 * tokens * hidden * len(streams_of(self._plan.options))
        block = next(iter(self._tensors)).removeprefix(f"{self._runner.prefix}.").partition(".")[0]
        here = [t for name, t in self._tensors.items() if name.startswith(f"{self._runner.prefix}.{block}.")]
        own = [t.info.shape[1] for t in here if self._runner.share(t.module) == 1]
        inputs = 4 * tokens * (sum(own) + (2 * hidden if len(own) < len(here) else 0))  # experts share theirs
        return streams + inputs + sum(tensor.stored_bytes for tensor in self._tensors.values())

    def _check_writer(self, max_memory: int) -> None:
        """Raises `CalibrationTextError` unless the model can write its text."""
        if self._tokenizer is None:
            raise CalibrationTextError(
                f"{self._source.directory}: has no tokenizer, so the model can't write the text; give "
                "`calibration_text` FILE with `input_ids`"
            )
        room = max_memory if self._device == "cpu" else torch.cuda.mem_get_info()[0]
        if (needed := round(WRITING * self._values)) > room:
            raise CalibrationTextError(
                f"{self._source.directory}: takes {needed / 1e9:.1f} GB to write its calibration text, and "
                f"{room / 1e9:.1f} GB may be used; give `calibration_text` FILE, or a larger `max_memory`"
            )

    def _rows(self) -> int:
        """An even number, so that batches have two rows or more, and one that is held out can be divided."""
        widest = max(tensor.info.shape[1] for tensor in self._tensors.values())
        return -(-self._options.tokens_for(widest) // (2 * self._length)) * 2

    @property
    def seconds(self) -> float:
        """How long the whole pass takes, about."""
        options = self._plan.options
        solves = ROUNDS if self._options.adapter_joint else 1
        return PassSize(
            shapes=tuple(tensor.info.shape for tensor in self._tensors.values()),
            shares=tuple(self._runner.share(module) for module in self._tensors),
            width=self._runner.width,
            blocks=self._runner.count,
            tokens=self._tokens,
            row=self._length,
            streams=len(streams_of(options)),
            solves=solves if options.codes == "calibrated" else 0,
            adapts=solves if options.adapter_init is not None else 0,
            written=self._values if self._given is None else 0,
        ).seconds(self._device)

    @property
    def _tokens(self) -> int:
        return self._length * (self._rows() + HELD_OUT if self._given is None else len(self._given))

    @property
    def _values(self) -> int:
        return sum(math.prod(entry.info.shape) for entry in self._source.tensors.values())

    def recorded(self) -> dict[str, Any]:
        """What the codes depend on beside the options, for the manifest and for a run that goes on."""
        text = self._options.text
        return {
            "calibration_text": WRITTEN if text is None else f"sha256 {file_sha256(Path(text))}",
            "calibration_tokens": self._tokens,
            "calibration_row": self._length,
            "calibration_seed": self._options.seed,
            "adapter_joint": self._options.adapter_joint,
            "calibration_device": self._device if self._device == "cpu" else torch.cuda.get_device_name(),
            "calibration_torch": torch.__version__,
            "calibration_transformers": need_transformers().__version__,
            "calibration_threads": self._threads if self._device == "cpu" else None,
        }

    def solve(self, folder: Path, engine: Engine, limit: int, told: Told) -> SolvedBlocks:
        """Solves every block that isn't solved yet.

        Args:
            folder: for what must survive an interruption.
            engine: rounds to nearest.
            limit: bytes of weights held for later, see `WeightReader`.
            told: what is being done.
        """
        folder.mkdir(exist_ok=True)
        with _threads(self._threads), torch.no_grad():
            batches = self._batches(self._ids(folder, told))
            solved = SolvedBlocks(folder, self._plan.options.format)
            done = next((i for i in range(self._runner.count) if not solved.has(i)), self._runner.count)
            weights = WeightReader(self._source, self._plan, engine, limit, {})
            block_pass = BlockPass(self._runner, self._plan.options, self._tensors, weights, engine, folder)
            first = self._runner.embed(batches[0])

            def border(index: int) -> Streams:
                return Streams(folder, index, block_pass.streams, tuple(first.shape), len(batches), self._runner.device)

            before = border(done)
            if done and done < self._runner.count and not before.whole:
                done, before = 0, border(0)
            wanted = self._rows() + HELD_OUT
            if self._given is not None and len(self._given) < wanted:
                told(f"the text has {len(self._given)} rows of {self._length} tokens; {wanted} were asked for")
            for position in range(len(batches) if done == 0 else 0):
                before.start(position, self._runner.embed(batches[position]))
            self._runner.keep_blocks_alone()
            for index in range(done, self._runner.count):
                told(f"calibrating block {index + 1} of {self._runner.count}")
                after = border(index + 1)
                found = block_pass.solve(index, before, after)
                after.sync()
                solved.put(index, found)
                before.remove()
                before = after
            before.remove()
        return solved

    def write_adapter(self, solved: SolvedBlocks, files: Path, base: str) -> dict[str, str]:
        """Writes the adapter, if one is asked for, into the artifact's files; returns the SHA-256 of each file."""
        rank = self._plan.options.adapter_init
        if rank is None:
            return {}
        folder = files / ADAPTER
        write_adapter(folder, solved.updates(), rank, ALPHA * rank, base)
        sync_directory(folder)
        return {f"{ADAPTER}/{path.name}": file_sha256(path) for path in sorted(folder.iterdir())}

    def _check(self, module: str, tensor: PlannedTensor) -> None:
        found = self._runner.module(module)
        if not isinstance(found, nn.Linear) or tuple(found.weight.shape) != tensor.info.shape:
            raise NoBlocksError(
                f"{self._runner.name}: {module} is no linear of a block, nor of an expert with tensors of its own; "
                "leave it out with `skip`, or use `codes='nearest'`"
            )

    def _ids(self, folder: Path, told: Told) -> Tensor:
        """int64 [rows, tokens]: those of an interrupted run, or new ones."""
        path = folder / "ids.safetensors"
        with suppress(OSError, SafetensorError, KeyError):
            found: Tensor = load_file(path)["ids"]
            return found
        new, part = self._new_ids(told), path.with_suffix(".part")
        save(save_file, {"ids": new}, part, {})
        sync_file(part)
        replace_synced(part, path)
        return new

    def _rows_of_file(self) -> Tensor:
        rows = self._rows() + HELD_OUT
        found = rows_of_file(Path(str(self._options.text)), self._tokenizer, rows, self._length)
        if len(found) < 2:
            raise CalibrationTextError(
                f"`calibration_text` {self._options.text}: has one row of {self._length} tokens, and one more is held "
                "out; give more text"
            )
        if (largest := int(found.max())) >= self._runner.vocabulary:
            raise CalibrationTextError(
                f"`calibration_text` {self._options.text}: token {largest} is none of the model's "
                f"{self._runner.vocabulary}; give ids of its own tokenizer"
            )
        return found if len(found) < DIVIDED else found[: len(found) // 2 * 2]  # see `_rows`

    def _new_ids(self, told: Told) -> Tensor:
        rows = self._rows() + HELD_OUT
        if self._given is not None:
            return self._given
        found: list[Tensor] = []
        try:
            with self._writer().whole() as model:
                check_writes(model)
                for written in written_rows(model, self._tokenizer, rows, self._length, self._options.seed):
                    found.append(written)
                    told(f"the model has written {sum(map(len, found))} of {rows} rows of text")
        except CalibrationTextError:
            self._runner.through(torch.zeros(1, 1, dtype=torch.int64))  # names the block
            raise
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise CalibrationTextError(
                f"{self._source.directory}: the model can't write its calibration text ({one_line(error)}); give "
                "`calibration_text` FILE"
            ) from error
        return torch.cat(found)

    def _writer(self) -> BlockRunner:
        dtype = writing_dtype(self._source.config, self._device)
        return self._runner if dtype == torch.float32 else BlockRunner(self._source, self._device, dtype)

    def _batches(self, ids: Tensor) -> Tensor:
        """int64 [batches, rows, tokens], two batches or more, and so many rows in each that none is left over."""
        divisors = range(1, ROWS_AT_ONCE + 1)
        at_once = max(count for count in divisors if len(ids) % count == 0 and len(ids) // count > 1)
        return ids.reshape(-1, at_once, ids.shape[1])


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
