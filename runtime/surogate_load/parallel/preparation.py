"""Makes a packed model one that FSDP2 can divide between ranks."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from surogate_load.byte_rows import byte_rows, expert_rows
from surogate_load.errors import UnsupportedShardingError
from surogate_load.experts.module import QuantizedExperts
from surogate_load.fused.projections import split_projections
from surogate_load.linear import QuantizedLinear
from surogate_load.parallel.flat_weights import flatten
from surogate_load.step.regional import compiled_inside_hooks, decoder_layers

_LOG = logging.getLogger("surogate_load")

Packed = QuantizedLinear | QuantizedExperts
"""What holds packed tensors."""


def prepare_for_sharding(model: nn.Module, units: Iterable[nn.Module] = ()) -> None:
    """Has packed layers hold their tensors as rows of bytes, so that torch's `fully_shard` may be called on the model.

    `surogate_load.fully_shard` does it by itself, and so does accelerate with `fsdp_version: 2`. What a row is say
    `byte_rows` and `expert_rows`; in a unit it is a line of `FlatWeights`. Layers that multiply as one (q, k, v; gate,
    up) multiply one by one afterwards, but in units as one again after `read_shards`. A second call does nothing.

    Args:
        model: with its adapters, if it is to have any: those that come later aren't sharded, and not reduced.
        units: modules that `fully_shard` will be called on, if that is known: the linear layers of each are then
            divided and gathered as one tensor, which saves the host most of its work.

    Raises:
        UnsupportedShardingError: the model is sharded already, or adapters have no values yet.
    """
    refuse_sharded(model)
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.device.type == "meta"]
    if missing:
        raise UnsupportedShardingError(
            f"{missing[0]} trains, but has no values: of a model on device='meta' only LoRA on packed layers can be "
            "trained; load it with device='cpu' for anything else"
        )
    split_projections(model)
    for unit in units:
        flatten(unit)
    left = {id(layer): layer for layer in packed_layers(model) if not layer.byte_rows}
    for layer in left.values():
        _to_rows(layer)
    inside = [module for each in decoder_layers(model) for module in each.modules() if id(module) in left]
    if any(isinstance(layer, QuantizedLinear) for layer in inside):
        _LOG.warning(
            "packed tensors of decoder layers are divided one by one, which costs the host its time at each layer: "
            "surogate_load.fully_shard(model) divides a layer's as one, and so do units= of prepare_for_sharding, and "
            "accelerate where its units are the decoder layers"
        )
    for decoder_layer in decoder_layers(model):
        compiled_inside_hooks(decoder_layer)


def refuse_sharded(model: nn.Module) -> None:
    """Raises UnsupportedShardingError where ranks have divided the model."""
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise UnsupportedShardingError("the model is sharded already: prepare it before fully_shard")


def packed_layers(model: nn.Module) -> Iterator[Packed]:
    """Every packed layer of a model; the experts of a decoder layer are one."""
    for module in model.modules():
        if isinstance(module, Packed):
            yield module


@torch.no_grad()
def _to_rows(layer: Packed) -> None:
    tensors = {name: layer.get_parameter(name) for name in layer.packed_names}
    found = expert_rows(tensors) if isinstance(layer, QuantizedExperts) else byte_rows(layer.kind, tensors)
    for name, tensor in tensors.items():
        setattr(layer, name, nn.Parameter(found[name].take(tensor.data), requires_grad=False))
    layer.byte_rows = found
