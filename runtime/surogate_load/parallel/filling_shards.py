"""Fills a sharded model from its artifact: a rank reads the rows that it keeps, and no others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set

import torch
from torch import Tensor, nn

from surogate_formats.artifact import Artifact
from surogate_load.fused.projections import fuse_projections
from surogate_load.linear import QuantizedLinear
from surogate_load.parallel.flat_weights import FlatWeights
from surogate_load.parallel.shard_reader import ShardReader
from surogate_load.parallel.stored_places import Place, stored_places


def read_shards(model: nn.Module, *, on_cpu: bool = False, ignored: Set[nn.Parameter] = frozenset()) -> None:
    """Gives every parameter of a sharded model that has no values those of its rows.

    In units that hold their weights as one, layers that read the same activations multiply as one again after it.
    `surogate_load.fully_shard` and accelerate call it; after torch's own `fully_shard` it is called by hand.

    Args:
        model: sharded by FSDP2; loaded on device `meta`, or with all its values.
        on_cpu: leave the rows there, where an offload policy wants them.
        ignored: parameters that `fully_shard` was told to ignore, of which every rank reads the whole.

    Raises:
        MismatchedModelError: the artifact has changed since the model was made.
        PartValueError: a scale stands for no weight.
    """
    found = stored_places(model)
    if found is not None and any(parameter.is_meta for parameter in model.parameters()):
        whole = {id(parameter) for parameter in ignored}
        with Artifact.open(found.path) as artifact:
            _fill(model, ShardReader(artifact, device_of(model), on_cpu), found.places, whole)
    _settle(model)


def _fill(model: nn.Module, reader: ShardReader, places: Sequence[Place], whole: Set[int]) -> None:
    owners = _owners(model)

    def put(old: Tensor, new: nn.Parameter) -> None:
        for module, name in owners[id(old)]:
            module._parameters[name] = new
            module.load_state_dict({}, strict=False)  # has FSDP look at its parameters again

    stored = {(id(place.module), place.parameter): place.tensors[0] for place in places}
    for flat in model.modules():
        if isinstance(flat, FlatWeights) and flat.lines.is_meta:
            names = [stored[id(span.layer), span.name] for span in flat.spans]
            put(flat.lines, reader.flat(flat.lines, names, [(span.start, span.size) for span in flat.spans]))
    for place in places:
        old = place.module._parameters.get(place.parameter)
        if old is not None and old.is_meta:
            put(old, reader.whole(old, place) if id(old) in whole else reader.share(old, place))


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


def _settle(model: nn.Module) -> None:
    """What can't be known without values, or was undone before they were divided, unit by unit.

    Recipes look at weights that had no values when those were set; layers that stand in one `FlatWeights` are fused.
    """
    from torch.distributed.fsdp import FSDPModule

    for unit in reversed(list(model.modules())):  # those inside first: a unit gathers what is its own
        if not isinstance(unit, FSDPModule):
            continue
        waiting = list(_waiting(unit))
        if not waiting and "flat_weights" not in unit._modules:
            continue
        unit.unshard()
        for layer in waiting:
            layer.settle()
        if "flat_weights" in unit._modules:
            fuse_projections(unit)
        unit.reshard()


def _waiting(unit: nn.Module) -> Iterator[QuantizedLinear]:
    for module in unit.modules():
        if isinstance(module, QuantizedLinear) and module.recipe.waits:
            yield module
