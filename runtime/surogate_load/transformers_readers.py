"""What transformers' own readers make of our artifacts: said, or refused where they would be silently wrong.

Layouts other than `surogate` have a `quant_method` that transformers reads itself; `from_pretrained` never asks us.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from surogate_formats.errors import SurogateError
from surogate_formats.layouts import LAYOUTS, QUANT_METHODS
from surogate_formats.manifest import Manifest
from surogate_load.errors import PackedExpertsError
from surogate_load.experts.finding import find_experts
from surogate_load.reading.places import read_places

_LOG = logging.getLogger("surogate_load")

WRONG_EXPERTS = frozenset({("fp4", "compressed-tensors")})
"""Format and layout of experts that transformers reads wrongly without an error (huggingface/transformers#48371)."""


_READERS = {"bitsandbytes": "bitsandbytes_4bit"}
"""`quant_method` to transformers' own name of its reader, where that is another."""


def watch_readers(own_methods: Collection[str]) -> None:
    """Has transformers' readers of our layouts ask `check_artifact` first; a second call does nothing.

    Args:
        own_methods: the `quant_method`s that our plug-in reads.
    """
    for method in QUANT_METHODS.keys() - set(own_methods):
        reader: Any = AUTO_QUANTIZER_MAPPING.get(_READERS.get(method, method))
        if reader is None:
            continue  # transformers has none, and loads nothing
        original = reader._process_model_before_weight_loading
        if getattr(original, "asks_surogate", False):
            continue
        reader._process_model_before_weight_loading = _asking(original)


def _asking(original: Any) -> Any:
    @wraps(original)
    def process(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        check_artifact(model, kwargs.get("checkpoint_files") or ())
        return original(self, model, *args, **kwargs)

    process.asks_surogate = True  # type: ignore[attr-defined]
    return process


def check_artifact(model: nn.Module, files: Sequence[str]) -> None:
    """Says that an artifact of ours isn't kept packed, and that experts of whatever origin are read wrongly.

    Raises:
        PackedExpertsError: so are those of an artifact of ours.
    """
    manifest = Manifest.beside(Path(files[0])) if files else None
    if manifest is None:
        _check_others(model, files)
        return
    directory = Path(files[0]).parent
    key = (manifest.format["name"], manifest.layout)
    wrong = _wrong_experts(model, files, key)
    if wrong is not None:
        raise PackedExpertsError(f"{directory}: {wrong}; surogate_load.load_model reads them, packed")
    _LOG.warning(
        "%s: from_pretrained leaves layout %s to transformers' own reader, whose layers aren't ours; "
        "surogate_load.load_model keeps it packed",
        directory,
        manifest.layout,
    )


def _check_others(model: nn.Module, files: Sequence[str]) -> None:
    """A checkpoint without our manifest may still be ours: `from_pretrained` downloads none from the Hub."""
    try:
        found = [_wrong_experts(model, files, key) for key in WRONG_EXPERTS]
    except SurogateError:
        return  # whatever else is wrong with the files is transformers' to say
    for wrong in filter(None, found):
        _LOG.warning("%s; surogate_load.load_model reads them, packed", wrong)


def _wrong_experts(model: nn.Module, files: Sequence[str], key: tuple[str, str]) -> str | None:
    """What transformers makes of the experts in files of a format and a layout, if it reads them wrongly."""
    if key not in WRONG_EXPERTS:
        return None
    name, layout = key
    infos = {tensor: info for tensor, (_, info) in read_places(files).items()}
    *_, companion = LAYOUTS[layout].suffixes[name].values()
    for found in find_experts(model, infos, companion).values():
        return f"transformers reads {found.stored} wrongly (huggingface/transformers#48371)"
    return None
