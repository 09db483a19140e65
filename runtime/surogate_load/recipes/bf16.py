"""Recipe bf16: the weight is dequantized to the compute dtype, and again in the backward; nothing dense is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from surogate_formats.recipe import Recipe
from surogate_load.recipes.layer import PackedWeight, RecipeLayer, bias_gradient
from surogate_load.recipes.notes import Notes
from surogate_load.weight import WeightKind


class DequantizedLinear(torch.autograd.Function):
    """x W^T + bias with W dequantized to the dtype of x. Saves the packed parts only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, kind: WeightKind, *parts: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        ctx.kind = kind
        ctx.save_for_backward(*parts)
        return torch.nn.functional.linear(x, kind.dequantize(parts, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Gives dx = dy W; no gradient of W is ever formed."""
        parts = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            dx = gradient @ ctx.kind.dequantize_for_backward(gradient, parts, gradient.dtype)
        return dx, bias_gradient(gradient, ctx.needs_input_grad[1]), None, *(None for _ in parts)


class Bf16(RecipeLayer):
    """Exactly the products of the dense model that holds the dequantized weights; no state."""

    @classmethod
    def build(cls, weight: PackedWeight, recipe: Recipe, notes: Notes) -> Bf16:
        """Nothing depends on the weight or the switches."""
        return cls()

    def multiply(self, x: Tensor, kind: WeightKind, parts: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """See `RecipeLayer.multiply`."""
        y: Tensor = DequantizedLinear.apply(x, bias, kind, *parts)  # type: ignore[no-untyped-call]
        return y
