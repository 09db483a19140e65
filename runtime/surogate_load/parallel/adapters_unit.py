"""The LoRA adapters of all decoder layers as one unit of FSDP2, gathered once a step and reduced once.

Each tensor that FSDP2 divides costs the host some 50 microseconds whenever its unit is gathered or reduced. A decoder
layer has 14 small ones: with it they would be gathered twice a micro-step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from surogate_load.linear import QuantizedLinear, has_hooks


def shard_adapters(layers: Sequence[nn.Module], shard: Callable[..., Any], **options: Any) -> None:
    """Makes the unit, before the layers become units; where they have no such adapters, nothing.

    Its modules aren't called where adapters are multiplied with the base, so FSDP2's own hooks on them wouldn't run:
    the layers gather it instead, and FSDP2 reduces what was called by nobody when the backward ends.

    Args:
        layers: decoder layers; what trains in them beside LoRA of packed linears stays theirs.
        shard: torch's `fully_shard`.
        options: of it.
    """
    linears = [linear for layer in layers for linear in _adapters(layer)]
    if not linears:
        return
    shard(linears, reshard_after_forward=False, **options)
    unit: Any = linears[0]
    state = unit._get_fsdp_state()
    for handle in (state._pre_forward_hook_handle, state._post_forward_hook_handle):
        handle.remove()
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: _gather(unit))
    layers[-1].register_forward_hook(lambda *_: _free_after_evaluation(unit))


def _adapters(layer: nn.Module) -> Iterator[nn.Linear]:
    for module in layer.modules():
        if isinstance(module._modules.get("base_layer"), QuantizedLinear):
            for matrices in (module._modules.get("lora_A"), module._modules.get("lora_B")):
                for linear in matrices.children() if matrices is not None else ():
                    if isinstance(linear, nn.Linear) and not has_hooks(linear) and linear.weight.requires_grad:
                        yield linear


def _gather(unit: Any) -> None:
    """Unless it is gathered: it stays so until its gradients are reduced, which an optimizer's step follows."""
    state = unit._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # one before torch 2.12
    for group in groups:
        group.reshard_after_backward = group.reduce_grads
    if not all(group.is_unsharded for group in groups):
        unit.unshard()


def _free_after_evaluation(unit: Any) -> None:
    """No backward will free it, and an optimizer's step may come before the next forward."""
    if not torch.is_grad_enabled():
        unit.reshard()
