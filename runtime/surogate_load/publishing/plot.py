"""The picture in a model card: the relative error of every quantized weight, by layer."""

from __future__ import annotations

import io
import re
from collections import defaultdict

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
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return None
    lines = errors_by_projection(manifest)
    if not lines:
        return None
    figure = Figure(figsize=INCHES, layout="constrained")
    axes = figure.add_subplot()
    for name, errors in lines.items():
        axes.plot(list(errors), list(errors.values()), marker=".", linewidth=1, label=name)
    axes.set(xlabel="layer", ylabel="relative error of the weight")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return picture.getvalue()
