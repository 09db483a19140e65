"""An adapter that PEFT saved, on a packed model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surogate_load.architecture import one_line
from surogate_load.errors import UnreadableAdapterError


def with_adapter(model: Any, adapter: str | Path) -> Any:
    """A model with a saved PEFT adapter; `UnreadableAdapterError` if that isn't one for it."""
    from peft import PeftModel

    if not (Path(adapter) / "adapter_config.json").is_file():
        raise UnreadableAdapterError(f"{adapter}: no adapter_config.json; give a directory that PEFT saved")
    try:
        return PeftModel.from_pretrained(model, str(adapter)).eval()
    except Exception as error:  # PEFT and torch raise many classes for an adapter that isn't this model's
        raise UnreadableAdapterError(f"{adapter}: is no adapter for this model ({one_line(error)})") from error
