"""Times the quantizer: beside its peers on one weight, with a search for scales beside without, and beside copying.

With --device cuda the quantizer runs on a GPU, and its times hold the copies there and back; the peers stay on the CPU.
Rates are 10^9 bytes of the bfloat16 source a second. Both sides have the same number of threads and take turns in one
run, so that what else the machine does falls on both; a rate is that of the median time. The whole file is quantized by
`surogate_quantize.quantize` in a process of its own, which gives the peak memory, and copied by `shutil.copyfile`; both
end with fsync.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bench_checkpoint import make_checkpoint
from bench_peers import Run, bitsandbytes_nf4, compressed_tensors_nvfp4, torch_e4m3
from surogate_formats.format import Format
from surogate_formats.fp8 import FP8
from surogate_formats.nf4 import NF4
from surogate_formats.nvfp4 import NVFP4
from surogate_quantize import make_options, quantize
from surogate_quantize.devices import DEVICES, open_engine
from surogate_quantize.engine import Engine, available_cpus
from surogate_quantize.source import Source
from surogate_quantize.summary import peak_rss

SIDE = 4096
PAUSE = 0.2
"""Seconds before each run: OpenMP's threads spin for a while after theirs, which would slow the other side."""

TURN = 0.3
"""Seconds that a side runs in its turn, again and again if it is fast: what disturbs a machine for milliseconds would
double a run of ten, and not one of three hundred."""

MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """One format beside one peer."""

    name: str
    format: Format
    peer_name: str
    peer: Callable[..., Run]


CASES = (
    Case("NF4, double quantization", NF4(), "bitsandbytes quantize_4bit", bitsandbytes_nf4),
    Case("NVFP4 1-D", NVFP4(False, False), "compressed-tensors", compressed_tensors_nvfp4),
    # Four Over Six's own implementation is on no index; compressed-tensors does a third of the work here.
    Case("NVFP4 1-D, 4/6", NVFP4(False), "compressed-tensors, no 4/6", compressed_tensors_nvfp4),
    Case("NVFP4 2-D, 4/6", NVFP4(), "compressed-tensors, 1-D, no 4/6", compressed_tensors_nvfp4),
    Case("E4M3 per tensor", FP8(), "eager torch", torch_e4m3),
)


SEARCHED = {
    "NF4, double quantization": NF4(),
    "NF4 as bitsandbytes stores it": NF4(64, "dynamic"),
    "NVFP4 1-D": NVFP4(False, False),
    "NVFP4 1-D, 4/6": NVFP4(False),
    "NVFP4 2-D, 4/6": NVFP4(),
    "E4M3 per channel": FP8("channel"),
    "E4M3 per 128x128 tile": FP8("block"),
}
"""Formats whose scales are searched for, beside themselves without the search."""


@dataclass(frozen=True)
class Row:
    """A comparison; rates in GB/s of source, None where the other side is missing. `peak_rss` is in bytes."""

    name: str
    rate: float
    other: str
    other_rate: float | None
    missing: str | None = None
    peak_rss: int | None = None

    @property
    def ratio(self) -> float | None:
        """How many times as fast."""
        return self.rate / self.other_rate if self.other_rate else None


def bench_weight(case: Case, device: str, threads: int, rounds: int) -> Row:
    """Quantizes one 4096x4096 weight by turns with a peer, the search for the largest magnitude included."""
    import torch

    torch.set_num_threads(threads)
    weight = _weight()
    runs: list[Run] = []
    missing = None
    with open_engine(device, case.format, threads) as engine:
        source = Source.of(_in_host_memory(engine, weight), "BF16")
        runs.append(lambda: engine.quantize(case.format, source, engine.amax(source)))
        try:
            runs.append(case.peer(torch.from_numpy(weight.astype(np.float32)).bfloat16()))
        except ImportError as error:
            missing = str(error)
        seconds = _alternate(runs, rounds)
    rates = [weight.nbytes / each / 1e9 for each in seconds]
    return Row(case.name, rates[0], case.peer_name, rates[1] if len(rates) > 1 else None, missing)


def bench_search(name: str, fmt: Format, device: str, threads: int, rounds: int) -> Row:
    """Quantizes the same weight by turns with the search for scales and without."""
    weight = _weight()
    with open_engine(device, fmt, threads) as engine:
        source = Source.of(_in_host_memory(engine, weight), "BF16")
        found, nearest = _alternate(
            [
                lambda: engine.quantize(fmt, source, engine.amax(source), search=True),
                lambda: engine.quantize(fmt, source, engine.amax(source)),
            ],
            rounds,
        )
    return Row(f"{name}, search", weight.nbytes / found / 1e9, "nearest", weight.nbytes / nearest / 1e9)


