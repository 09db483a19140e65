"""Times one LoRA linear, forward and backward, over 4096 tokens: ours beside PEFT + bitsandbytes, on one GPU.

Both are what `peft` puts around a packed layer; an input's gradient is wanted. Eager times include the host's work
where that is longer; "captured" times are of the same calls in a CUDA graph, which has none. Medians.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from random_artifact import random_part
from surogate_formats.layouts import settle
from surogate_formats.recipe import Recipe
from surogate_load import set_recipe
from surogate_load.linear import QuantizedLinear
from surogate_load.weight import to_torch

SHAPES = ((4096, 4096), (1024, 4096), (12288, 4096), (4096, 12288))
"""[N, K] of Qwen3-8B's linears."""

TOKENS, RANK, REPEATS, GRAPH = 4096, 16, 30, 10

OURS = {
    "nf4, recipe bf16": ("nf4", {}, "bf16"),
    "fp4, recipe bf16": ("fp4", {}, "bf16"),
    "fp8, recipe bf16": ("fp8", {}, "bf16"),
    "fp8, recipe fp8-hybrid": ("fp8", {}, "fp8-hybrid"),
    "nf4, recipe fp8-hybrid": ("nf4", {}, "fp8-hybrid"),
}
"""Row to format, its parameters and recipe."""

PEER = "bitsandbytes nf4"


def main() -> None:
    """Runs every row at every shape, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    arguments = parser.parse_args()
    makers: dict[str, Callable] = {PEER: _bitsandbytes, "dense bf16": _dense}
    makers |= {row: (lambda shape, row=row: _ours(shape, *OURS[row])) for row in OURS}
    results = []
    for shape in SHAPES:
        for row, make in makers.items():
            eager, captured = _time(make(shape), shape)
            results.append({"shape": shape, "row": row, "eager_us": eager, "captured_us": captured})
            torch.cuda.empty_cache()
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    _print(results)


def _ours(shape: tuple[int, int], name: str, parameters: dict, recipe: str) -> nn.Module:
    fmt, layout = settle(name, parameters)
    rng = np.random.default_rng(0)
    parts = {part: to_torch(random_part(part, spec, rng)) for part, spec in fmt.part_specs(shape).items()}
    layer = QuantizedLinear.from_parts(fmt, layout, parts, shape)
    model = nn.Sequential(layer).cuda()
    set_recipe(model, Recipe(recipe))
    return _adapted(model)


def _bitsandbytes(shape: tuple[int, int]) -> nn.Module:
    import bitsandbytes

    rows, columns = shape
    layer = bitsandbytes.nn.Linear4bit(
        columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        torch.randn(shape).bfloat16() * 0.02, requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    return _adapted(nn.Sequential(layer.cuda()))


def _dense(shape: tuple[int, int]) -> nn.Module:
    rows, columns = shape
    layer = nn.Linear(columns, rows, bias=False, device="cuda", dtype=torch.bfloat16)
    return _adapted(nn.Sequential(layer.requires_grad_(False)))


def _adapted(model: nn.Module) -> nn.Module:
    settings = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"], init_lora_weights=False)
    return peft.inject_adapter_in_model(settings, model).cuda().train()


def _time(model: nn.Module, shape: tuple[int, int]) -> tuple[float, float | None]:
    """Microseconds of a call, eager and in a graph."""
    rows, columns = shape
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    x = torch.randn(TOKENS, columns, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(TOKENS, rows, device="cuda", dtype=torch.bfloat16)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]

    def call() -> None:
        torch.autograd.grad(model(x), wanted, gradient)

    return _median(call), _captured(call)


def _median(call: Callable[[], object]) -> float:
    for _ in range(5):
        call()
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def _captured(call: Callable[[], object]) -> float | None:
    """None where the peer's code can't be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(GRAPH):
                call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return _median(graph.replay) / GRAPH


def _print(results: list[dict]) -> None:
    table = Table("N x K", "row", "eager us", "x peer", "captured us", "x peer")
    peers = {tuple(result["shape"]): result for result in results if result["row"] == PEER}
    for result in results:
        peer = peers[tuple(result["shape"])]
        cells = [f"{result['shape'][0]}x{result['shape'][1]}", result["row"]]
        for key in ("eager_us", "captured_us"):
            mine, other = result[key], peer[key]
            cells += ["" if mine is None else f"{mine:.0f}", f"{other / mine:.2f}" if mine and other else ""]
        table.add_row(*cells)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
