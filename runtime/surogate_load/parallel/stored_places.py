"""A model on device `meta`, and where in its artifact each of its tensors stands."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import rename_source_key

from surogate_formats.artifact import Artifact
from surogate_load.errors import UnsupportedShardingError
from surogate_load.experts.module import QuantizedExperts
from surogate_load.linear import QuantizedLinear
from surogate_load.packed_names import transforms_of
from surogate_load.recoding import must_restore
from surogate_load.weight import to_torch

_ATTRIBUTE = "_surogate_places"


@dataclass(frozen=True)
class Place:
    """A parameter of a module, whatever will be put around that, and where its values are stored.

    Attributes:
        module: that has it.
        parameter: its name there.
        tensors: the stored tensor; of packed experts those of the first one, then of the next, and so on.
    """

    module: nn.Module
    parameter: str
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class StoredPlaces:
    """Where the values of a model on device `meta` stand.

    Attributes:
        path: of the artifact.
        places: one for each parameter that isn't tied to another.
    """

    path: Path
    places: tuple[Place, ...]


def remember_places(model: Any, artifact: Artifact) -> None:
    """Notes where each parameter stands, and gives the buffers their values: those are small, and never divided.

    Raises:
        UnsupportedShardingError: the layout, or transformers, changes tensors as it loads them.
    """
    if must_restore(artifact.layout, artifact.format):
        raise UnsupportedShardingError(
            f"layout {artifact.layout.name} is read whole, not by rows: load it with device='cpu', then shard it"
        )
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in model.state_dict()}
    places = [
        place for experts in model.modules() if isinstance(experts, QuantizedExperts) for place in _stacked(experts)
    ]
    stacked = {tensor for place in places for tensor in place.tensors}
    for name, tensor in _names(model, artifact, stacked):
        parameter = name.rpartition(".")[2]
        if parameter in owners[name]._buffers:
            owners[name]._buffers[parameter] = to_torch(artifact.checkpoint.read(tensor))
        else:
            places.append(Place(owners[name], parameter, (tensor,)))
    vars(model)[_ATTRIBUTE] = StoredPlaces(artifact.path, tuple(places))
    _compute_buffers(model)


def stored_places(model: nn.Module) -> StoredPlaces | None:
    """What was noted for a model, or for the one inside of it."""
    found: list[StoredPlaces] = [vars(module)[_ATTRIBUTE] for module in model.modules() if _ATTRIBUTE in vars(module)]
    return found[0] if found else None


def _stacked(experts: QuantizedExperts) -> Iterator[Place]:
    if experts.biases_by_expert:
        raise UnsupportedShardingError(
            f"{experts.stored} have biases, which are read whole: load the model with device='cpu', then shard it"
        )
    yield from (Place(experts, name, tensors) for name, tensors in experts.stored_tensors())


def _names(model: Any, artifact: Artifact, stacked: Set[str]) -> Iterator[tuple[str, str]]:
    """(name in the model, name on disk) of every stored tensor that the model has a place for, but for `stacked`."""
    stored_names = model.hf_quantizer.stored_names
    packed: dict[str, str] = {}
    for module, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            packed |= {f"{stored_names[module]}.{name}": f"{module}.{name}" for name in layer.packed_names}
    renamings, converters = transforms_of(model)
    state, prefix = model.state_dict(), getattr(model, "base_model_prefix", None)
    for tensor in artifact.checkpoint.tensors:
        if tensor in packed:
            yield packed[tensor], tensor
        if tensor in packed or tensor in stacked:
            continue
        name, merged = rename_source_key(tensor, renamings, converters, prefix, state)
        if merged is not None:
            raise UnsupportedShardingError(
                f"transformers merges {tensor} into {name} as it loads: load the model with device='cpu', then shard it"
            )
        if name in state:
            yield name, tensor


def _compute_buffers(model: Any) -> None:
    """Buffers that no file holds (rotary frequencies) are what transformers' own initialisation makes of them."""
    for module in model.modules():
        missing = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        for name in missing:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        if missing:
            with torch.no_grad():
                model._init_weights(module)
