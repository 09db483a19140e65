"""Times LoRA training steps on Qwen3 shapes: ours in several ways, and PEFT + bitsandbytes, in one run on one GPU.

A step is 4 micro-batches of 2 x 2048 tokens and an AdamW step on adapters of rank 16 on all seven linears, weights and
tokens random. Each row is a process of its own; figures are medians of steps after the first ones.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from random_artifact import PARAMETERS, QWEN3, qwen3_config, write_random_artifact
from surogate_formats.registry import make_format

RANK, STEPS, WARM_UP, ACCUMULATION = 16, 6, 2, 4

ROWS = {
    "nf4 captured": ("nf4", "bf16", "captured"),
    "nf4 compiled": ("nf4", "bf16", "compiled"),
    "nf4 eager": ("nf4", "bf16", "eager"),
    "fp8 captured": ("fp8", "bf16", "captured"),
    "fp4 captured": ("fp4", "bf16", "captured"),
    "fp8 fp8-hybrid captured": ("fp8", "fp8-hybrid", "captured"),
    "nf4 fp8-hybrid captured": ("nf4", "fp8-hybrid", "captured"),
    "nf4 compiled, Trainer": ("nf4", "bf16", "trainer"),
    "nf4 captured, Trainer": ("nf4", "bf16", "captured trainer"),
    "nf4 captured, checkpointed": ("nf4", "bf16", "captured checkpointed"),
    "bf16 captured": ("bf16", "bf16", "captured"),
    "bitsandbytes": ("bitsandbytes", "bf16", "eager"),
    "bitsandbytes, checkpointed": ("bitsandbytes", "bf16", "eager checkpointed"),
    "bitsandbytes, Trainer": ("bitsandbytes", "bf16", "trainer"),
}
"""Name to base, recipe and way of running; "captured" includes compiled layers."""

PEERS = ("bitsandbytes, checkpointed", "bitsandbytes, Trainer", "bitsandbytes")
"""Rows that others are compared with: the first whose way they share."""


def main() -> None:
    """Runs the rows, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=QWEN3, default=["0.6B", "8B"])
    parser.add_argument("--rows", nargs="+", default=["nf4 captured", "bitsandbytes"], help=", ".join(ROWS))
    parser.add_argument("--batch", type=int, nargs=2, default=(2, 2048), metavar=("ROWS", "TOKENS"))
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    parser.add_argument("--profile", type=Path, help="write the kernels' times of a step of each row to this folder")
    parser.add_argument(
        "--activation-memory",
        type=float,
        help="what of the activations compiled layers save, 0 to 1, instead of the default",
    )
    parser.add_argument("--one", nargs=2, metavar=("SIZE", "ROW"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(bench(*arguments.one, arguments)))
        return
    results = []
    for size in arguments.sizes:
        for row in arguments.rows:
            results.append(_in_a_process(size, row, arguments))
            print(json.dumps(results[-1]), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1))
    _print(results)


