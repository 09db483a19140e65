"""An adapter that PEFT saved, on a packed model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from surogate_load.errors import UnreadableAdapterError

_LOG = logging.getLogger("surogate_load")

INIT = "init"
"""Names the adapter that was made with an artifact."""

_SAID = 240
"""Characters of what PEFT says that reach the error's line: its first line is a heading."""


def check_saved(adapter: str | Path) -> None:
    """Raises `UnreadableAdapterError` where PEFT saved nothing: before a model is loaded for it."""
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise UnreadableAdapterError(f"{adapter}: no adapter_config.json; give a directory that PEFT saved")


def with_adapter(model: Any, adapter: str | Path, *, trainable: bool = False) -> Any:
    """A model with a saved PEFT adapter; `UnreadableAdapterError` if that isn't one for it."""
    from peft import PeftModel

    check_saved(adapter)
    try:
        loaded = PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable).eval()
        different = _different(loaded, str(adapter))
    except Exception as error:  # PEFT and torch raise many classes for an adapter that isn't this model's
        said = " ".join(str(error).split())
        raise UnreadableAdapterError(f"{adapter}: is no adapter for this model ({said[:_SAID]})") from error
    _warn_of_another_base(loaded, adapter)
    if different is not None:
        raise UnreadableAdapterError(f"{adapter}: is no adapter for this model ({different})")
    return loaded


def _different(model: Any, adapter: str) -> str | None:
    """The first tensor that the file and the model don't both have: PEFT goes on without it, with a warning."""
    from peft import get_peft_model_state_dict
    from peft.utils import load_peft_weights

    saved = {name for name in load_peft_weights(adapter, device="cpu") if not name.endswith("base_layer.weight")}
    own = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    missing, strange = sorted(own - saved), sorted(saved - own)
    return f"{missing[0]} is missing" if missing else f"{strange[0]} has no place" if strange else None


def _warn_of_another_base(model: Any, adapter: str | Path) -> None:
    """An adapter makes up for the rounding of the base that it was trained on."""
    trained_on = next(iter(model.peft_config.values())).base_model_name_or_path
    here = model.get_base_model().name_or_path
    if trained_on and here and Path(trained_on).name != Path(here).name:
        _LOG.warning("%s was trained on %s, and is used on %s", adapter, trained_on, here)
