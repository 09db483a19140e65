"""Divides a packed model between ranks by torch's FSDP2."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from surogate_load.errors import UnsupportedShardingError
from surogate_load.parallel.preparation import packed_layers, prepare_for_sharding, refuse_sharded
from surogate_load.parallel.shard_reading import device_of, read_shards
from surogate_load.step.regional import decoder_layers

Model = TypeVar("Model", bound=nn.Module)


def fully_shard(model: Model, *, mesh: Any = None, reshard_after_forward: bool | int = True, **options: Any) -> Model:
    """Shards a packed model, adapters included, over the ranks of a mesh; then it trains as any FSDP2 model does.

        model = surogate_load.load_model(path, device="meta")  # shapes alone
        model = peft.get_peft_model(model, config)  # seeded alike on every rank
        model = surogate_load.fully_shard(model)  # each rank reads its rows

    Every decoder layer is a unit of its own, and so is an embedding that isn't tied to the head; the rest, with the
    head, is the root's. The packed linear layers of a decoder layer are divided as one tensor, and its frozen vectors
    (norms, biases) are left whole on every rank: each tensor that is divided costs the host time at every layer. Only
    what trains is reduced. A model on device `meta` is filled: a rank reads from the files what it keeps. One that has
    its values already is divided as it is.

    Args:
        model: of `load_model`, or the `PeftModel` around it, before its first step.
        mesh: a `DeviceMesh` of one dimension, or of two (replicated, sharded); by default all ranks.
        reshard_after_forward: free a decoder layer's weights after its forward, and gather them again for the backward;
            False keeps them from the forward to the backward.
        options: of torch's `fully_shard`: `mp_policy`, `offload_policy`. Packed weights aren't cast by a policy.

    Returns:
        The model.

    Raises:
        UnsupportedShardingError: it is sharded already, holds nothing packed, or has no decoder layers.
        ArtifactError: the files of a model on device `meta` have changed, or hold scales that no weight has.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy
    from torch.distributed.fsdp import fully_shard as shard

    if next(packed_layers(model), None) is None:
        raise UnsupportedShardingError("the model holds no packed layer; torch.distributed.fsdp.fully_shard shards it")
    refuse_sharded(model)
    layers = list(decoder_layers(model))
    if not layers:
        raise UnsupportedShardingError(
            f"{type(model).__name__} names no decoder layers: call surogate_load.prepare_for_sharding(model), then "
            "torch's fully_shard on the modules that shall be units"
        )
    prepare_for_sharding(model, layers)
    ignored = set(options.pop("ignored_params", None) or ()) | _frozen_vectors(layers, options.get("mp_policy"))
    options = {"mesh": mesh, "ignored_params": ignored, **options}
    for layer in layers:
        shard(layer, reshard_after_forward=reshard_after_forward, **options)
    embedding = _untied_embedding(model)
    if embedding is not None:
        shard(embedding, reshard_after_forward=reshard_after_forward, **options)
    shard(model, **options)
    device = device_of(model)
    for parameter in ignored:
        if not parameter.is_meta:
            parameter.data = parameter.data.to(device)  # FSDP leaves what it ignores where it is
    read_shards(model, on_cpu=isinstance(options.get("offload_policy"), CPUOffloadPolicy), ignored=ignored)
    return model


def _frozen_vectors(layers: Iterable[nn.Module], policy: Any) -> set[nn.Parameter]:
    """What is too small to be worth dividing, and needs no cast by a policy."""
    wanted = getattr(policy, "param_dtype", None)
    vectors = (each for layer in layers for each in layer.parameters() if each.dim() == 1 and not each.requires_grad)
    return {each for each in vectors if wanted in (None, each.dtype)}


def _untied_embedding(model: nn.Module) -> nn.Module | None:
    ends = [getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")]
    embedding, head = ends
    if type(embedding) is not torch.nn.Embedding or embedding.weight is getattr(head, "weight", None):
        return None
    return embedding