def _in_a_process(size: str, row: str, arguments: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--one", size, row, "--batch", *map(str, arguments.batch)]
    if arguments.activation_memory is not None:
        command += ["--activation-memory", str(arguments.activation_memory)]
    if arguments.profile:
        command += ["--profile", str(arguments.profile)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        return {"size": size, "row": row, "error": ran.stderr.strip()[-1500:]}
    return json.loads(ran.stdout.strip().splitlines()[-1])


def bench(size: str, row: str, arguments: argparse.Namespace) -> dict:
    """One row in this process."""
    base, recipe, way = ROWS[row]
    batch, profile = tuple(arguments.batch), arguments.profile
    saving = {} if arguments.activation_memory is None else {"activation_memory": arguments.activation_memory}
    started = time.perf_counter()
    if base == "bitsandbytes":
        model = _bitsandbytes_model(size)
    else:
        model = _our_model(size, base, recipe, "eager" not in way, saving)
    loaded = time.perf_counter() - started
    if "checkpointed" in way:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    resident = torch.cuda.memory_allocated()
    ids = torch.randint(0, 49000, batch, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    if "trainer" in way:
        seconds, loss = _through_trainer(model, ids.cpu(), captured="captured" in way)
    else:
        seconds, loss = _through_loop(
            model, ids, "captured" in way, profile and profile / f"{size}-{row.replace(' ', '-')}.txt"
        )
    return {
        "size": size,
        "row": row,
        "tokens_per_s": round(ACCUMULATION * ids.numel() / statistics.median(seconds[WARM_UP:])),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1),
        "resident_gb": round(resident / 1e9, 2),
        "load_s": round(loaded, 1),
        "first_step_s": round(seconds[0], 1),
        "loss": round(loss, 4),
        "gpu": torch.cuda.get_device_name(),
    }


def _lora(model):
    import peft

    settings = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    return peft.get_peft_model(model, settings, autocast_adapter_dtype=False).train()


def _our_model(size: str, base: str, recipe: str, compiled: bool, saving: dict):
    from surogate_load.loss.fused_head import fuse_head
    from surogate_load.step.regional import compile_layers

    if base == "bf16":
        model = _dense_model(size).requires_grad_(False)
        fuse_head(model)
        if compiled:
            compile_layers(model, **saving)
        return _lora(model)
    from surogate_load import load_model

    path = Path(tempfile.gettempdir()) / f"qwen3-{size}-{base}"
    if not path.exists():
        write_random_artifact(qwen3_config(size), make_format(base, PARAMETERS[base]), path)
    return _lora(load_model(path, recipe=recipe, device="cuda", compile="layers" if compiled else None, **saving))


def _dense_model(size: str):
    from transformers import AutoModelForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(qwen3_config(size))
    torch.set_default_dtype(torch.float32)
    return model


def _bitsandbytes_model(size: str):
    """A random model of transformers whose decoder linears are bitsandbytes', as `load_in_4bit` makes them."""
    model = _dense_model(size)
    pack_linears(model, torch.device("cuda"))
    model.is_loaded_in_4bit = True
    torch.cuda.empty_cache()
    return _lora(model.requires_grad_(False))


def pack_linears(model, device: torch.device) -> None:
    """Makes all linears but the head bitsandbytes' NF4 with double quantization."""
    import bitsandbytes as bnb
    from torch import nn

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            packed = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            packed.weight = bnb.nn.Params4bit(
                module.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, packed.to(device))


def _through_loop(model, ids, captured: bool, profile: Path | None) -> tuple[list[float], float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    micro_step = _micro_step(model, captured)
    seconds = []
    for _ in range(STEPS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        loss = _step(micro_step, optimizer, ids)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    if profile:
        write_profile(lambda: _step(micro_step, optimizer, ids), profile)
    return seconds, loss.item()


def _step(micro_step: Callable, optimizer, ids):
    for _ in range(ACCUMULATION):
        loss = micro_step(ids)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def _micro_step(model, captured: bool) -> Callable:
    if captured:
        from surogate_load.step.micro_step import MicroStep

        step = MicroStep(model)
        return lambda ids: step(input_ids=ids, labels=ids, gradient_scale=1 / ACCUMULATION)

    def eager(ids):
        loss = model(input_ids=ids, labels=ids).loss
        (loss / ACCUMULATION).backward()
        return loss.detach()

    return eager


def _through_trainer(model, ids, captured: bool) -> tuple[list[float], float]:
    import transformers

    from surogate_load.step.trainer import captured as make_captured

    seconds, last = [], [time.perf_counter()]

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - last[0])
            last[0] = time.perf_counter()

    rows = [{"input_ids": row, "labels": row} for row in ids.repeat(ACCUMULATION * STEPS, 1)]
    kind = make_captured(transformers.Trainer) if captured else transformers.Trainer
    with tempfile.TemporaryDirectory() as directory:
        settings = transformers.TrainingArguments(
            output_dir=directory,
            per_device_train_batch_size=len(ids),
            gradient_accumulation_steps=ACCUMULATION,
            max_steps=STEPS,
            bf16=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            optim="adamw_torch_fused",
        )
        result = kind(model=model, args=settings, train_dataset=rows, callbacks=[Clock()]).train()
    return seconds, result.training_loss


def write_profile(step: Callable, path: Path) -> None:
    """Writes the kernels of a step by their time, and where the GPU waited, to a text file."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    averages = profiler.key_averages()
    table = averages.table(sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=90)
    path.write_text(_gaps(profiler) + table)


def _gaps(profiler) -> str:
    """How long the GPU did nothing, and after which kernels."""
    spans = sorted(
        (e.time_range.start, e.time_range.end, e.name) for e in profiler.events() if "CUDA" in str(e.device_type)
    )
    idle: dict[str, list[float]] = {}
    until, busy, last = spans[0][0], 0.0, ""
    for start, end, name in spans:
        if start > until:
            idle.setdefault(last, []).append(start - until)
        busy += max(0.0, end - max(start, until))
        until, last = max(until, end), name
    longest = sorted(idle.items(), key=lambda item: -sum(item[1]))[:25]
    lines = [f"{len(spans)} kernels, busy {busy / 1e3:.2f} ms of {(until - spans[0][0]) / 1e3:.2f} ms; idle after:"]
    lines += [f"{sum(v) / 1e3:8.3f} ms in {len(v):5d}, longest {max(v):8.1f} us: {n[:80]}" for n, v in longest]
    return "\n".join(lines) + "\n"


def _print(results: list[dict]) -> None:
    table = Table("size", "row", "tokens/s", "against bitsandbytes", "peak GB", "resident GB", "load s", "first step s")
    for result in results:
        if "error" in result:
            table.add_row(result["size"], result["row"], result["error"].splitlines()[-1])
            continue
        name = next((n for n in PEERS if n.partition(", ")[2] in result["row"]), "bitsandbytes")
        peer = [each for each in results if each["size"] == result["size"] and each["row"] == name]
        ratio = f"{result['tokens_per_s'] / peer[0]['tokens_per_s']:.2f}" if peer and "error" not in peer[0] else ""
        keys = ("peak_gb", "resident_gb", "load_s", "first_step_s")
        table.add_row(
            result["size"], result["row"], str(result["tokens_per_s"]), ratio, *(str(result[k]) for k in keys)
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
