"""What a packed layer does while ranks divide its weight between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surogate_load.byte_rows import ByteRows
from surogate_load.errors import ShardedWeightError, UnsupportedShardingError
from surogate_load.integer_parameters import register

register()  # before FSDP2 meets any packed layer, prepared or not


@dataclass(frozen=True)
class InFlat:
    """Where packed tensors stand that are no parameters of the layer's.

    Attributes:
        weights: the `FlatWeights` that has them.
        slots: by which it gives them, by their names, or by the index of a part.
    """

    weights: Any
    slots: Mapping[Any, int]


class _FsdpMark:
    """The attribute `_is_fsdp_managed_module`, which FSDP sets, refuses what would train a packed layer wrongly.

    FSDP1 marks modules before it flattens their parameters, FSDP2 once theirs are DTensors.
    """

    def __get__(self, layer: Any, owner: type) -> bool:
        return layer is not None and vars(layer).get("_fsdp_managed", False)

    def __set__(self, layer: Any, managed: bool) -> None:
        own = [layer._parameters[name] for name in layer.packed_names if not layer.flat]
        if managed and not all(hasattr(parameter, "device_mesh") for parameter in own):
            raise UnsupportedShardingError(
                "FSDP1 flattens parameters, which packed weights don't survive: use FSDP2, surogate_load.fully_shard("
                "model) or fsdp_version: 2 in accelerate's config"
            )
        if managed and not layer.byte_rows:
            raise UnsupportedShardingError(
                "torch's fully_shard met packed weights that it would cast or cut: call surogate_load.fully_shard("
                "model), or surogate_load.prepare_for_sharding(model) before torch's"
            )
        vars(layer)["_fsdp_managed"] = managed


class Divisible(nn.Module):
    """Mixed into a layer whose packed tensors may become rows of bytes; see `parallel.preparation`.

    Attributes:
        packed_names: names of the packed tensors.
        byte_rows: how each of them stands as rows of bytes; empty where they stand as they are.
        flat: where they stand instead, if they are no parameters of this layer's; None if they are.
    """

    _is_fsdp_managed_module = _FsdpMark()
    packed_names: tuple[str, ...]
    byte_rows: dict[str, ByteRows]
    flat: InFlat | None = None

    @property
    def divided(self) -> bool:
        """Whether the tensors may be spread over ranks now, and are multiplied one by one."""
        held_by = self.flat.weights if self.flat else self
        first = next(iter(held_by._parameters.values()))
        return bool(self.byte_rows) and (not self.flat or hasattr(first, "device_mesh"))

    def from_rows(self, name: str) -> Tensor:
        """The packed tensor of that name.

        Raises:
            ShardedWeightError: its rows are spread over ranks.
        """
        if self.flat:
            found: Tensor = self.flat.weights.tensor(self.flat.slots[name])
            return found
        rows: Any = self._parameters[name]
        if not torch.compiler.is_compiling() and hasattr(rows, "device_mesh"):
            raise ShardedWeightError(
                f"{name} is spread over ranks: call the layer through the model that was sharded, or unshard() the "
                "module that fully_shard was called on"
            )
        return self.byte_rows[name].give(rows)


def fused_in_flat(members: Sequence[Any], parts: Sequence[Tensor]) -> InFlat | None:
    """Fused parts of several layers that stand as one in a `FlatWeights`, each as a slot of its own there.

    Args:
        members: `QuantizedLinear`s.
        parts: the fused ones.

    Returns:
        Slots by the index of the part, for those that stand as one; None where the members aren't in one `FlatWeights`.
    """
    places = [member.flat for member in members if member.flat]
    if len(places) < len(members) or len({id(place.weights) for place in places}) > 1:
        return None
    flat, slots = places[0].weights, {}
    for index, part in enumerate(parts):
        own = [flat.where(place.slots[member.part_names[index]]) for place, member in zip(places, members, strict=True)]
        rows = ByteRows(part.dtype, tuple(part.shape), len(part))
        ends = [start + each.nbytes for start, each in own]
        adjoin = [start for start, _ in own[1:]] == ends[:-1] and ends[-1] - own[0][0] == rows.nbytes
        if adjoin and {each.dtype for _, each in own} == {part.dtype}:
            slots[index] = flat.slot(own[0][0], rows)
    return InFlat(flat, slots)
