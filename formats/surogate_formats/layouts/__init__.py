"""The layouts by name. A new layout is one module, one row in `LAYOUTS` and one in `QUANT_METHODS`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surogate_formats.errors import UsageError
from surogate_formats.format import Format
from surogate_formats.layouts.bitsandbytes import BitsandbytesLayout
from surogate_formats.layouts.compressed_tensors import CompressedTensorsLayout
from surogate_formats.layouts.hf_fp8 import HfFp8Layout
from surogate_formats.layouts.layout import (
    DescribingLayout,
    Layout,
    LayoutRefusesError,
    RecodingLayout,
    SidecarLayout,
    StoredTensor,
    UnreadableConfigError,
    pack,
    stored_arrays,
    stored_tensors,
    unpack,
)
from surogate_formats.layouts.modelopt import ModelOptLayout
from surogate_formats.layouts.surogate import METHODS, SurogateLayout
from surogate_formats.registry import make_format

__all__ = [
    "FOR_EXPERTS",
    "LAYOUTS",
    "DescribingLayout",
    "Layout",
    "LayoutRefusesError",
    "RecodingLayout",
    "SidecarLayout",
    "StoredTensor",
    "UnreadableConfigError",
    "layout_of_config",
    "pack",
    "settle",
    "stored_arrays",
    "stored_tensors",
    "unpack",
]

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (SurogateLayout(), CompressedTensorsLayout(), HfFp8Layout(), BitsandbytesLayout(), ModelOptLayout())
}
"""Layouts by the name that `--layout` takes; the first that accepts a format is its default."""

QUANT_METHODS = {
    **dict.fromkeys(METHODS, "surogate"),
    "compressed-tensors": "compressed-tensors",
    "fp8": "hf-fp8",
    "bitsandbytes": "bitsandbytes",
    "modelopt": "modelopt",
}
"""The layout that each `quant_method` of config.json stands for."""

FOR_EXPERTS = {"fp4": "modelopt"}
"""Format name to the default layout where experts are quantized: no reader of these takes them wrongly."""


def settle(name: str, parameters: Mapping[str, Any], layout: str | None = None) -> tuple[Format, Layout]:
    """The format with these parameters in the layout of that name, by default in the first layout that takes it.

    A layout may fix parameters that its readers need (`Layout.fixed`). A parameter given as None is as good as not
    given: it takes the layout's value, or the format's default.

    Raises:
        LayoutRefusesError: the layout can't store this format; the message says why.
        UsageError: an unknown format, layout, parameter or value.
    """
    if layout is not None and layout not in LAYOUTS:
        raise UsageError(f"no layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    given = {key: value for key, value in parameters.items() if value is not None}
    defaults = vars(make_format(name, {}))
    make_format(name, {key: value if key in given else defaults.get(key) for key, value in parameters.items()})
    refusals = []
    for candidate in LAYOUTS.values() if layout is None else (LAYOUTS[layout],):
        fmt = make_format(name, {**candidate.fixed.get(name, {}), **given})
        refusal = candidate.refusal(fmt)
        if refusal is None:
            return fmt, candidate
        foreign = name not in candidate.suffixes
        others = f"; use {_layouts_of(name)}" if foreign else ""
        refusals.append((foreign, f"layout {candidate.name}: {refusal}{others}"))
    raise LayoutRefusesError(min(refusals)[1])


def _layouts_of(name: str) -> str:
    return " and ".join(key for key, layout in LAYOUTS.items() if name in layout.suffixes)


def layout_of_config(config: object) -> Layout:
    """The layout that a `quantization_config` is written in; `UnreadableConfigError` if we know none."""
    method = config.get("quant_method") if isinstance(config, dict) else None
    if not isinstance(method, str) or method not in QUANT_METHODS:
        known = ", ".join(QUANT_METHODS)
        raise UnreadableConfigError(f"quantization_config: quant_method {method!r:.80} can't be read; known: {known}")
    return LAYOUTS[QUANT_METHODS[method]]
