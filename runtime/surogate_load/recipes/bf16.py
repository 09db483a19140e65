"""Recipe bf16: the weight is dequantized to the compute dtype, and again in the backward; nothing dense is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surogate_formats.recipe import Recipe
from surogate_load.recipes.layer import PackedWeight, RecipeLayer
from surogate_load.recipes.notes import Notes
from surogate_load.recipes.product import Operands, Pair
from surogate_load.weight import WeightKind


@dataclass(frozen=True)
class _DequantizedProduct:
    """Products with W dequantized to the dtype of the other factor."""

    kind: WeightKind

    def forward(
        self, x: Tensor, bias: Tensor | None, state: None, parts: Sequence[Tensor], plus: Pair | None = None
    ) -> Tensor:
        weight = self.kind.dequantize(parts, x.dtype).t()
        if plus is None:
            return torch.nn.functional.linear(x, weight.t(), bias)
        return _onto(torch.mm(*plus) if bias is None else torch.addmm(bias, *plus), x, weight)

    def input_gradient(
        self, gradient: Tensor, state: None, parts: Sequence[Tensor], plus: Pair | None = None
    ) -> Tensor:
        weight = self.kind.dequantize_for_backward(gradient, parts, gradient.dtype)
        return gradient @ weight if plus is None else _onto(torch.mm(*plus), gradient, weight)


def _onto(small: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Adds x [..., K] W [K, N] to [T, N]: the large product hides the reading of what it adds to, a small one can't."""
    torch.ops.surogate.add_product_(small, x.reshape(-1, x.shape[-1]), weight, 1.0)
    return small.view(*x.shape[:-1], small.shape[-1])


class Bf16(RecipeLayer):
    """Exactly the products of the dense model that holds the dequantized weights; no state."""

    @classmethod
    def build(cls, weight: PackedWeight, recipe: Recipe, notes: Notes, emulate: bool) -> Bf16:
        """Nothing depends on the weight or the switches."""
        return cls()

    @classmethod
    def unite(cls, layers: Sequence[RecipeLayer], kind: WeightKind) -> bool:
        """See `RecipeLayer.unite`: there is no state."""
        return True

    def operands(self, kind: WeightKind, parts: tuple[Tensor, ...]) -> Operands:
        """See `RecipeLayer.operands`."""
        return Operands(_DequantizedProduct(kind), None, parts)
