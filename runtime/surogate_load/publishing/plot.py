"""The picture in a model card: the relative error of every quantized weight, and of outputs, by layer."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from typing import Any

from surogate_formats.block_errors import output_errors
from surogate_formats.manifest import Manifest

INCHES = (9.0, 4.5)
DOTS_PER_INCH = 120

_LAYER = re.compile(r"\.(\d+)\.")


def errors_by_projection(manifest: Manifest) -> dict[str, dict[int, float]]:
    """Projection to layer to relative error; of experts of one layer, the largest."""
    lines: dict[str, dict[int, float]] = defaultdict(dict)
    for name, record in manifest.tensors.items():
        layer = _LAYER.search(name)
        if record.relative_error is None or layer is None:
            continue
        line, number = lines[name.removesuffix(".weight").rpartition(".")[2]], int(layer[1])
        line[number] = max(record.relative_error, line.get(number, 0.0))
    return {name: dict(sorted(line.items())) for name, line in lines.items()}  # files hold layer 10 before layer 2


def error_plot(manifest: Manifest) -> bytes | None:
    """A PNG; None without matplotlib, or without a quantized weight in a numbered layer."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    lines = errors_by_projection(manifest)
    if not lines:
        return None
    blocks = output_errors(manifest.tensors)
    width, height = INCHES
    figure = Figure(figsize=(width, height * (2 if blocks else 1)), layout="constrained")
    axes, *below = figure.subplots(2 if blocks else 1, squeeze=False)[:, 0]
    for name, errors in lines.items():
        axes.plot(list(errors), list(errors.values()), marker=".", linewidth=1, label=name)
    _finish(axes, "relative error of the weight")
    for other in below:
        nearest, packed = ([getattr(error, of) for error in blocks.values()] for of in ("nearest", "packed"))
        other.plot(list(blocks), nearest, marker=".", linewidth=1, color="0.5", label="nearest codes")
        other.plot(list(blocks), packed, marker=".", linewidth=1.5, color="black", label=_packed(manifest))
        _finish(other, "relative error of linears' outputs\non held-out text, mean of a block")
        other.set_ylim(bottom=0)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return picture.getvalue()


def _finish(axes: Any, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel="layer", ylabel=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _packed(manifest: Manifest) -> str:
    codes = manifest.options.get("codes", "nearest")
    return str(codes) + (" codes" if manifest.options.get("adapter_init") is None else " codes and adapter")
