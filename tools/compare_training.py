"""Does a better base train better? LoRA from bitsandbytes' codes, nearest ones, calibrated ones and their adapter.

    python tools/compare_training.py .demo/smollm2-135m CALIBRATED --json training.json --plot docs/training_loss.svg

All start from one model, on the same rows of CPython's reference in the same order, with the same seed, rank and rate,
in float32; the loss on rows that none trains on is measured as they go. CALIBRATED is an artifact of the model that was
made with `--calibrate --adapter-init 16`; the others are made here. The lines start where the bases' errors put them:
what counts is how much of the distance is left at the end. Weights are dequantized once and multiplied densely: recipe
bf16 in float32 gives the same numbers, and takes a CPU three times as long. Bases that the JSON file holds are not
trained from again.
"""

import argparse
import json
import pydoc_data.topics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo import quiet_libraries
from surogate_formats.artifact import ADAPTER
from surogate_load import open_artifact
from surogate_quantize import make_options, quantize

RANK, ALPHA, RATE, ROW, HELD_OUT, EVERY = 16, 32, 2e-4, 128, 16, 40
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Trains from every base, prints losses, draws them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="directory of the dense checkpoint")
    parser.add_argument("calibrated", type=Path, help="artifact with an adapter-init")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="SVG or PNG")
    arguments = parser.parse_args()
    quiet_libraries()
    rows = text_rows(arguments.source, arguments.steps)
    curves = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name, make in bases(arguments.source, arguments.calibrated, Path(folder)).items():
            if name not in curves:
                curves[name] = train(make().to(arguments.device), *rows)
            print(json.dumps({"base": name, **curves[name]}), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(curves, indent=1))
    if arguments.plot:
        undated = {"Date": None} if arguments.plot.suffix == ".svg" else {}
        draw(curves).savefig(arguments.plot, bbox_inches="tight", metadata=undated)
    show(curves)


def bases(source: Path, calibrated: Path, folder: Path) -> dict[str, Callable[[], Any]]:
    """By name what makes a model with an adapter."""
    for layout in ("bitsandbytes", "surogate"):
        quantize(source, folder / layout, make_options("nf4", {}, layout))
    packed = {"bitsandbytes": folder / "bitsandbytes", "nearest": folder / "surogate", "calibrated": calibrated}

    def on_artifact(path: Path) -> Any:
        return adapted(dense(source, path))

    def with_initial() -> Any:
        return peft.PeftModel.from_pretrained(dense(source, calibrated), calibrated / ADAPTER, is_trainable=True)

    return {
        "bf16": lambda: adapted(dense(source)),
        **{name: partial(on_artifact, path) for name, path in packed.items()},
        "calibrated + adapter": with_initial,
    }


def dense(source: Path, artifact: Path | None = None) -> Any:
    """The model in float32, its weights as an artifact has them."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    if artifact is not None:
        with open_artifact(artifact) as opened:
            for name in opened:
                model.get_submodule(name).weight.data = opened[name].dequantize()
    return model


def adapted(model: Any) -> Any:
    """With an adapter that changes nothing yet."""
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS))


def text_rows(source: Path, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [steps, ROW] to train on, in an order that a seed gives, and [HELD_OUT, ROW] to measure on."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[key] for key in sorted(topics))
    ids = AutoTokenizer.from_pretrained(source)(text, add_special_tokens=False)["input_ids"]
    rows = torch.tensor(ids[: len(ids) // ROW * ROW]).reshape(-1, ROW)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    if len(rows) < steps + HELD_OUT:
        raise SystemExit(f"the text has {len(rows)} rows of {ROW} tokens: --steps {len(rows) - HELD_OUT} at most")
    return rows[HELD_OUT : HELD_OUT + steps], rows[:HELD_OUT]


def train(model: Any, rows: torch.Tensor, held_out: torch.Tensor) -> dict[str, list[float]]:
    """`training` losses of every step, and `held_out` ones before the first and after every EVERY steps."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    found: dict[str, list[float]] = {"training": [], "held_out": [measured(model, held_out)]}
    for step, row in enumerate(rows, 1):
        ids = row[None].to(model.device)
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found["training"].append(round(loss.item(), 4))
        if step % EVERY == 0:
            found["held_out"].append(measured(model, held_out))
    return found


@torch.no_grad()
def measured(model: Any, rows: torch.Tensor) -> float:
    """Mean loss a token."""
    model.eval()
    losses = [model(input_ids=ids, labels=ids).loss.item() for ids in rows.to(model.device).split(4)]
    return round(sum(losses) / len(losses), 5)


def draw(curves: dict[str, dict[str, list[float]]]) -> Figure:
    """Held-out losses by step."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    for name, curve in curves.items():
        losses = curve["held_out"]
        style = {"color": "black", "linestyle": ":"} if name == "bf16" else {}
        ax.plot([EVERY * place for place in range(len(losses))], losses, label=name, **style)
    ax.set_xlabel(f"steps of {ROW} tokens")
    ax.set_ylabel("held-out loss, nats a token")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return figure


def show(curves: dict[str, dict[str, list[float]]]) -> None:
    """Prints both losses at the start and at the end."""
    table = Table("base", "held-out, first", "held-out, last", "behind bf16 at the end", "training, last 50")
    least = curves["bf16"]["held_out"][-1]
    for name, curve in curves.items():
        held, late = curve["held_out"], curve["training"][-50:]
        table.add_row(
            name, f"{held[0]:.3f}", f"{held[-1]:.3f}", f"{held[-1] - least:+.4f}", f"{sum(late) / len(late):.3f}"
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
