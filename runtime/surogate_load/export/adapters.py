"""Which adapters can be merged into a dense checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import PeftType
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from surogate_load.errors import MergeUnsupportedError
from surogate_load.experts.peft_layer import QuantizedLoraExperts
from surogate_load.peft_layer import QuantizedLoraLinear

_WAY_OUT = "write the dense model (surogate-load dequantize) and merge there with PEFT's merge_and_unload"
_UNMERGED = (
    "layer_replication",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "lora_bias",
)
"""Settings of LoRA that change more than weights of linears and embeddings."""


def check_mergeable(model: Any, adapter: str | Path) -> None:
    """Raises `MergeUnsupportedError` where a part of the adapter would be left out or end in the wrong tensor."""
    reason = next(_obstacles(model), None)
    if reason is not None:
        raise MergeUnsupportedError(f"{adapter}: {reason} can't be merged here; {_WAY_OUT}")


def _obstacles(model: Any) -> Iterator[str]:
    for config in (model.peft_config[name] for name in model.active_adapters):
        if config.peft_type != PeftType.LORA:
            yield f"an adapter of type {getattr(config.peft_type, 'value', config.peft_type)}"
        if getattr(config, "bias", "none") != "none":
            yield f"bias={config.bias!r}"
        yield from (name for name in _UNMERGED if getattr(config, name, None))
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper) and not isinstance(module, QuantizedLoraExperts) and module.num_experts > 1:
            where = name.removeprefix("base_model.model.").replace(".base_layer", "")
            yield f"an adapter on {where}.{module.parameter_name}, experts that aren't packed,"
    if model.get_base_model().config.get_text_config().tie_word_embeddings:
        yield from _of_tied_weights(model)


def _of_tied_weights(model: Any) -> Iterator[str]:
    """The embedding is the head too, but an adapter of one isn't the other's."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, (QuantizedLoraLinear, QuantizedLoraExperts)):
            yield f"an adapter on {name.removeprefix('base_model.model.')}, which is tied,"
        elif isinstance(module, ModulesToSaveWrapper) and isinstance(module.original_module, nn.Embedding):
            yield f"another {name.removeprefix('base_model.model.')}, which is tied,"
