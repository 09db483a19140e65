"""Trains on packed weights: artifacts of surogate-quantize as modules of torch, transformers and PEFT.

Importing this package imports neither torch nor transformers. It arranges that, as soon as a program imports those,
transformers loads layout `surogate` through `from_pretrained` and `peft.get_peft_model` knows our layers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from surogate_load.import_hooks import when_imported

if TYPE_CHECKING:
    from surogate_load.artifact_weights import open_artifact
    from surogate_load.linear import QuantizedLinear
    from surogate_load.loading import load_model
    from surogate_load.model_recipe import set_recipe
    from surogate_load.recipes.delayed import end_step
    from surogate_load.yaml_config import from_config

__all__ = ["QuantizedLinear", "end_step", "from_config", "load_model", "open_artifact", "set_recipe"]

_HOMES = {
    "MicroStep": "step.micro_step",
    "captured": "step.trainer",
    "QuantizedLinear": "linear",
    "end_step": "recipes.delayed",
    "from_config": "yaml_config",
    "load_model": "loading",
    "open_artifact": "artifact_weights",
    "set_recipe": "model_recipe",
}


def __getattr__(name: str) -> Any:
    """Imports a public name where it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def _register_quantizer() -> None:
    from surogate_load.hf_quantizer import register

    register()


def _register_adapter_layer() -> None:
    from surogate_load.peft_layer import register

    register()


when_imported("transformers.quantizers.auto", _register_quantizer)
when_imported("peft.tuners.lora.model", _register_adapter_layer)
