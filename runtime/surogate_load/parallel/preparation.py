"""Makes a packed model one that FSDP2 can divide between ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from surogate_load.errors import UnsupportedShardingError
from surogate_load.fused.projections import split_projections
from surogate_load.linear import QuantizedLinear
from surogate_load.parallel.byte_rows import byte_rows
from surogate_load.step.regional import compiled_inside_hooks, decoder_layers

_SHARDS_BYTES = (2, 13)
"""torch from which FSDP2 was seen to take uint8 parameters: 2.11 asks a gradient of every parameter that it makes."""


def prepare_for_sharding(model: nn.Module) -> None:
    """Has packed layers hold their tensors as rows of bytes, so that torch's `fully_shard` may be called on the model.

    `surogate_load.fully_shard` does it by itself, and so does accelerate with `fsdp_version: 2`. What a row is says
    `byte_rows`. Layers that multiply as one (q, k, v; gate, up) multiply one by one afterwards. A second call does
    nothing.

    Args:
        model: with its adapters, if it is to have any: those that come later aren't sharded, and not reduced.

    Raises:
        UnsupportedShardingError: the model is sharded already, adapters have no values yet, or torch is too old.
    """
    if _torch_version() < _SHARDS_BYTES:
        raise UnsupportedShardingError(
            f"torch {torch.__version__} shards no integer parameters: FSDP2 takes packed weights from torch 2.13 on; "
            "DistributedDataParallel takes them with this one"
        )
    layers = list(packed_layers(model))
    other = next((n for n, m in model.named_modules() if hasattr(m, "packed_names") and m not in layers), None)
    if other is not None:
        raise UnsupportedShardingError(
            f"{other} holds packed experts, which aren't sharded yet: train them under DistributedDataParallel"
        )
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise UnsupportedShardingError("the model is sharded already: prepare it before fully_shard")
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.device.type == "meta"]
    if missing:
        raise UnsupportedShardingError(
            f"{missing[0]} trains, but has no values: of a model on device='meta' only adapters of packed layers can "
            "be trained; name those in target_modules"
        )
    split_projections(model)
    for layer in layers:
        if not layer.byte_rows:
            _to_rows(layer)
    for decoder_layer in decoder_layers(model):
        compiled_inside_hooks(decoder_layer)


def _torch_version() -> tuple[int, ...]:
    return tuple(int(number) for number in torch.__version__.split(".")[:2])


def packed_layers(model: nn.Module) -> Iterator[QuantizedLinear]:
    """Every packed layer of a model."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            yield module


@torch.no_grad()
def _to_rows(layer: QuantizedLinear) -> None:
    tensors = {name: layer.get_parameter(name) for name in layer.packed_names}
    found = byte_rows(layer.kind, tensors)
    for name, tensor in tensors.items():
        setattr(layer, name, nn.Parameter(found[name].take(tensor.data), requires_grad=False))
    layer.byte_rows = found
