"""Recipe bf16: the weight is dequantized to the compute dtype, and again in the backward; nothing dense is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surogate_formats.recipe import Recipe
from surogate_load.recipes.layer import PackedWeight, RecipeLayer
from surogate_load.recipes.notes import Notes
from surogate_load.recipes.product import Operands
from surogate_load.weight import WeightKind


@dataclass(frozen=True)
class _DequantizedProduct:
    """Products with W dequantized to the dtype of the other factor."""

    kind: WeightKind

    def forward(self, x: Tensor, bias: Tensor | None, state: None, parts: Sequence[Tensor]) -> Tensor:
        return torch.nn.functional.linear(x, self.kind.dequantize(parts, x.dtype), bias)

    def input_gradient(self, gradient: Tensor, state: None, parts: Sequence[Tensor]) -> Tensor:
        return gradient @ self.kind.dequantize_for_backward(gradient, parts, gradient.dtype)


class Bf16(RecipeLayer):
    """Exactly the products of the dense model that holds the dequantized weights; no state."""

    @classmethod
    def build(cls, weight: PackedWeight, recipe: Recipe, notes: Notes, emulate: bool) -> Bf16:
        """Nothing depends on the weight or the switches."""
        return cls()

    @classmethod
    def unite(cls, layers: Sequence[RecipeLayer]) -> bool:
        """See `RecipeLayer.unite`: there is no state."""
        return True

    def operands(self, kind: WeightKind, parts: tuple[Tensor, ...]) -> Operands:
        """See `RecipeLayer.operands`."""
        return Operands(_DequantizedProduct(kind), None, parts)
