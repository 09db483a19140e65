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
from surogate_formats.manifest import MANIFEST_NAME, Manifest
from surogate_load.errors import PackedExpertsError
from surogate_load.packed_names import packed_modules, read_infos

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
    manifest_path = Path(files[0]).parent / MANIFEST_NAME if files else None
    if manifest_path is None or not manifest_path.is_file():
        _check_others(model, files)
        return
    manifest = Manifest.from_json(manifest_path.read_bytes(), str(manifest_path))
    key = (manifest.format["name"], manifest.layout)
    hint = "surogate_load.load_model keeps it packed"
    try:
        _find_modules(model, files, key)
    except PackedExpertsError:
        if key in WRONG_EXPERTS:
            raise
        hint = "surogate_load.load_model doesn't take its experts yet"
    _LOG.warning(
        "%s: from_pretrained leaves layout %s to transformers' own reader, whose layers aren't ours; %s",
        manifest_path.parent,
        manifest.layout,
        hint,
    )


def _check_others(model: nn.Module, files: Sequence[str]) -> None:
    """A checkpoint without our manifest may still be ours: `from_pretrained` downloads none from the Hub."""
    try:
        for key in WRONG_EXPERTS:
            _find_modules(model, files, key)
    except PackedExpertsError as error:
        _LOG.warning("transformers reads these experts wrongly (huggingface/transformers#48371): %s", error)
    except SurogateError:
        return  # whatever else is wrong with the files is transformers' to say


def _find_modules(model: nn.Module, files: Sequence[str], key: tuple[str, str]) -> None:
    name, layout = key
    *_, companion = LAYOUTS[layout].suffixes[name].values()
    for _ in packed_modules(model, read_infos(files), companion):
        pass
