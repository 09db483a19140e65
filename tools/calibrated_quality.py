"""KL of artifacts of SmolLM2-135M against the original, on licences, the prose of a file, and a language reference.

Texts are 3 x 1024 tokens each without special tokens; arithmetic is float32 on dequantized weights. The prose is named
on the command line (perl's Locale/Maketext/TPJ13.pod from token 300 on, in the project's figures); the language
reference is CPython's own, which nothing was tuned on.
"""

import argparse
import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation_text import licence_windows
from make_smollm2 import make_smollm2
from surogate_load import load_model
from surogate_load.divergence import kl_and_perplexity, reference_logprobs

DEMO = Path(__file__).resolve().parents[1] / ".demo"
WINDOWS, TOKENS = 3, 1024


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifacts", nargs="+", help="directories; DIR:init starts from its adapter")
    parser.add_argument("--prose", type=Path, help="a text file")
    arguments = parser.parse_args()
    source = make_smollm2(DEMO / "smollm2-135m")
    texts = make_texts(AutoTokenizer.from_pretrained(source), arguments.prose)
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    table = Table("artifact", "codes", *(f"KL {name}" for name in texts))
    measured: dict[str, list[str]] = {name: [] for name in arguments.artifacts}
    for ids in texts.values():
        reference = reference_logprobs(dense, ids)
        for name in arguments.artifacts:
            measured[name].append(f"{kl_and_perplexity(load(name), ids, reference)[0]:.4f}")
    for name, row in measured.items():
        options = json.loads((Path(name.removesuffix(":init")) / "surogate.json").read_text())["options"]
        table.add_row(Path(name).name, options["codes"], *row)
    Console(highlight=False).print(table)


def make_texts(tokenizer: Any, prose: Path | None) -> dict[str, torch.Tensor]:
    """int64 [3, 1024] of each text, by its name."""
    topics = pydoc_data.topics.topics
    reference = "\n".join(topics[key] for key in sorted(topics))
    texts = {"licences": licence_windows(tokenizer, TOKENS)}
    if prose is not None:
        texts["prose"] = cut(tokenizer, prose.read_text("utf-8"), 300)
    return texts | {"reference": cut(tokenizer, reference, 5000)}


def cut(tokenizer: Any, text: str, first: int) -> torch.Tensor:
    """Windows of a text from a token on."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][first : first + WINDOWS * TOKENS]
    return torch.tensor(ids).reshape(WINDOWS, TOKENS)


def load(name: str) -> Any:
    """An artifact in float32, with its adapter where the name ends in `:init`."""
    adapter = "init" if name.endswith(":init") else None
    return load_model(name.removesuffix(":init"), "bf16", dtype=torch.float32, adapter=adapter)


if __name__ == "__main__":
    main()
