"""`make demo`: SmolLM2-135M packed into every format, compared with the original, and LoRA learning on each.

Everything runs on the CPU in float32, so that the only difference between the rows is the weights.
"""

import argparse
import logging
import time
import warnings
from dataclasses import dataclass
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
from surogate_quantize import make_options, quantize
from surogate_quantize.summary import RunSummary

DEMO = Path(__file__).resolve().parents[1] / ".demo"


@dataclass(frozen=True)
class Row:
    """One artifact of the demo: what the user would type, and what that means."""

    label: str
    format_name: str
    parameters: dict[str, Any]
    trained: bool


ROWS = (
    Row("--format nf4", "nf4", {}, trained=True),
    Row("--format fp4", "fp4", {}, trained=False),
    Row("--format fp4 --1d", "fp4", {"two_d": False}, trained=True),
    Row("--format fp8", "fp8", {}, trained=True),
)


def main() -> None:
    """Makes the model, the artifacts and both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="LoRA steps on each artifact (default 20)")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of each of three texts (default 1024)")
    arguments = parser.parse_args()
    quiet_libraries()
    started, console = time.perf_counter(), Console(highlight=False, width=100)
    source = make_smollm2(DEMO / "smollm2-135m")
    console.print(f"SmolLM2-135M-Instruct in bf16: {source}")
    summaries = {row.label: pack(console, source, row) for row in ROWS}
    console.print(compare(source, summaries, arguments.tokens))
    console.print(train_all(source, summaries, arguments.steps))
    console.print(f"{time.perf_counter() - started:.0f} s in all")


def quiet_libraries() -> None:
    """Bars and deprecation warnings of the libraries underneath would drown the tables."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("torchao").setLevel(logging.ERROR)
    logging.getLogger("torch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)


def pack(console: Console, source: Path, row: Row) -> RunSummary:
    """Quantizes into a directory named after the row; an artifact of an earlier demo is replaced."""
    out = DEMO / "-".join(["smollm2-135m", *row.label.replace("--", "").split()[1:]])
    summary = quantize(source, out, make_options(row.format_name, row.parameters), overwrite=True)
    console.print(f"surogate-quantize {source.name} {row.label} --out {out.name}: {summary.seconds:.1f} s")
    return summary


def compare(source: Path, summaries: dict[str, RunSummary], tokens: int) -> Table:
    """Size, weight error, KL divergence and perplexity of every artifact on three licence texts."""
    ids = licence_windows(AutoTokenizer.from_pretrained(source), tokens)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    reference = reference_logprobs(model, ids)
    table = Table(title=f"Against the bf16 model, on {ids.numel()} tokens of licence texts")
    for column in ("", "MB", "bits/weight", "weight error", "mean KL (nats)", "perplexity"):
        table.add_column(column, justify="left" if not column else "right")
    _, perplexity = kl_and_perplexity(model, ids, reference)
    size = next(iter(summaries.values())).plan.source_bytes / 1e6
    table.add_row("bf16", f"{size:.1f}", "16.000", "", "", f"{perplexity:.2f}")
    for label, summary in summaries.items():
        packed = load_model(summary.out, recipe="bf16", dtype=torch.float32)
        divergence, perplexity = kl_and_perplexity(packed, ids, reference)
        table.add_row(
            label,
            f"{summary.plan.artifact_bytes / 1e6:.1f}",
            f"{summary.plan.bits_per_weight:.3f}",
            f"{summary.relative_error:.4f}",
            f"{divergence:.4f}",
            f"{perplexity:.2f}",
        )
    return table


def train_all(source: Path, summaries: dict[str, RunSummary], steps: int) -> Table:
    """LoRA on each packed base: loss on the training text before and after."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    batch = licence_windows(tokenizer, 128)
    table = Table(title=f"{steps} LoRA steps (r=16, all linears) on 3 x 128 tokens")
    for column in ("", "loss before", "loss after", "s/step"):
        table.add_column(column, justify="left" if not column else "right")
    for row in ROWS:
        if row.trained:
            before, after, seconds = train(summaries[row.label].out, batch, steps)
            table.add_row(row.label, f"{before:.3f}", f"{after:.3f}", f"{seconds:.2f}")
    return table


def train(artifact: str, batch: torch.Tensor, steps: int) -> tuple[float, float, float]:
    """An ordinary PEFT loop; returns the first loss, the loss after the last step, and seconds a step."""
    import peft

    torch.manual_seed(0)
    model = load_model(artifact, recipe="bf16", dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=5e-4)
    model.train()
    losses, started = [], time.perf_counter()
    for _ in range(steps):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    seconds = (time.perf_counter() - started) / steps
    with torch.no_grad():
        after = model(input_ids=batch, labels=batch).loss.item()
    return losses[0], after, seconds


if __name__ == "__main__":
    main()
