"""What a packed layer does while ranks divide its weight between them."""

from __future__ import annotations

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
        divided = [layer._parameters[name] for name in layer.packed_names if name not in layer.whole]
        if managed and not all(hasattr(parameter, "device_mesh") for parameter in divided):
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
        whole: names of those that every rank has whole.
    """

    _is_fsdp_managed_module = _FsdpMark()
    packed_names: tuple[str, ...]
    byte_rows: dict[str, ByteRows]
    whole: frozenset[str] = frozenset()

    def from_rows(self, name: str) -> Tensor:
        """The packed tensor of that name.

        Raises:
            ShardedWeightError: its rows are spread over ranks.
        """
        rows: Any = self._parameters[name]
        if not torch.compiler.is_compiling() and hasattr(rows, "device_mesh"):
            raise ShardedWeightError(
                f"{name} is spread over ranks: call the layer through the model that was sharded, or unshard() the "
                "module that fully_shard was called on"
            )
        return self.byte_rows[name].give(rows)
