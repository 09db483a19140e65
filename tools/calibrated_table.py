"""The table of docs/calibration.md in one command: formats and codes of a model, by KL, time and memory, row by row.

    python tools/calibrated_table.py .demo/smollm2-135m --device cuda --json table.json --markdown table.md

Each row quantizes the model, loads the artifact in float32 on the same device, and compares it with the original. All
calibrated rows take one text, which the model writes first (seconds of a row are without it). The files of ids that
`--calibration-text` and `--texts` name are read where they exist, else written: a machine without network, prose or
this Python's own reference then measures on the same tokens. JSON and markdown are written anew after each row.
"""

import argparse
import gc
import json
import tempfile
import time
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibrated_quality import make_texts
from peak_memory import PeakMemory
from surogate_formats.codes_in_words import CODES, HELD_OUT
from surogate_load import load_model
from surogate_load.divergence import kl_and_perplexity, reference_logprobs
from surogate_load.tokenizer import load_tokenizer
from surogate_quantize import make_options, quantize
from surogate_quantize.calibration.text import written_rows
from surogate_quantize.calibration_options import ROW, CalibrationOptions

FORMATS = {
    "NF4": ("nf4", {}, None),
    "NF4 bitsandbytes": ("nf4", {}, "bitsandbytes"),
    "NVFP4 1-D": ("fp4", {"two_d": False}, None),
    "NVFP4 2-D": ("fp4", {}, None),
    "FP8 tensor": ("fp8", {}, None),
    "FP8 channel": ("fp8", {"scaling": "channel"}, None),
}
"""What stands in the table: format, its parameters and the layout (None: the format's first)."""

RANK = 16


@dataclass(frozen=True)
class Row:
    """One line of the table.

    A key of `FORMATS`, how codes are chosen, the adapter's rank or None, and whether both were chosen together.
    """

    format: str
    codes: str
    rank: int | None = None
    joint: bool = False

    @property
    def name(self) -> str:
        """What `--rows` is compared with."""
        return f"{self.format} {self.codes}" + (f" + {self.rank}" if self.rank else "") + " joint" * self.joint


ROWS = [
    *(Row(name, codes) for name in FORMATS for codes in CODES),
    *(Row("NF4", codes, RANK) for codes in CODES),
    Row("NF4", "calibrated", RANK, joint=True),
]


def main() -> None:
    """Measures the rows that are asked for."""
    arguments = _arguments()
    rows = [row for row in ROWS if any(fnmatchcase(row.name, pattern) for pattern in arguments.rows)]
    if not rows:
        raise SystemExit(f"no such rows; there are: {', '.join(row.name for row in ROWS)}")
    source, device = arguments.source, arguments.device
    if arguments.keep:
        arguments.keep.mkdir(parents=True, exist_ok=True)
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(device).eval()
    table = Table(arguments, source, device)
    if any(row.codes == "calibrated" or row.rank for row in rows):
        table.told("seconds_of_writing", calibration_text(dense, source, arguments.calibration_text))
    texts = evaluation_texts(source, arguments.texts, arguments.prose)
    known = {name: (ids, reference_logprobs(dense, ids)) for name, ids in texts.items()}
    del dense
    table.texts = list(texts)
    for row in rows:
        table.add(measured(row, source, device, known, arguments.calibration_text, arguments.keep))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="directory of the dense checkpoint")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="PATTERN", help="such as 'NF4 *' or '* calibrated'")
    parser.add_argument("--calibration-text", type=Path, default=Path("calibration-ids.jsonl"), metavar="FILE")
    parser.add_argument("--texts", type=Path, metavar="FILE", help="ids of the texts to compare on, JSON")
    parser.add_argument("--prose", type=Path, metavar="FILE", help="a text to compare on, where --texts is made")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the artifacts there")
    return parser.parse_args()


def calibration_text(model: Any, source: Path, file: Path) -> float:
    """Lets the model write the rows that a pass takes by default, unless the file is there; seconds."""
    if file.exists():
        return 0.0
    started = time.perf_counter()
    widest = max(module.in_features for module in model.base_model.layers.modules() if hasattr(module, "in_features"))
    length = min(ROW, model.config.max_position_embeddings)
    rows = -(-CalibrationOptions().tokens_for(widest) // length) + HELD_OUT
    written = torch.cat(list(written_rows(model, load_tokenizer(source), rows, length, CalibrationOptions().seed)))
    file.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in written.tolist()))
    return round(time.perf_counter() - started, 1)


