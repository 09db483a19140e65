"""Times loading a packed model beside quantizing it online from bf16 with bitsandbytes, in one run on one GPU.

Weights are random, of a Qwen3 shape. Files are in the page cache, since they were just written. Each row is a process
of its own, whose imports don't count: they are done before, for either row.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from random_artifact import PARAMETERS, QWEN3, qwen3_config, write_random_artifact
from surogate_formats.registry import make_format

ROWS = ("nf4", "fp4", "fp8", "bitsandbytes online")


def main() -> None:
    """Writes the files, runs the rows, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=QWEN3, default="8B")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["nf4", "bitsandbytes online"])
    parser.add_argument("--folder", type=Path, help="where the files go; by default a temporary folder")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        row, path = arguments.one
        print(json.dumps(_load(row, Path(path))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        results = {row: _in_a_process(row, _written(row, arguments.size, folder)) for row in arguments.rows}
    table = Table(arguments.size, "seconds", "peak GB", "resident GB")
    for row, (seconds, peak, resident) in results.items():
        table.add_row(row, f"{seconds:.1f}", f"{peak:.1f}", f"{resident:.1f}")
    Console(width=80).print(table)


def _written(row: str, size: str, folder: Path) -> Path:
    path = folder / f"qwen3-{size}-{row.partition(' ')[0]}"
    if path.exists():
        return path
    if row in PARAMETERS:
        return write_random_artifact(qwen3_config(size), make_format(row, PARAMETERS[row]), path)
    from transformers import AutoModelForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(qwen3_config(size))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(path, max_shard_size="4GB")
    del model
    torch.cuda.empty_cache()
    return path


def _in_a_process(row: str, path: Path) -> list[float]:
    ran = subprocess.run(
        [sys.executable, __file__, "--one", row, str(path)], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(ran.stdout.strip().splitlines()[-1])


def _load(row: str, path: Path) -> tuple[float, float, float]:
    """(seconds, peak GB, resident GB) of the device."""
    import transformers

    importlib.import_module("transformers.models.qwen3.modeling_qwen3")
    importlib.import_module("surogate_load.hf_quantizer" if row in PARAMETERS else "bitsandbytes")
    torch.zeros(1, device="cuda")
    if row in PARAMETERS:
        from surogate_load import load_model

        started = time.perf_counter()
        model = load_model(path, device="cuda")
    else:
        settings = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        started = time.perf_counter()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, quantization_config=settings, device_map={"": 0}, dtype=torch.bfloat16
        )
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    figures = seconds, torch.cuda.max_memory_allocated() / 1e9, torch.cuda.memory_allocated() / 1e9
    del model
    return figures


if __name__ == "__main__":
    main()
