"""Draws the figures of `bench_train.py --json`: tokens a second of every row, one panel a model size.

    python tools/plot_training.py small.json large.json --out docs/training_speed.svg

Rows without a figure (out of memory, say) are written down as such. Files may be of several runs; rows of one size
should be of one, since machines differ.
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

OURS, PEER = "#2c6fbb", "#b4b4b4"
ROW_INCHES = 0.26


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="what bench_train.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="SVG or PNG")
    arguments = parser.parse_args()
    rows = [row for path in arguments.results for row in json.loads(path.read_text())]
    draw(rows).savefig(arguments.out, bbox_inches="tight", metadata=_undated(arguments.out))


def draw(rows: list[dict]) -> Figure:
    """One panel a size, in the order in which sizes come; the fastest row of a panel on top."""
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    panels = [sorted((row for row in rows if row["size"] == size), key=_speed) for size in sizes]
    heights = [len(panel) for panel in panels]
    figure = Figure(figsize=(8, ROW_INCHES * sum(heights) + 0.6 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for size, panel, ax in zip(sizes, panels, axes, strict=True):
        _panel(ax, size, panel)
    axes[-1].set_xlabel("tokens a second (peak GB)")
    return figure


def _panel(ax, size: str, panel: list[dict]) -> None:
    names = [row["row"] for row in panel]
    colors = [PEER if name.startswith(("bitsandbytes", "unsloth")) else OURS for name in names]
    ax.barh(names, [_speed(row) for row in panel], color=colors, height=0.7)
    for place, row in enumerate(panel):
        text = "did not run" if "error" in row else f"{row['tokens_per_s']:,} ({row['peak_gb']})"
        ax.text(_speed(row), place, f" {text}", va="center", fontsize=8)
    ax.set_title(size, loc="left", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8, left=False)
    ax.margins(x=0.18, y=0.02)


def _speed(row: dict) -> int:
    return row.get("tokens_per_s", 0)


def _undated(out: Path) -> dict[str, None]:
    return {"Date": None} if out.suffix == ".svg" else {}


if __name__ == "__main__":
    main()
