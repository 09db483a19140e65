"""Times the calibrated pass on a Qwen3 shape of which only some blocks are built, with random bf16 weights and ids.

    python tools/bench_calibrated.py --size 8B --blocks 4 --device cuda --json bench.json

What runs is `quantize` itself, from safetensors on disk to a finished artifact. Seconds a block are measured; the time
of the whole model is extrapolated from their median and said to be. Speed depends on shapes and on the number of tokens
(by default what the pass itself would take for the widest weight), hardly on values.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from peak_memory import PeakMemory
from random_artifact import QWEN3, qwen3_config
from surogate_formats.codes_in_words import HELD_OUT
from surogate_quantize import make_options, quantize
from surogate_quantize.calibration_options import ROW, CalibrationOptions

TINY = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
"""Sizes for a trial run, with `--size tiny`."""


def main() -> None:
    """One run, its figures printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*QWEN3, "tiny"], default="8B")
    parser.add_argument("--blocks", type=int, default=4, help="that are built and timed")
    parser.add_argument("--format", choices=["nf4", "fp4", "fp8"], default="nf4")
    parser.add_argument("--tokens", type=int, help="of random calibration text, held-out rows not counted")
    parser.add_argument("--adapter-init", type=int, metavar="RANK")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-memory", default="24GiB", help="of the quantizer")
    parser.add_argument("--work", type=Path, help="directory for source, activations and artifact; emptied afterwards")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        found = bench(arguments, Path(work))
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text)


def bench(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The figures of one run."""
    config, blocks = config_of(arguments.size, arguments.blocks)
    started = time.perf_counter()
    source = random_source(config, work / "source", arguments.device)
    tokens = CalibrationOptions(tokens=arguments.tokens).tokens_for(config.intermediate_size)
    ids = torch.randint(
        0, config.vocab_size, (tokens // ROW + HELD_OUT, ROW), generator=torch.Generator().manual_seed(0)
    )
    text = work / "ids.jsonl"
    text.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids.tolist()))
    print(
        f"{arguments.blocks} random blocks and {ids.numel()} ids in {time.perf_counter() - started:.0f} s", flush=True
    )
    settings = {"calibration_text": str(text), "calibration_tokens": tokens, "adapter_init": arguments.adapter_init}
    options = make_options(arguments.format, {}, codes="calibrated", **settings)
    clock = Clock()
    how = {"device": arguments.device, "max_memory": arguments.max_memory}
    with PeakMemory(arguments.device) as peak:
        summary = quantize(source, work / "out", options, told=clock.told, watch=clock.watch, **how)
    each = clock.seconds_each()
    rest = summary.seconds - sum(each)
    return {
        "size": arguments.size,
        "format": arguments.format,
        "adapter_init": arguments.adapter_init,
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "tokens": ids.numel(),
        "peak_gb": peak.gigabytes,
        "seconds_measured": round(summary.seconds, 1),
        "seconds_of_each_block": [round(seconds, 1) for seconds in each],
        "seconds_beside_the_blocks": round(rest, 1),
        f"minutes_EXTRAPOLATED_to_{blocks}_blocks": round((statistics.median(each) * blocks + rest) / 60, 1),
        "output_error": summary.output_error,
    }


class Clock:
    """Notes when blocks begin, and when the last one has ended."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def told(self, line: str) -> None:
        """Takes what the pass says."""
        print(line, flush=True)
        if line.startswith("calibrating block"):
            self._times.append(time.perf_counter())

    def watch(self, *_: Any) -> Any:
        """Is called once all blocks are solved; takes no further interest."""
        self._times.append(time.perf_counter())
        return lambda tensor: None

    def seconds_each(self) -> list[float]:
        """Of the blocks."""
        return [after - before for before, after in zip(self._times, self._times[1:], strict=False)]


def config_of(size: str, blocks: int) -> tuple[PretrainedConfig, int]:
    """A config cut to some blocks, and how many blocks the model has."""
    if size == "tiny":
        config = qwen3_config("0.6B")
        config.update({**TINY, "head_dim": 32, "vocab_size": 512})
    else:
        config = qwen3_config(size)
    whole = config.num_hidden_layers
    config.num_hidden_layers = blocks
    config.layer_types = ["full_attention"] * blocks
    return config, whole


def random_source(config: PretrainedConfig, out: Path, device: str) -> Path:
    """Writes a checkpoint with the weights that transformers initializes, bf16; made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(out)
    return out


if __name__ == "__main__":
    main()