def _weight() -> NDArray[Any]:
    """bfloat16 [4096, 4096]."""
    values = np.random.default_rng(0).standard_normal((SIDE, SIDE), np.float32) * np.float32(0.02)
    return values.astype(ml_dtypes.bfloat16)


def _in_host_memory(engine: Engine, weight: NDArray[Any]) -> NDArray[Any]:
    """The weight where the engine has its weights read to."""
    memory = engine.host_memory(weight.nbytes).view(weight.dtype).reshape(weight.shape)
    memory[...] = weight
    return memory


def _alternate(runs: list[Run], rounds: int) -> list[float]:
    """The median over its turns of each run's mean seconds in a turn, after one turn of each to warm up."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds + 1):
        for run, seconds in zip(runs, times, strict=True):
            time.sleep(PAUSE)
            mean = _mean_seconds(run)
            if turn:
                seconds.append(mean)
    return [statistics.median(seconds) for seconds in times]


def _mean_seconds(run: Run) -> float:
    started, count, passed = time.perf_counter(), 0, 0.0
    while passed < TURN:
        run()
        count += 1
        passed = time.perf_counter() - started
    return passed / count


def bench_file(name: str, file: Path, device: str, threads: int, rounds: int) -> Row:
    """Quantizes a whole checkpoint by turns with copying its file."""
    copies, runs, peaks = [], [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir=file.parent.parent) as directory:
            copies.append(_copy(file, Path(directory) / file.name))
        with tempfile.TemporaryDirectory(dir=file.parent.parent) as directory:
            command = [sys.executable, __file__, "--run", name, str(file.parent), str(Path(directory) / "out")]
            ran = subprocess.run(
                [*command, "--device", device, "--threads", str(threads)], check=True, capture_output=True, text=True
            )
            seconds, peak = json.loads(ran.stdout)
        runs.append(seconds)
        peaks.append(peak)
    size = file.stat().st_size / 1e9
    rate, other = size / statistics.median(runs), size / statistics.median(copies)
    return Row(f"{name}, file of {size:.2f} GB", rate, "copying it", other, peak_rss=max(peaks))


def _copy(source: Path, target: Path) -> float:
    started = time.perf_counter()
    shutil.copyfile(source, target)
    with target.open("rb") as stream:
        os.fsync(stream.fileno())
    return time.perf_counter() - started


def _run(name: str, source: str, out: str, device: str, threads: int) -> None:
    """What the process of a whole run does: prints its seconds and its peak memory in bytes."""
    started = time.perf_counter()
    quantize(source, out, make_options(name, {}), device=device, workers=threads)
    seconds = time.perf_counter() - started
    print(json.dumps([seconds, peak_rss()]))


def _show(rows: list[Row]) -> None:
    table = Table("format", "GB/s", "beside", "GB/s", "times as fast", "peak RSS, MiB")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.rate:.3f}",
            row.other,
            f"{row.other_rate:.3f}" if row.other_rate else f"missing: {row.missing}",
            f"{row.ratio:.2f}" if row.ratio else "",
            f"{row.peak_rss / MIB:.0f}" if row.peak_rss else "",
        )
    Console().print(table)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="what quantizes; peers run on the CPU")
    parser.add_argument("--threads", type=int, default=available_cpus(), help="of either side")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each on one weight")
    parser.add_argument("--file-rounds", type=int, default=3, help="timed runs of each on the whole file; 0: none")
    parser.add_argument("--gigabytes", type=float, default=1.5, help="size of the whole file")
    parser.add_argument("--json", action="store_true", help="print the figures for programs")
    parser.add_argument("--run", nargs=3, metavar=("FORMAT", "MODEL", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        _run(*arguments.run, arguments.device, arguments.threads)
        return
    rows = [bench_weight(case, arguments.device, arguments.threads, arguments.rounds) for case in CASES]
    where = (arguments.device, arguments.threads, arguments.rounds)
    rows += [bench_search(name, fmt, *where) for name, fmt in SEARCHED.items()]
    if arguments.file_rounds:
        with tempfile.TemporaryDirectory() as directory:
            file = make_checkpoint(Path(directory) / "model", arguments.gigabytes)
            how = (file, arguments.device, arguments.threads, arguments.file_rounds)
            rows += [bench_file(name, *how) for name in ("nf4", "fp4", "fp8")]
    if arguments.json:
        print(json.dumps([asdict(row) | {"ratio": row.ratio} for row in rows], indent=2))
    else:
        _show(rows)


if __name__ == "__main__":
    main()