def evaluation_texts(source: Path, file: Path | None, prose: Path | None) -> dict[str, torch.Tensor]:
    """int64 [windows, tokens] of each text by its name, from the file if it is there."""
    if file is not None and file.exists():
        return {name: torch.tensor(ids) for name, ids in json.loads(file.read_text()).items()}
    made = make_texts(AutoTokenizer.from_pretrained(source), prose)
    if file is not None:
        file.write_text(json.dumps({name: ids.tolist() for name, ids in made.items()}))
    return made


def measured(
    row: Row, source: Path, device: str, known: dict[str, tuple[torch.Tensor, torch.Tensor]], text: Path, keep: Any
) -> dict[str, Any]:
    """The figures of a row; where it fails, `error`."""
    name, parameters, layout = FORMATS[row.format]
    calibrates = row.codes == "calibrated" or row.rank
    settings = {"calibration_text": str(text), "adapter_init": row.rank} if calibrates else {}
    settings |= {"adapter_joint": True} if row.joint else {}
    found: dict[str, Any] = {"row": row.name, "format": row.format, "codes": row.codes, "rank": row.rank}
    try:
        options = make_options(name, parameters, layout, codes=row.codes, **settings)
        with tempfile.TemporaryDirectory() as scratch:
            out = (keep or Path(scratch)) / row.name.replace(" ", "-")
            with PeakMemory(device) as peak:
                summary = quantize(source, out, options, device=device, max_memory="8GiB")
            found |= {"seconds": round(summary.seconds, 1), "peak_gb": peak.gigabytes}
            found |= {"bits_per_weight": summary.plan.bits_per_weight, "artifact_bytes": summary.plan.artifact_bytes}
            found["output_error"] = summary.output_error
            model = load_model(out, "bf16", device, torch.float32, adapter="init" if row.rank else None)
        compared = {text: kl_and_perplexity(model, *with_reference) for text, with_reference in known.items()}
        found["kl"] = {text: round(figures[0], 5) for text, figures in compared.items()}
        found["perplexity"] = {text: round(figures[1], 3) for text, figures in compared.items()}
    except Exception as error:  # the rows after it are worth having
        found["error"] = f"{type(error).__name__}: {error}"
    gc.collect()
    return found


class Table:
    """What is known so far, printed as it comes and written to files after each row.

    Attributes:
        texts: names of those that models are compared on.
    """

    def __init__(self, arguments: argparse.Namespace, source: Path, device: str) -> None:
        self._json, self._markdown = arguments.json, arguments.markdown
        gpu = device == "cuda"
        self._found: dict[str, Any] = {
            "model": source.name,
            "device": torch.cuda.get_device_name() if gpu else f"cpu, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
            "rows": [],
        }
        self._kinds = ["host", "gpu", "card"] if gpu else ["host"]
        self.texts: list[str] = []

    def told(self, key: str, value: object) -> None:
        """Notes what is no row."""
        self._found[key] = value
        print(f"{key}: {value}", flush=True)

    def add(self, row: dict[str, Any]) -> None:
        """Prints a row, its header before the first, and writes the files."""
        rows = self._found["rows"]
        rows.append(row)
        lines = self._lines()
        print("\n".join(lines if len(rows) == 1 else lines[-1:]), flush=True)
        if self._json:
            self._json.write_text(json.dumps(self._found, indent=1))
        if self._markdown:
            self._markdown.write_text("\n".join(lines) + "\n")

    def _lines(self) -> list[str]:
        columns = ["", *(f"KL {text}" for text in self.texts), "seconds", *(f"{kind} GB" for kind in self._kinds)]
        return [_line(columns), "|---" * len(columns) + "|", *(_line(self._cells(row)) for row in self._found["rows"])]

    def _cells(self, row: dict[str, Any]) -> list[str]:
        if "error" in row:
            return [row["row"], row["error"]]
        memory = [f"{row['peak_gb'][kind]:.2f}" for kind in self._kinds]
        return [row["row"], *(f"{row['kl'][text]:.4f}" for text in self.texts), str(row["seconds"]), *memory]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
