"""What adapters on packed weights can't do, whatever layer they are on."""

from __future__ import annotations

import inspect
from copy import copy
from typing import Any

from torch import nn

from surogate_load.errors import DenseAdapterError, DenseInitializationError
from surogate_load.linear import QuantizedLinear

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


ON_PACKED = (
    "LORA", "ADALORA", "BEFT", "BOFT", "C3A", "FOURIERFT", "GRALORA", "IA3", "LILY", "MISS", "OFT", "PVERA", "RANDLORA",
    "ROAD", "VBLORA", "VERA", "WAVEFT",
)  # fmt: skip
"""PEFT's kinds of adapters that never look into the base's weight: on packed layers they are what they are on dense
ones. Others take its codes for values: most fail in a product, and nothing says that all do."""


def check_kind(tuner: Any, model: nn.Module, adapter_name: str) -> None:
    """Raises `DenseAdapterError` before PEFT puts a kind of adapter on packed layers that isn't one of `ON_PACKED`.

    Args:
        tuner: PEFT's `BaseTuner`, which has the adapter's config.
        model: that it goes into.
        adapter_name: of the adapter.
    """
    config = tuner.peft_config[adapter_name]
    kind = getattr(config.peft_type, "value", config.peft_type)
    packed = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    if kind in ON_PACKED or not packed:
        return
    prepared = tuner._prepare_adapter_config(copy(config), tuner.get_model_config(model))  # with PEFT's default targets
    targets = getattr(prepared, "target_modules", None)
    for name in packed if targets else ():
        if targets == "all-linear" or tuner._check_target_module_exists(prepared, name):
            raise DenseAdapterError(
                f"{kind} reads the base's weight, as far as is known, and {name}'s is packed; these don't: "
                + ", ".join(ON_PACKED)
            )
