"""The LoRA layer that PEFT puts around a `QuantizedLinear`; `peft.get_peft_model` finds it by itself.

Adapters, their names and files are PEFT's. Ours is what the recipe decides: how an adapter's gradients are multiplied.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from peft.tuners.lora import model as lora_model
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from surogate_load.adapter_rules import MERGE, check_kind, check_start
from surogate_load.errors import MergeUnsupportedError
from surogate_load.experts.module import QuantizedExperts
from surogate_load.experts.peft_layer import QuantizedLoraExperts
from surogate_load.linear import QuantizedLinear, has_hooks
from surogate_load.recipes.product import Adapter
from surogate_load.recipes.token_gradient import AdapterLinear


class QuantizedLoraLinear(PeftLinear):  # type: ignore[misc]
    """PEFT's LoRA layer over a packed base weight.

    One plain adapter is multiplied together with the base, in the base's dtype; whatever else PEFT can do (several
    adapters at once, DoRA, dropout, batches of mixed adapters) goes PEFT's own way.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., K] to [..., N]."""
        adapter = None if args or kwargs else self.plain_adapter()
        if adapter is None:
            y: Tensor = super().forward(x, *args, **kwargs)
            return y
        base = self.base_layer
        shared = base.shared_input[0].take(self, x) if base.shared_input else None
        fused: Tensor = base.multiply(x, adapter) if shared is None else shared
        return fused

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Makes an adapter as PEFT does, then has the recipe choose its linears.

        Raises:
            DenseInitializationError: it would start from the dense base, or change that.
        """
        check_start(super().update_layer, adapter_name, args, kwargs)
        super().update_layer(adapter_name, *args, **kwargs)
        self._adopt(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Leaves the adapter, which has values, on the CPU where the base has none yet."""
        super()._move_adapter_to_device_of_base_layer(adapter_name, device or self.get_base_layer().W_q.device)

    def adopt_recipe(self) -> None:
        """Has the base layer's present recipe choose the linears of every adapter."""
        for adapter_name in self.lora_A:
            self._adopt(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises `MergeUnsupportedError`: the sum of a packed weight and an adapter has no packed form."""
        raise MergeUnsupportedError(MERGE)

    def unmerge(self) -> None:
        """Raises `MergeUnsupportedError`."""
        raise MergeUnsupportedError(MERGE)

    def merged_weight(self) -> Tensor:
        """The dequantized weight [N, K] with the active adapters in it, as PEFT merges them, in float32."""
        base = self.base_layer
        dense = nn.Linear(1, 1, bias=False, device="meta")
        dense.weight = nn.Parameter(base.dequantize(torch.float32), requires_grad=False)
        self._modules["base_layer"] = dense
        try:
            super().merge()
            return dense.weight.detach()
        finally:
            self.merged_adapters.clear()
            self._modules["base_layer"] = base

    def plain_adapter(self) -> Adapter | None:
        """The one active adapter, if all there is to do is to add its product."""
        if self.disable_adapters or self.merged or type(self.base_layer) is not QuantizedLinear:
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or active[0] in self.lora_variant:
            return None
        name = active[0]
        dropout, lora_a, lora_b = self.lora_dropout[name], self.lora_A[name], self.lora_B[name]
        if isinstance(dropout, nn.Dropout) and dropout.p and dropout.training:
            return None
        plain = all(type(linear) is nn.Linear and linear.bias is None for linear in (lora_a, lora_b))
        if not plain or any(map(has_hooks, (self.base_layer, dropout, lora_a, lora_b))):
            return None
        return Adapter(lora_a.weight, lora_b.weight, self.scaling[name])

    def _adopt(self, adapter_name: str) -> None:
        recipe = self.get_base_layer().recipe
        for adapters in (self.lora_A, self.lora_B):
            adapters[adapter_name] = recipe.adapter_linear(_plain(adapters[adapter_name]))


def _plain(linear: nn.Linear) -> nn.Linear:
    """The linear itself, or a plain one that shares its parameters."""
    return linear.plain() if isinstance(linear, AdapterLinear) else linear


def register() -> None:
    """Makes PEFT's choice of a layer ask us first, for packed layers only; a second call does nothing."""
    original = lora_model.dispatch_default
    if getattr(original, "asks_surogate", False):
        return

    @wraps(original)
    def dispatch(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, QuantizedLinear) and kwargs.get("parameter_name") is None:
            kwargs.pop("parameter_name", None)
            config.fan_in_fan_out = False
            return QuantizedLoraLinear(target, adapter_name, config=config, **kwargs)
        if isinstance(base, QuantizedExperts) and kwargs.get("parameter_name") in base.projections:
            return QuantizedLoraExperts(target, adapter_name, config=config, **kwargs)
        made: nn.Module | None = original(target, adapter_name, config=config, **kwargs)
        return made

    dispatch.asks_surogate = True  # type: ignore[attr-defined]
    lora_model.dispatch_default = dispatch
    inject = BaseTuner.inject_adapter

    @wraps(inject)
    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_kind(self, model, adapter_name)
        inject(self, model, adapter_name, *args, **kwargs)

    BaseTuner.inject_adapter = inject_adapter
