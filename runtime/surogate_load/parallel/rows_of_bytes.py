"""What a packed layer does while ranks divide its weight between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surogate_load.errors import ShardedWeightError, UnsupportedShardingError
from surogate_load.parallel.byte_rows import ByteRows
from surogate_load.parallel.integer_parameters import register

register()


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


class RowsOfBytes(nn.Module):
    """Mixed into a layer whose packed tensors may become rows of bytes; see `parallel.preparation`.

    Attributes:
        packed_names: names of the packed tensors.
        byte_rows: how each of them stands as rows of bytes; empty where they stand as they are.
        flat: where they are no parameters of this layer's, the `FlatWeights` that has them, and the slot of each there.
    """

    _is_fsdp_managed_module = _FsdpMark()
    packed_names: tuple[str, ...]
    byte_rows: dict[str, ByteRows]
    flat: tuple[Any, ...] = ()

    @property
    def divided(self) -> bool:
        """Whether the tensors may be spread over ranks now, and are multiplied one by one."""
        held_by = self.flat[0] if self.flat else self
        first = next(iter(held_by._parameters.values()))
        return bool(self.byte_rows) and (not self.flat or hasattr(first, "device_mesh"))

    def from_rows(self, name: str) -> Tensor:
        """The packed tensor of that name.

        Raises:
            ShardedWeightError: its rows are spread over ranks.
        """
        if self.flat:
            flat, slots = self.flat
            found: Tensor = flat.tensor(slots[name])
            return found
        rows: Any = self._parameters[name]
        if not torch.compiler.is_compiling() and hasattr(rows, "device_mesh"):
            raise ShardedWeightError(
                f"{name} is spread over ranks: call the layer through the model that was sharded, or unshard() the "
                "module that fully_shard was called on"
            )
        return self.byte_rows[name].give(rows)


def side_by_side(members: Sequence[Any], parts: Sequence[Tensor]) -> tuple[Any, ...]:
    """Fused parts of several layers that stand as one in a `FlatWeights`, each as a slot of its own there.

    Args:
        members: `QuantizedLinear`s.
        parts: the fused ones.

    Returns:
        The `FlatWeights` and index to slot; empty where the members have none.
    """
    if not all(member.flat for member in members) or len({id(member.flat[0]) for member in members}) > 1:
        return ()
    flat: Any = members[0].flat[0]
    slots = {}
    for index, part in enumerate(parts):
        own = [flat.where(member.flat[1][member.part_names[index]]) for member in members]
        rows = ByteRows(part.dtype, tuple(part.shape), len(part))
        ends = [start + each.nbytes for start, each in own]
        adjoin = [start for start, _ in own[1:]] == ends[:-1] and ends[-1] - own[0][0] == rows.nbytes
        if adjoin and {each.dtype for _, each in own} == {part.dtype}:
            slots[index] = flat.slot(own[0][0], rows)
    return flat, slots
