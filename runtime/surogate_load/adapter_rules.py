"""What adapters on packed weights can't do, whatever layer they are on."""

from __future__ import annotations

import inspect
from typing import Any

from surogate_load.errors import DenseInitializationError

MERGE = (
    "an adapter can't be merged into packed weights: save it with save_pretrained, then "
    "surogate-load merge ARTIFACT ADAPTER --out DIR makes a dense checkpoint"
)
"""Why no layer merges."""

_FROM_DENSE = ("pissa", "olora", "corda", "loftq", "orthogonal")
"""How PEFT's initialisations begin that read or change the base's weight."""


def check_start(update_layer: Any, adapter_name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises `DenseInitializationError` where a call of PEFT's `update_layer` starts from the dense base."""
    config = inspect.signature(update_layer).bind(adapter_name, *args, **kwargs).arguments["config"]
    start = config.init_lora_weights
    if isinstance(start, str) and start.lower().startswith(_FROM_DENSE):
        raise DenseInitializationError(
            f"init_lora_weights={start!r} is made from a dense base, and this one is packed: leave it out, or take "
            "'gaussian'"
        )
