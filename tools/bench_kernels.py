"""Times dequantize kernels, and NVFP4's quantize kernels, on a CUDA GPU: share of copy bandwidth, peers, host time.

Times are medians over replays of a CUDA graph that rotates through at least 200 MB of buffers, so that the cache holds
neither codes nor results of the launch before; "eager" times come from the same launches made one by one from Python.
Packed bytes are random: the kernels' time doesn't depend on them.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from surogate_formats.fp8 import FP8
from surogate_formats.nf4 import NF4
from surogate_formats.nvfp4 import NVFP4
from surogate_load.kernels import load_kernels
from surogate_load.kernels.group import DequantizeGroup
from surogate_load.weight import TORCH_DTYPES, WeightKind

Run = Callable[[], object]
Shape = tuple[int, int]

FORMATS = {
    "nf4, double quantization": NF4(),
    "nf4": NF4(double_quant="none"),
    "nvfp4": NVFP4(),
    "fp8, per tensor": FP8("tensor"),
    "fp8, per channel": FP8("channel"),
    "fp8, 128x128": FP8("block"),
}

QWEN3_8B_LAYER = (
    *((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)),  # q, k, v, o
    *((12288, 4096), (12288, 4096), (4096, 12288)),  # gate, up, down
)

SHAPES: dict[str, tuple[Shape, ...]] = {
    "1024x4096": ((1024, 4096),),
    "4096x4096": ((4096, 4096),),
    "12288x4096": ((12288, 4096),),
    "8B layer, 7 weights": QWEN3_8B_LAYER,
}

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "e4m3": torch.float8_e4m3fn}

_ACTIVATION = "4096x4096"
"""What the quantizers are measured on, in bfloat16."""

QUANTIZERS: dict[str, Callable[[Tensor, Sequence[Tensor]], object]] = {
    "nearest": lambda x, noise: torch.ops.surogate.quantize_nvfp4(x, False, False, "mse", False),
    "four-over-six": lambda x, noise: torch.ops.surogate.quantize_nvfp4(x, False, True, "mse", False),
    "stochastic": lambda x, noise: torch.ops.surogate.quantize_nvfp4_stochastic(x, *noise),
}

ROTATED_BYTES = 400 * 10**6
REPLAYS = 25


@dataclass
class Row:
    """One measurement; times in microseconds, `share` of the bandwidth of a large copy in the same run."""

    format: str
    shapes: str
    dtype: str
    us: float
    eager_us: float
    terabytes_per_s: float
    share: float
    bitsandbytes_us: float | None = None
    bitsandbytes_eager_us: float | None = None


def main() -> None:
    """Measures, prints a table, and writes the figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bfloat16"], help="of the dense weights")
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    arguments = parser.parse_args()
    if not load_kernels("cuda"):
        raise SystemExit("the kernels can't run here: the warning above says why")
    copy = best_copy_bandwidth()
    rows = [measure(label, shapes, dtype, copy) for dtype in arguments.dtype for label in FORMATS for shapes in SHAPES]
    rows += [measure_quantizer(label, copy) for label in QUANTIZERS]
    add_bitsandbytes(rows)
    host = host_times()
    show(rows, copy, host)
    if arguments.json:
        report = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "copy_terabytes_per_s": copy,
            "copy_of_as_many_bytes": {name: copy_bandwidth(traffic(FORMATS["nf4"], SHAPES[name])) for name in SHAPES},
            "host_us": host,
            "rows": [asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def graph_us(runs: Sequence[Run]) -> float:
    """Median time of one run, when all of them are replayed as one graph."""
    for run in runs:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return timed(graph.replay) / len(runs)


def eager_us(runs: Sequence[Run]) -> float:
    """The same without a graph: the slower of host and device counts."""

    def all_runs() -> None:
        for run in runs:
            run()

    return timed(all_runs) / len(runs)


def timed(run: Run) -> float:
    """Median time of a run by device events, in microseconds."""
    times = []
    for _ in range(REPLAYS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[3:])


def copy_bandwidth(traffic_bytes: int) -> float:
    """Terabytes a second, read and written, of device-to-device copies that move so many bytes each.

    The better of a graph's copies and single ones: for large copies a graph uses a slower engine, for small ones the
    host is too slow.
    """
    half = traffic_bytes // 2
    pairs = [[random_bytes(half) for _ in range(2)] for _ in range(rotations(traffic_bytes))]
    runs = [lambda pair=pair: pair[0].copy_(pair[1]) for pair in pairs] * 4
    return 2 * half / min(graph_us(runs), eager_us(runs)) / 1e6


def best_copy_bandwidth() -> float:
    """The ceiling: the best of copies of several sizes."""
    return max(copy_bandwidth(megabytes * 10**6) for megabytes in (400, 1000, 2000))


def random_bytes(count: int) -> Tensor:
    """uint8 [count] on the device."""
    return torch.randint(0, 256, (count,), dtype=torch.uint8, device="cuda")


def rotations(traffic_bytes: int) -> int:
    """How many sets of buffers are rotated through."""
    return max(2, -(-ROTATED_BYTES // traffic_bytes))


def random_parts(fmt: object, shape: Shape) -> list[Tensor]:
    """Packed tensors of a weight: any codes, positive scales."""
    parts = []
    for spec in WeightKind(fmt, shape).specs.values():  # type: ignore[arg-type]
        dtype = TORCH_DTYPES[spec.dtype]
        if dtype.itemsize > 1:
            parts.append(torch.rand(spec.shape, device="cuda").add_(0.5).to(dtype))
        else:
            highest = 126 if dtype == torch.float8_e4m3fn else 256
            parts.append(torch.randint(0, highest, spec.shape, dtype=torch.uint8, device="cuda").view(dtype))
    return parts


def traffic(fmt: object, shapes: Sequence[Shape], dtype: torch.dtype = torch.bfloat16) -> int:
    """The bytes that have to be read and written."""
    total = 0
    for rows, columns in shapes:
        specs = WeightKind(fmt, (rows, columns)).specs.values()  # type: ignore[arg-type]
        total += sum(TORCH_DTYPES[s.dtype].itemsize * torch.Size(s.shape).numel() for s in specs)
        total += rows * columns * dtype.itemsize
    return total


def our_runs(fmt: object, shapes: Sequence[Shape], dtype: torch.dtype) -> list[Run]:
    """One run a set of buffers: the op for a single weight, a grouped launch for several."""
    kinds = [WeightKind(fmt, shape) for shape in shapes]  # type: ignore[arg-type]
    runs: list[Run] = []
    for _ in range(rotations(traffic(fmt, shapes, dtype))):
        parts = [random_parts(fmt, shape) for shape in shapes]
        group = DequantizeGroup(kinds, parts, dtype)
        out = group.empty()
        runs.append(lambda group=group, out=out: group.into(out))
    return runs


def op_runs(fmt: object, shape: Shape, dtype: torch.dtype) -> list[Run]:
    """The op itself, which allocates its result: results are kept, so that buffers rotate."""
    kind = WeightKind(fmt, shape)  # type: ignore[arg-type]
    count = rotations(traffic(fmt, [shape], dtype))
    kept: list[object] = [None] * count

    def run(index: int, parts: list[Tensor]) -> None:
        kept[index] = kind.dequantize(parts, dtype)

    packed = [random_parts(fmt, shape) for _ in range(count)]
    return [lambda i=i: run(i, packed[i]) for i in range(count)]


def measure(label: str, name: str, dtype_name: str, copy: float) -> Row:
    """One row."""
    fmt, shapes, dtype = FORMATS[label], SHAPES[name], DTYPES[dtype_name]
    runs = (op_runs(fmt, shapes[0], dtype) if len(shapes) == 1 else our_runs(fmt, shapes, dtype)) * 4
    us, eager = graph_us(runs), eager_us(runs)
    rate = traffic(fmt, shapes, dtype) / us / 1e6
    return Row(label, name, dtype_name, us, eager, rate, rate / copy)


def quantizer_runs(label: str) -> list[Run]:
    """One run a source; results are kept, so that buffers rotate."""
    (shape,) = SHAPES[_ACTIVATION]
    count = rotations(traffic(FORMATS["nvfp4"], [shape]))
    noise = [torch.zeros(1, dtype=torch.int64, device="cuda") for _ in range(2)]
    kept: list[object] = [None] * count

    def run(index: int, x: Tensor) -> None:
        kept[index] = QUANTIZERS[label](x, noise)

    sources = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(count)]
    return [lambda i=i: run(i, sources[i]) for i in range(count)]


def measure_quantizer(label: str, copy: float) -> Row:
    """One row; the traffic is the source, read once, and the result, though the source's amax takes a reading more."""
    runs = quantizer_runs(label) * 4
    us, eager = graph_us(runs), eager_us(runs)
    rate = traffic(FORMATS["nvfp4"], SHAPES[_ACTIVATION]) / us / 1e6
    return Row(f"bfloat16, {label}", _ACTIVATION, "nvfp4", us, eager, rate, rate / copy)


def add_bitsandbytes(rows: Sequence[Row]) -> None:
    """Fills in bitsandbytes' times for NF4 in bfloat16, where it is installed."""
    try:
        from bitsandbytes import functional
    except ImportError:
        return
    for row in rows:
        if not row.format.startswith("nf4") or row.dtype != "bfloat16":
            continue
        shapes, double = SHAPES[row.shapes], FORMATS[row.format].double_quant == "affine"  # type: ignore[attr-defined]
        runs: list[Run] = []
        for _ in range(rotations(traffic(FORMATS[row.format], shapes))):
            packed = [
                functional.quantize_4bit(
                    torch.randn(shape, dtype=torch.bfloat16, device="cuda"),
                    blocksize=64,
                    compress_statistics=double,
                    quant_type="nf4",
                )
                for shape in shapes
            ]
            kept: list[object] = []
            runs.append(lambda packed=packed, kept=kept: dequantize_all(functional.dequantize_4bit, packed, kept))
        row.bitsandbytes_us, row.bitsandbytes_eager_us = graph_us(runs * 4), eager_us(runs * 4)


def dequantize_all(dequantize: Callable[..., Tensor], packed: Sequence[tuple[Tensor, object]], kept: list) -> None:  # type: ignore[type-arg]
    """Dequantizes into new tensors, as a training step does; `kept` holds them so that buffers rotate."""
    kept[:] = [dequantize(codes, state) for codes, state in packed]


def host_times() -> dict[str, float]:
    """Microseconds of host time a call, for weights so small that the device waits for the host."""
    shape, times = (64, 256), {}
    for label, fmt in FORMATS.items():
        parts, kind = random_parts(fmt, shape), WeightKind(fmt, shape)
        times[f"op, {label}"] = host_us(lambda kind=kind, parts=parts: kind.dequantize(parts, torch.bfloat16))
    group = DequantizeGroup([kind] * 7, [parts] * 7, torch.bfloat16)
    out = group.empty()
    times["grouped launch"] = host_us(lambda: group.into(out))
    times["torch.empty"] = host_us(lambda: torch.empty(shape, dtype=torch.bfloat16, device="cuda"))
    return times


def host_us(run: Run) -> float:
    """Median host time of a run over batches of 200."""
    times = []
    for _ in range(REPLAYS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(200):
            run()
        times.append((time.perf_counter() - start) / 200 * 1e6)
    return statistics.median(times)


def show(rows: Sequence[Row], copy: float, host: dict[str, float]) -> None:
    """Prints the tables."""
    console = Console(width=140, highlight=False)
    title = f"{torch.cuda.get_device_name()}; a copy moves {copy:.2f} TB/s; times in us"
    table = Table(title=title, title_justify="left")
    for name in ("format", "weights", "to", "graph", "eager", "TB/s", "of copy", "bnb graph", "bnb eager", "faster"):
        table.add_column(name, justify="left" if name in ("format", "weights", "to") else "right")
    for row in rows:
        peers = ("", "", "")
        if row.bitsandbytes_us and row.bitsandbytes_eager_us:
            graph, eager = row.bitsandbytes_us / row.us, row.bitsandbytes_eager_us / row.eager_us
            peers = (f"{row.bitsandbytes_us:.1f}", f"{row.bitsandbytes_eager_us:.1f}", f"{graph:.2f}x, {eager:.2f}x")
        figures = (f"{row.us:.1f}", f"{row.eager_us:.1f}", f"{row.terabytes_per_s:.2f}", f"{row.share:.1%}")
        table.add_row(row.format, row.shapes, row.dtype, *figures, *peers)
    console.print(table)
    for name, us in host.items():
        console.print(f"host time a call, {name}: {us:.1f} us")


if __name__ == "__main__":
    main()
