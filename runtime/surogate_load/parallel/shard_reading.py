"""Fills a sharded model from its artifact: a rank reads the rows that it keeps, and no others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from surogate_formats.artifact import Artifact
from surogate_formats.artifact_values import check_values, scale_rules
from surogate_formats.dtypes import NUMPY
from surogate_formats.part_values import PartRule
from surogate_load.errors import MismatchedModelError
from surogate_load.linear import QuantizedLinear
from surogate_load.parallel.stored_places import Place, stored_places
from surogate_load.recipes.layer import PackedWeight
from surogate_load.weight import TORCH_DTYPES


def read_shards(model: nn.Module, *, on_cpu: bool = False) -> None:
    """Gives every parameter of a sharded model that has no values those of its rows; does nothing where all have them.

    `surogate_load.fully_shard` and accelerate call it; after torch's own `fully_shard` it is called by hand.

    Args:
        model: sharded by FSDP2, loaded on device `meta`.
        on_cpu: leave the rows there, where an offload policy wants them.

    Raises:
        MismatchedModelError: the artifact has changed since the model was made.
        PartValueError: a scale stands for no weight.
    """
    found = stored_places(model)
    if found is None or not any(parameter.is_meta for parameter in model.parameters()):
        return
    owners, device = _owners(model), device_of(model)
    with Artifact.open(found.path) as artifact:
        rules = scale_rules(artifact)
        for place in found.places:
            old = place.module._parameters[place.parameter]
            if old is not None and old.is_meta:
                new = _filled(old, artifact, place, rules, device, on_cpu)
                for module, name in owners[id(old)]:
                    module._parameters[name] = new
                    module.load_state_dict({}, strict=False)  # has FSDP look at its parameters again
    _settle_recipes(model)


def device_of(model: nn.Module) -> torch.device:
    """Where a sharded model runs, whatever an offload policy does with what is divided."""
    meshes = (parameter.device_mesh for parameter in model.parameters() if hasattr(parameter, "device_mesh"))
    return torch.device(next((mesh.device_type for mesh in meshes), "cpu"))


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every module that has a parameter, and its name there."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, name))
    return owners


def _filled(
    old: Any, artifact: Artifact, place: Place, rules: Mapping[str, PartRule], device: torch.device, on_cpu: bool
) -> nn.Parameter:
    from torch.distributed.tensor import DTensor

    if not isinstance(old, DTensor):
        if place.parameter in getattr(place.module, "whole", ()):
            shape = tuple(old.shape)
            rows = _rows(artifact, place, shape, 0, shape, rules)
            return nn.Parameter(rows.to(device), requires_grad=False)
        raise MismatchedModelError(f"{place.tensors[0]} has no values, and belongs to no module that was sharded")
    mesh, axis = old.device_mesh, old.device_mesh.ndim - 1
    size, rank = mesh.size(axis), mesh.get_local_rank(axis)
    first = min(rank * -(-old.shape[0] // size), old.shape[0])
    shape = tuple(old.to_local().shape)
    rows = _rows(artifact, place, tuple(old.shape), first, shape, rules).to(old.dtype)
    spread = DTensor.from_local(
        rows.to("cpu" if on_cpu else device),
        mesh,
        old.placements,
        run_check=False,
        shape=old.shape,
        stride=old.stride(),
    )
    return nn.Parameter(spread, requires_grad=old.requires_grad)


def _rows(
    artifact: Artifact,
    place: Place,
    whole: tuple[int, ...],
    first: int,
    shape: tuple[int, ...],
    rules: Mapping[str, PartRule],
) -> Tensor:
    """Rows [n, ...] of what is stored, from row `first` on; uint8 rows of what is packed."""
    infos = [artifact.checkpoint.tensors[name].info for name in place.tensors]
    stored = sum(info.nbytes for info in infos)
    if stored % prod(whole):
        raise MismatchedModelError(f"{artifact.path}: {place.tensors[0]} has changed since the model was made")
    itemsize, dtype = stored // prod(whole), infos[0].dtype
    buffer = torch.empty(prod(shape) * itemsize, dtype=torch.uint8)
    filled = 0
    for name, start, size in _pieces(place.tensors, whole[0], stored // whole[0], first, shape[0]):
        piece = buffer.numpy()[filled : filled + size]
        artifact.checkpoint.read_into(name, piece.data, start)
        if name in rules:
            check_values(artifact, name, rules[name], np.frombuffer(piece, NUMPY[dtype]), start)
        filled += size
    return buffer.view(torch.uint8 if itemsize == 1 else TORCH_DTYPES[dtype]).view(shape)


def _pieces(
    tensors: Sequence[str], rows: int, row_bytes: int, first: int, count: int
) -> Iterator[tuple[str, int, int]]:
    """(stored tensor, first byte, bytes) of `count` rows: parts of the one tensor, or the whole tensors of experts."""
    if len(tensors) == 1:
        yield from [(tensors[0], first * row_bytes, count * row_bytes)] if count else ()
        return
    each = len(tensors) // rows
    for name in tensors[first * each : (first + count) * each]:
        yield name, 0, row_bytes // each


def _settle_recipes(model: nn.Module) -> None:
    """Has recipes look at the weights, gathered unit by unit, that had no values when they were set."""
    from torch.distributed.fsdp import FSDPModule

    for unit in reversed(list(model.modules())):  # those inside first: a unit gathers what is its own
        waiting = list(_waiting(unit)) if isinstance(unit, FSDPModule) else []
        if waiting:
            unit.unshard()  # type: ignore[operator]
            for name, layer in waiting:
                with torch.no_grad():
                    layer.recipe.settle(PackedWeight(name, layer.kind, layer.parts))
            unit.reshard()  # type: ignore[operator]


def _waiting(unit: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    for name, module in unit.named_modules():
        if isinstance(module, QuantizedLinear) and module.recipe.waits:
            yield name, module
