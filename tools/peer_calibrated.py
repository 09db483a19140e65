"""What others' calibrated 4 bits make of the demo's model, on the tokens of calibrated_table.py.

    python tools/calibrated_table.py .demo/smollm2-135m --calibration-text ids.jsonl --texts texts.json --prose FILE
    python tools/peer_calibrated.py .demo/smollm2-135m ids.jsonl texts.json --json peers.json

auto-round and llmcompressor aren't among our dependencies: install them beside ours in another environment. Every block
linear is quantized, embeddings and head are not; models are compared in float32 with their weights dequantized by the
peer itself. Bits are those of codes, scales and zero points of the quantized weights, as the peer would store them.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from surogate_load.divergence import kl_and_perplexity, reference_logprobs

BATCH = 4

GROUP = 64
"""Weights that share a scale: 128, the peers' own choice, doesn't divide the model's 576."""


def main() -> None:
    """Measures the rows that are asked for; prints each, and writes them after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="directory of the dense checkpoint")
    parser.add_argument("calibration_text", type=Path, help="its rows of ids, JSON lines")
    parser.add_argument("texts", type=Path, help="ids of the texts to compare on, JSON")
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="PATTERN", help=", ".join(ROWS))
    parser.add_argument("--iters", type=int, default=200, help="steps of auto-round for each block")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    lines = arguments.calibration_text.read_text().splitlines()
    rows = torch.tensor([json.loads(line)["input_ids"] for line in lines])
    texts = {name: torch.tensor(ids) for name, ids in json.loads(arguments.texts.read_text()).items()}
    dense = _model(arguments.source)
    known = {name: (ids, reference_logprobs(dense, ids)) for name, ids in texts.items()}
    del dense
    found = []
    for name, (quantized, bits) in ROWS.items():
        if any(fnmatchcase(name, pattern) for pattern in arguments.rows):
            gc.collect()
            started = time.perf_counter()
            model = quantized(arguments, rows)
            taken = time.perf_counter() - started
            compared = {text: kl_and_perplexity(model, *reference)[0] for text, reference in known.items()}
            kl = {text: round(value, 4) for text, value in compared.items()}
            found.append({"row": name, "bits_per_weight": bits, "kl": kl, "seconds": round(taken, 1)})
            print(json.dumps(found[-1]), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(found, indent=1))


def _model(source: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()


def _auto_round(symmetric: bool) -> Callable[[argparse.Namespace, Tensor], Any]:
    def quantized(arguments: argparse.Namespace, rows: Tensor) -> Any:
        from auto_round import AutoRound

        model = _model(arguments.source)
        data = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in rows]
        rounding = AutoRound(
            model,
            AutoTokenizer.from_pretrained(arguments.source),
            scheme={"bits": 4, "group_size": GROUP, "sym": symmetric, "data_type": "int", "act_bits": 16},
            dataset=data,
            iters=arguments.iters,
            seqlen=rows.shape[1],
            nsamples=len(rows),
            batch_size=BATCH,
            device_map="cpu",
            enable_torch_compile=False,
        )
        return rounding.quantize()[0].float().eval()

    return quantized


def _gptq(weights: dict[str, Any]) -> Callable[[argparse.Namespace, Tensor], Any]:
    def quantized(arguments: argparse.Namespace, rows: Tensor) -> Any:
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers.quantization import GPTQModifier

        model = _model(arguments.source)
        data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()})
        oneshot(
            model=model,
            tokenizer=AutoTokenizer.from_pretrained(arguments.source),
            dataset=data,
            recipe=GPTQModifier(config_groups={"linears": {"targets": ["Linear"], **weights}}, ignore=["lm_head"]),
            num_calibration_samples=len(rows),
            max_seq_length=rows.shape[1],
            pipeline="sequential",
        )
        return model.float().eval()

    return quantized


def _int4(symmetric: bool) -> dict[str, Any]:
    settings = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": symmetric}
    return {"weights": settings}


_NVFP4 = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": "torch.float8_e4m3fn",
}

ROWS: dict[str, tuple[Callable[[argparse.Namespace, Tensor], Any], float]] = {
    "GPTQ int4": (_gptq(_int4(True)), 4 + 16 / GROUP),
    "GPTQ int4 with zero points": (_gptq(_int4(False)), 4 + 20 / GROUP),
    "GPTQ NVFP4": (_gptq({"weights": _NVFP4}), 4.5),
    "auto-round int4": (_auto_round(True), 4 + 16 / GROUP),
    "auto-round int4 with zero points": (_auto_round(False), 4 + 20 / GROUP),
}
"""Name to what quantizes, and the bits of a weight: codes, a 16-bit scale a group (NVFP4: 8 bits), zero points."""

if __name__ == "__main__":
    main()
