"""Times LoRA training steps of one Qwen3 shape on several GPUs against one, in one run: DDP and FSDP2.

    python tools/bench_parallel.py --size 8B --ranks 2 --json parallel.json

NF4, recipe bf16, layers compiled in every row (--eager: in none); a step is 4 micro-batches of 2 x 2048 tokens on every
rank and an AdamW step on adapters of rank 16 on all seven linears, weights and tokens random. Each row is started by
torchrun (nccl; gloo with --device cpu, to see that it runs) in processes of its own, printed and written as it ends;
figures are medians of steps after the first ones.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config

from random_artifact import PARAMETERS, QWEN3, qwen3_config, write_random_artifact
from surogate_formats.registry import make_format

RANK, STEPS, WARM_UP, ACCUMULATION = 16, 8, 3, 4

ROWS = {
    "one": ("one", {}),
    "one captured": ("one", {"captured": True}),
    "ddp": ("ddp", {}),
    "fsdp2": ("fsdp2", {"reshard_after_forward": True}),
    "fsdp2 kept": ("fsdp2", {"reshard_after_forward": False}),
    "fsdp2 checkpointed": ("fsdp2", {"reshard_after_forward": True, "checkpointed": True}),
    "fsdp2 on one": ("fsdp2", {"reshard_after_forward": True, "ranks": 1}),
}
"""Name to wrapper and how it is called; "kept": gathered weights stay from the forward to the backward."""

DEFAULT = ("one", "one captured", "ddp", "fsdp2", "fsdp2 kept")


def main() -> None:
    """Runs the rows, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*QWEN3, "tiny"], default="8B")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=DEFAULT)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--format", choices=PARAMETERS, default="nf4")
    parser.add_argument("--recipe", default="bf16")
    parser.add_argument("--batch", type=int, nargs=2, default=(2, 2048), metavar=("ROWS", "TOKENS"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--eager", action="store_true", help="don't compile the layers")
    parser.add_argument("--timeout", type=int, default=540, help="seconds that a row may take")
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    parser.add_argument("--one", metavar="ROW", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        bench(arguments.one, arguments)
        return
    _artifact(arguments)
    results = []
    for row in arguments.rows:
        results.append(_in_processes(row, arguments))
        print(json.dumps(results[-1]), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1))
    _print(results)
    sys.exit(any("error" in result for result in results))


def _artifact(arguments: argparse.Namespace) -> Path:
    path = Path(tempfile.gettempdir()) / f"qwen3-{arguments.size}-{arguments.format}"
    if not path.exists():
        name = arguments.format
        partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
        write_random_artifact(_config(arguments.size), make_format(name, PARAMETERS[name]), partial)
        partial.rename(path)
    return path


def _config(size: str):
    if size != "tiny":
        return qwen3_config(size)
    return Qwen3Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["Qwen3ForCausalLM"],
    )


def _in_processes(row: str, arguments: argparse.Namespace) -> dict:
    wrapper, how = ROWS[row]
    ranks = 1 if wrapper == "one" else how.get("ranks", arguments.ranks)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [__file__, "--one", row, "--size", arguments.size, "--format", arguments.format]
    command += ["--recipe", arguments.recipe, "--device", arguments.device, "--batch", *map(str, arguments.batch)]
    command += ["--eager"] if arguments.eager else []
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as log:
        ended = _wait(subprocess.Popen(command, stdout=out, stderr=log, text=True), arguments.timeout)
        printed, said = _read(out), _read(log)
    found = [line for line in printed.splitlines() if line.startswith('{"row"')]
    if found:
        return json.loads(found[-1])
    late = "" if ended else f"longer than {arguments.timeout} s: "
    return {"row": row, "error": late + said.strip()[-5000:]}


def _wait(process: subprocess.Popen, seconds: float) -> bool:
    """Whether it ended in time; if not it is asked to end its ranks, which would keep the GPUs."""
    try:
        process.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        process.terminate()
    try:
        process.wait(60)  # torchrun gives its ranks 30
    except subprocess.TimeoutExpired:
        process.kill()
    return False


def _read(file) -> str:
    file.seek(0)
    return file.read()


def bench(row: str, arguments: argparse.Namespace) -> None:
    """One row, in this rank of it; rank 0 prints the figures."""
    wrapper, how = ROWS[row]
    device = _join(arguments.device)
    rank, world = dist.get_rank(), dist.get_world_size()
    started = time.perf_counter()
    model = _model(wrapper, how, arguments, device)
    loaded = time.perf_counter() - started
    cuda = device.type == "cuda"
    resident = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(rank)
    ids = torch.randint(0, 500 if arguments.size == "tiny" else 49000, tuple(arguments.batch), device=device)
    seconds, loss = _train(model, ids, wrapper, captured=bool(how.get("captured")))
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    gathered: list = [None] * world
    dist.all_gather_object(gathered, {"peak": peak, "resident": resident, "packed": _packed_bytes(model)})
    middle = statistics.median(seconds[WARM_UP:])
    if rank == 0:
        figures = {
            "row": row,
            "size": arguments.size,
            "ranks": world,
            "tokens_per_s": round(world * ACCUMULATION * ids.numel() / middle),
            "step_s": round(middle, 4),
            "peak_gb": [round(each["peak"] / 1e9, 2) for each in gathered],
            "resident_gb": [round(each["resident"] / 1e9, 2) for each in gathered],
            "packed_gb": [round(each["packed"] / 1e9, 3) for each in gathered],
            "load_s": round(loaded, 1),
            "first_step_s": round(seconds[0], 1),
            "loss": round(loss, 4),
            "torch": torch.__version__,
            "gpu": torch.cuda.get_device_name() if cuda else "cpu",
        }
        print(json.dumps(figures), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def _join(kind: str) -> torch.device:
    if kind == "cpu":
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def _model(wrapper: str, how: dict, arguments: argparse.Namespace, device: torch.device):
    import peft

    import surogate_load

    model = surogate_load.load_model(
        _artifact(arguments),
        recipe=arguments.recipe,
        device="meta" if wrapper == "fsdp2" else device,
        compile=None if arguments.eager else "layers",
        emulate=device.type == "cpu",
    )
    settings = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = peft.get_peft_model(model, settings, autocast_adapter_dtype=False).train()
    if how.get("checkpointed"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if wrapper == "ddp":
        ids = [device.index] if device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    if wrapper == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        return surogate_load.fully_shard(model, mesh=mesh, reshard_after_forward=how["reshard_after_forward"])
    return model


def _packed_bytes(model) -> int:
    """Bytes of packed weights that this rank keeps."""
    total = 0
    for module in model.modules():
        for name in set(getattr(module, "packed_names", ())) & set(module._parameters):
            tensor = module._parameters[name]
            total += (tensor.to_local() if hasattr(tensor, "to_local") else tensor).nbytes
    return total


def _train(model, ids, wrapper: str, captured: bool) -> tuple[list[float], float]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=ids.device.type == "cuda")
    micro_step = _captured(model) if captured else None
    seconds = []
    for _ in range(STEPS):
        _synchronize(ids.device)
        started = time.perf_counter()
        for number in range(ACCUMULATION):
            last = number == ACCUMULATION - 1
            loss = micro_step(ids) if micro_step else _micro_batch(model, ids, wrapper, last)
        optimizer.step()
        optimizer.zero_grad()
        _synchronize(ids.device)
        seconds.append(time.perf_counter() - started)
    return seconds, loss.item()


def _captured(model):
    from surogate_load import MicroStep

    step = MicroStep(model)
    return lambda ids: step(input_ids=ids, labels=ids, gradient_scale=1 / ACCUMULATION)


def _micro_batch(model, ids, wrapper: str, last: bool):
    """Forward and backward; gradients are reduced with the last one of a step."""
    if wrapper == "fsdp2":
        model.set_requires_gradient_sync(last)
    if wrapper == "ddp":
        model.require_backward_grad_sync = last  # what no_sync() sets
    loss = model(input_ids=ids, labels=ids).loss
    (loss / ACCUMULATION).backward()
    return loss.detach()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def _print(results: list[dict]) -> None:
    table = Table("row", "ranks", "tokens/s", "against one", "peak GB", "resident GB", "packed GB", "load s", "first s")
    one = max((r["tokens_per_s"] for r in results if r["row"].startswith("one") and "error" not in r), default=0)
    for result in results:
        if "error" in result:
            table.add_row(result["row"], "", result["error"].splitlines()[-1])
            continue
        ratio = f"{result['tokens_per_s'] / one:.2f}" if one else ""
        keys = ("peak_gb", "resident_gb", "packed_gb")
        figures = ("/".join(map(str, result[key])) for key in keys)
        ends = str(result["load_s"]), str(result["first_step_s"])
        table.add_row(result["row"], str(result["ranks"]), str(result["tokens_per_s"]), ratio, *figures, *ends)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
