"""What DistributedDataParallel leaves alone: every rank loads the same packed weights and keeps its own scales."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from surogate_load.experts.module import QuantizedExperts
from surogate_load.linear import QuantizedLinear
from surogate_load.placement import FixedDtypeModule

_WRAPPED = ("", "base_model.model.")
"""What stands before a module's name in the model and in PEFT's model around it."""


def keep_from_broadcast(model: nn.Module) -> None:
    """Has DDP broadcast neither packed weights at the start nor what is derived from them, or scales, in each forward.

    Gloo knows no fp8, and a broadcast from rank 0 would take away the amax that other ranks have recorded.
    """
    model._ddp_params_and_buffers_to_ignore = sorted(  # type: ignore[assignment]
        prefix + name for name in set(_names(model)) for prefix in _WRAPPED
    )


def _names(model: nn.Module) -> Iterator[str]:
    """With the names that PEFT gives to what an adapter is put around, or two: experts have two projections."""
    kinds = (QuantizedLinear, QuantizedExperts)
    packed = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    for name, module in model.named_modules():
        own = module.packed_names if isinstance(module, kinds) else ()
        buffers = module._buffers if isinstance(module, FixedDtypeModule) else ()
        layer = next((owner for owner in _owners(name) if owner in packed), None)
        for tensor in (*own, *buffers):
            yield f"{name}.{tensor}"
            if layer is not None:
                yield f"{layer}.base_layer{name[len(layer) :]}.{tensor}"
                yield f"{layer}.base_layer.base_layer{name[len(layer) :]}.{tensor}"


def _owners(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]
