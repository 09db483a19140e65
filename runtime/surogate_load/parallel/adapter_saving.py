"""Saves the adapter of a model that ranks divide between them, in PEFT's own format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from surogate_load.errors import NoAdapterError


def save_adapter(model: Any, directory: str | Path) -> None:
    """Writes what PEFT's `save_pretrained` writes: the adapter alone, gathered, by the first rank.

    Call it on every rank. It also takes models that aren't sharded: under DistributedDataParallel, or on one device.
    `PeftModel.from_pretrained(load_model(..., device="meta"), directory, is_trainable=True)`, then `fully_shard`, goes
    on with it on any number of ranks.

    Args:
        model: a `PeftModel`, or DistributedDataParallel around one.
        directory: where it goes; made if missing.

    Raises:
        NoAdapterError: the model has none.
    """
    import torch.distributed as dist

    inner: Any = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    if not hasattr(inner, "peft_config"):
        raise NoAdapterError(f"{type(inner).__name__} is no PeftModel: there is no adapter to save")
    trained = {name: _whole(parameter) for name, parameter in inner.named_parameters() if parameter.requires_grad}
    joined = dist.is_available() and dist.is_initialized()
    if not joined or dist.get_rank() == 0:
        inner.save_pretrained(str(directory), state_dict=trained)
    if joined:
        dist.barrier()


def _whole(parameter: Any) -> Any:
    sharded = hasattr(parameter, "device_mesh")
    return (parameter.full_tensor() if sharded else parameter).detach().cpu()
