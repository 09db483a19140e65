"""The LoRA layer that PEFT puts around packed experts for each projection that `target_parameters` names.

Adapters, their names, files and the order in which layers are nested are PEFT's own, of `lora.ParamWrapper`. Ours is
that no expert's sum of weight and adapter is ever formed: the adapter's two products run beside the base's.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from surogate_load.adapter_rules import MERGE, check_start
from surogate_load.errors import MergeUnsupportedError
from surogate_load.experts.module import GATE_UP, QuantizedExperts
from surogate_load.experts.product import ExpertsAdapter

_RANKS = 8
"""Ranks that torch's grouped product takes are multiples of this."""


class QuantizedLoraExperts(ParamWrapper):  # type: ignore[misc]
    """PEFT's LoRA layer over one projection of packed experts.

    Every expert has factors of its own: rows e * r to (e + 1) * r of `lora_A`, and columns e, E + e, ... of `lora_B`.
    """

    def forward(self, x: Tensor, *args: Any, adapters: Any = None, **kwargs: Any) -> Tensor:
        """As the experts, with the active adapters of this projection beside those of outer layers.

        Args:
            x: [T, H].
            args: for the experts.
            adapters: those of outer layers, by projection.
            kwargs: for the experts.
        """
        self._check_forward_args(x, *args, **kwargs)
        found = dict(adapters or {})
        if not self.disable_adapters:
            active = [name for name in self.active_adapters if name in self.lora_A]
            found[self.parameter_name] = [self.adapter(name) for name in active]
        y: Tensor = self.base_layer(x, *args, adapters=found, **kwargs)
        return y

    def adapter(self, name: str) -> ExpertsAdapter:
        """An adapter's factors, A [E, r, K] and B [E, N, r], with B's rows in the order of the packed weight's.

        On CUDA the rank is filled up with zeros to what torch multiplies in one launch.
        """
        base, rank = self.get_base_layer(), self.r[name]
        lora_a = self.lora_A[name].weight.unflatten(0, (self.num_experts, rank))
        lora_b = self.lora_B[name].weight.unflatten(1, (rank, self.num_experts))
        if self.parameter_name == GATE_UP and not base.is_concatenated:
            lora_b = lora_b.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)
        lora_b = lora_b.permute(2, 0, 1)
        if lora_a.is_cuda and rank % _RANKS:
            lora_a = nn.functional.pad(lora_a, (0, 0, 0, -rank % _RANKS))
            lora_b = nn.functional.pad(lora_b, (0, -rank % _RANKS))
        return ExpertsAdapter(lora_a, lora_b.contiguous(), self.scaling[name])

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Makes an adapter as PEFT does.

        Raises:
            DenseInitializationError: it would start from the dense base, or change that.
        """
        check_start(super().update_layer, adapter_name, args, kwargs)
        super().update_layer(adapter_name, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises `MergeUnsupportedError`: the sum of a packed weight and an adapter has no packed form."""
        raise MergeUnsupportedError(MERGE)

    def unmerge(self) -> None:
        """Raises `MergeUnsupportedError`."""
        self.merge()

    def merged_weight(self, expert: int, member: int) -> Tensor:
        """One dequantized weight [N, K] with the active adapters in it, in float32."""
        base: QuantizedExperts = self.get_base_layer()
        weight = base.dequantize(self.parameter_name, expert, member, torch.float32)
        rows = slice(member * len(weight), (member + 1) * len(weight))
        for name in self.active_adapters:
            if name in self.lora_A:
                lora_a, lora_b, scaling = self.adapter(name)
                weight += scaling * (lora_b[expert, rows].float() @ lora_a[expert].float())
        return weight.detach()

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        """As PEFT reads them off the dense parameter's shape, which the packed one hasn't."""
        base: QuantizedExperts = self.get_base_layer()
        kind = base.projections[self.parameter_name].kind
        self.num_experts, self._param_ndim = kind.experts, 3
        rows, columns = kind.rows, kind.shape[1]
        return (columns, rows) if base.is_transposed else (rows, columns)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        base: QuantizedExperts = self.get_base_layer()
        for adapters in (self.lora_A, self.lora_B):
            if adapter_name in adapters and adapters[adapter_name].weight.device.type != "meta":
                adapters[adapter_name].to(device or base.W_q.device, dtype=base.compute_dtype)


QuantizedLoraExperts.__name__ = ParamWrapper.__name__  # PEFT knows its wrappers by this name alone
