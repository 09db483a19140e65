"""A model of transformers without its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from surogate_load.architecture import DECLARATIONS, model_class, need_transformers, one_line
from surogate_load.block_calls import NoBlocksError
from surogate_load.model_tensors import ModelTensors

_NOT_THE_MODEL = (*DECLARATIONS, "auto_map")
"""Keys of config.json that say how weights are packed, or whose code to run."""


def empty_model(tensors: ModelTensors, dtype: torch.dtype) -> Any:
    """The model with its parameters on the meta device; buffers that no file holds are computed."""
    transformers = need_transformers()
    from accelerate import init_empty_weights  # type: ignore[import-untyped]

    settings = {key: value for key, value in tensors.config.items() if key not in _NOT_THE_MODEL}
    try:
        config = transformers.AutoConfig.for_model(**settings)
        with init_empty_weights(include_buffers=False):
            model = model_class(settings)._from_config(config, dtype=dtype)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NoBlocksError(f"{tensors.directory}: the model can't be built ({one_line(error)})") from error
    return model.eval()


def assign(module: nn.Module, name: str, value: Tensor) -> None:
    """Gives a parameter or buffer of a module, by its name in there, a tensor of another device."""
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value
