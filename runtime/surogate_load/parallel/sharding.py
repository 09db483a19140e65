"""Divides a packed model between ranks by torch's FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from surogate_load.errors import UnsupportedShardingError
from surogate_load.parallel.filling_shards import device_of, read_shards
from surogate_load.parallel.preparation import packed_layers, prepare_for_sharding, refuse_sharded
from surogate_load.step.regional import decoder_layers

Model = TypeVar("Model", bound=nn.Module)

_WHOLE = "_surogate_whole_vectors"


def fully_shard(model: Model, *, mesh: Any = None, reshard_after_forward: bool | int = True, **options: Any) -> Model:
    """Shards a packed model, adapters included, over the ranks of a mesh; then it trains as any FSDP2 model does.

        model = surogate_load.load_model(path, device="meta")  # shapes alone
        model = peft.get_peft_model(model, config)  # seeded alike on every rank
        model = surogate_load.fully_shard(model)  # each rank reads its rows

    Every decoder layer is a unit of its own, and so is an embedding that isn't tied to the head; the rest, with the
    head, is the root's. The packed linear layers of a decoder layer are divided as one tensor, and its frozen vectors
    (norms, biases) are left whole on every rank: each tensor that is divided costs the host time at every layer. Only
    what trains is reduced. A model on device `meta` is filled: a rank reads from the files what it keeps. One that has
    its values already is divided as it is. `generate` works where every rank makes as many tokens.

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
    ignored = set(options.pop("ignored_params", None) or ())
    for layer in layers:
        vars(layer)[_WHOLE] = _frozen_vectors(layer, options.get("mp_policy"))
        layer.register_forward_pre_hook(_refuse_training)
        ignored.update(_whole(layer))
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
    let_generate(model)
    return model


def let_generate(model: nn.Module) -> None:
    """Has `generate` gather what the root holds, as `forward` does: a `PeftModel` calls the model inside of it."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")


def _frozen_vectors(layer: nn.Module, policy: Any) -> list[tuple[nn.Module, str]]:
    """(module, name there) of what of the base is too small to be worth dividing, and needs no cast by a policy."""
    wanted = getattr(policy, "param_dtype", None)
    base = ((module, name, module.get_parameter(name)) for module, name in _of_the_base(layer))
    vectors = ((module, name, each) for module, name, each in base if each.dim() == 1 and not each.requires_grad)
    return [(module, name) for module, name, each in vectors if wanted in (None, each.dtype)]


def _of_the_base(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Parameters that no adapter has: what is frozen of another adapter now may train later."""
    base = module._modules.get("base_layer")
    if base is not None:
        yield from _of_the_base(base)
        return
    yield from ((module, name) for name, each in module._parameters.items() if each is not None)
    for child in module.children():
        yield from _of_the_base(child)


def _whole(layer: nn.Module) -> Iterator[nn.Parameter]:
    for module, name in vars(layer)[_WHOLE]:
        yield module._parameters[name]


def _refuse_training(layer: nn.Module, *_: Any) -> None:
    if any(parameter.requires_grad for parameter in _whole(layer)):
        raise UnsupportedShardingError(
            "a norm or a bias trains that was frozen when fully_shard was called, and is reduced by no rank: call "
            "requires_grad_ before it"
        )


def _untied_embedding(model: nn.Module) -> nn.Module | None:
    ends = [getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")]
    embedding, head = ends
    if type(embedding) is not torch.nn.Embedding or embedding.weight is getattr(head, "weight", None):
        return None
    return embedding
