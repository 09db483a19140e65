"""Trains on packed weights: artifacts of surogate-quantize as modules of torch, transformers and PEFT.

Importing this package imports neither torch nor transformers. It arranges that, as soon as a program imports those,
transformers loads layout `surogate` through `from_pretrained`, `peft.get_peft_model` knows our layers, and `Trainer`
keeps a recipe's scaling state in its checkpoints.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from surogate_load.import_hooks import when_imported

if TYPE_CHECKING:
    from surogate_load.artifact_weights import open_artifact
    from surogate_load.export.adapter_change import export_adapter
    from surogate_load.export.dense import dequantize
    from surogate_load.export.merging import merge
    from surogate_load.generation import generate
    from surogate_load.linear import QuantizedLinear
    from surogate_load.loading import load_model
    from surogate_load.model_recipe import set_recipe
    from surogate_load.parallel.adapter_saving import save_adapter
    from surogate_load.parallel.filling_shards import read_shards
    from surogate_load.parallel.preparation import prepare_for_sharding
    from surogate_load.parallel.process_group import process_group
    from surogate_load.parallel.sharding import fully_shard
    from surogate_load.recipes.delayed import end_step
    from surogate_load.recipes.state_file import load_scaling_state, save_scaling_state
    from surogate_load.yaml_config import from_config

__all__ = [
    "QuantizedLinear",
    "dequantize",
    "end_step",
    "export_adapter",
    "from_config",
    "fully_shard",
    "generate",
    "load_model",
    "load_scaling_state",
    "merge",
    "open_artifact",
    "prepare_for_sharding",
    "process_group",
    "read_shards",
    "save_adapter",
    "save_scaling_state",
    "set_recipe",
]

_HOMES = {
    "MicroStep": "step.micro_step",
    "captured": "step.trainer",
    "QuantizedLinear": "linear",
    "dequantize": "export.dense",
    "end_step": "recipes.delayed",
    "export_adapter": "export.adapter_change",
    "from_config": "yaml_config",
    "fully_shard": "parallel.sharding",
    "generate": "generation",
    "load_model": "loading",
    "load_scaling_state": "recipes.state_file",
    "prepare_for_sharding": "parallel.preparation",
    "process_group": "parallel.process_group",
    "read_shards": "parallel.filling_shards",
    "save_adapter": "parallel.adapter_saving",
    "save_scaling_state": "recipes.state_file",
    "merge": "export.merging",
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


def _register_trainer() -> None:
    from surogate_load.recipes.state_file import register

    register()


def _register_adapter_warning() -> None:
    from surogate_load.initial_adapter import register

    register()


when_imported("peft.tuners.lora.model", _register_adapter_layer)
when_imported("peft.peft_model", _register_adapter_warning)
when_imported("transformers.trainer", _register_trainer)


def _register_sharding() -> None:
    from surogate_load.parallel.accelerate_hook import register

    register()


when_imported("accelerate.accelerator", _register_sharding)
