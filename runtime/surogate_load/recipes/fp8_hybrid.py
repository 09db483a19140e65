"""Recipe fp8-hybrid: E4M3 x E4M3 forward, E5M2 x E4M3 for the gradient of x, delayed scales for x and dy.

The products here are emulated: the quantized operands are multiplied in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from surogate_formats.recipe import Recipe
from surogate_load.recipes.delayed import DelayedScale
from surogate_load.recipes.fp8_weight import E4M3, E4m3Source, Factors
from surogate_load.recipes.layer import PackedWeight, RecipeLayer
from surogate_load.recipes.notes import Notes
from surogate_load.recipes.product import Operands
from surogate_load.weight import WeightKind

E5M2 = torch.float8_e5m2


class _State(NamedTuple):
    """(scale, current) of x and of dy, and what surrounds the weight's E4M3 matrix."""

    input: tuple[Tensor, Tensor]
    gradient: tuple[Tensor, Tensor]
    factors: Factors


@dataclass(frozen=True)
class _Fp8Product:
    """Products with x in E4M3, dy in E5M2 and W in E4M3; each records the amax of what it quantizes.

    Attributes:
        kind: of the weight's E4M3 matrix.
        dtype: in which that is dequantized.
        margin: of the recipe.
        record: whether this is part of a training step.
    """

    kind: WeightKind
    dtype: torch.dtype
    margin: int
    record: bool

    def forward(self, x: Tensor, bias: Tensor | None, state: _State, parts: Sequence[Tensor]) -> Tensor:
        factors = state.factors
        codes, decode = torch.ops.surogate.quantize_fp8(x, None, *state.input, self.record, self.margin, E4M3)
        matrix = self.kind.dequantize(parts, self.dtype, factors.multiplier)
        y = codes.float() @ matrix.float().t() * _product(decode, factors.whole)
        if factors.rows is not None:
            y = y * factors.rows
        result: Tensor = (y if bias is None else y + bias.float()).to(x.dtype)
        return result

    def input_gradient(self, gradient: Tensor, state: _State, parts: Sequence[Tensor]) -> Tensor:
        factors = state.factors
        codes, decode = torch.ops.surogate.quantize_fp8(
            gradient, factors.rows, *state.gradient, self.record, self.margin, E5M2
        )
        matrix = self.kind.dequantize_for_backward(gradient, parts, self.dtype, factors.multiplier)
        dx: Tensor = (codes.float() @ matrix.float() * _product(decode, factors.whole)).to(gradient.dtype)
        return dx


def _product(decode: Tensor, whole: Tensor | None) -> Tensor:
    return decode if whole is None else decode * whole


class Fp8Hybrid(RecipeLayer):
    """The scaling state of x and dy, and the weight as an E4M3 operand.

    Attributes:
        input: of x, E4M3.
        gradient: of dy, E5M2.
        weight: how the format becomes an operand.
    """

    def __init__(self, weight: PackedWeight, recipe: Recipe) -> None:
        """Fresh state."""
        super().__init__()
        self.input = DelayedScale(E4M3, recipe)
        self.gradient = DelayedScale(E5M2, recipe)
        self.weight = E4m3Source(weight)
        self._margin = recipe.margin

    @classmethod
    def build(cls, weight: PackedWeight, recipe: Recipe, notes: Notes) -> Fp8Hybrid:
        """Every weight can be multiplied so; there is nothing to say."""
        return cls(weight, recipe)

    def operands(self, kind: WeightKind, parts: tuple[Tensor, ...]) -> Operands:
        """See `RecipeLayer.operands`. Records amax only where a training step is under way."""
        record = self.training and torch.is_grad_enabled()
        if record:
            self.input.check_watched()
        weight = self.weight.operand(kind, parts)
        product = _Fp8Product(weight.kind, weight.dtype, self._margin, record)
        return Operands(product, _State(self.input.state(), self.gradient.state(), weight.factors), weight.parts)
