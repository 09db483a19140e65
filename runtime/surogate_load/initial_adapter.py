"""Warns where an adapter that makes up for the error of packed weights is loaded on dense ones."""

from __future__ import annotations

import logging
from functools import wraps
from pathlib import Path
from typing import Any

from surogate_formats.artifact import ADAPTER
from surogate_formats.manifest import MANIFEST_NAME

_LOG = logging.getLogger("surogate_load")


def register() -> None:
    """Makes `PeftModel.load_adapter`, which `from_pretrained` calls, warn; a second call does nothing."""
    from peft.peft_model import PeftModel

    original = PeftModel.load_adapter
    if getattr(original, "asks_surogate", False):
        return

    @wraps(original)
    def load_adapter(self: Any, model_id: Any, adapter_name: str, *args: Any, **keywords: Any) -> Any:
        found = original(self, model_id, adapter_name, *args, **keywords)
        if getattr(self.get_base_model(), "config", None) is not None and not _is_packed(self.get_base_model()):
            _warn(str(model_id), str(keywords.get("subfolder")), self.peft_config[adapter_name])
        return found

    load_adapter.asks_surogate = True  # type: ignore[attr-defined]
    PeftModel.load_adapter = load_adapter


def _is_packed(model: Any) -> bool:
    return getattr(model.config, "quantization_config", None) is not None


def _warn(adapter: str, subfolder: str, config: Any) -> None:
    instead = "surogate-load export-adapter ARTIFACT ADAPTER --out DIR makes one for them of what was trained"
    if subfolder == ADAPTER or (Path(adapter).name == ADAPTER and (Path(adapter).parent / MANIFEST_NAME).is_file()):
        _LOG.warning("%s makes up for the error of packed weights, and these aren't packed: %s", adapter, instead)
        return
    base = Path(config.base_model_name_or_path or "")
    if (base / ADAPTER).is_dir() and (base / MANIFEST_NAME).is_file():
        _LOG.warning(
            "%s was trained on %s, and these weights aren't packed: if it started from %s, %s",
            adapter, base, ADAPTER, instead,
        )  # fmt: skip
