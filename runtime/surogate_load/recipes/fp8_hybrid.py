"""Recipe fp8-hybrid: E4M3 x E4M3 forward, E5M2 x E4M3 for the gradient of x, delayed scales for x and dy.

The products here are emulated: the quantized operands are multiplied in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surogate_formats.recipe import Recipe
from surogate_load.recipes.delayed import DelayedScale
from surogate_load.recipes.fp8_weight import E4M3, E4m3Source, Factors
from surogate_load.recipes.layer import PackedWeight, RecipeLayer, bias_gradient
from surogate_load.recipes.notes import Notes
from surogate_load.weight import WeightKind

E5M2 = torch.float8_e5m2


@dataclass(frozen=True)
class _Call:
    """The static arguments of one product."""

    kind: WeightKind
    dtype: torch.dtype
    margin: int
    record: bool


States = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


class Fp8Linear(torch.autograd.Function):
    """x W^T + bias with x in E4M3 and dy in E5M2. Saves the packed parts only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, call: _Call, states: States, factors: Factors, *parts: Tensor
    ) -> Tensor:
        """[..., K] to [..., N]; records the amax of x where `call.record`."""
        ctx.call, ctx.state, ctx.factors = call, states[1], factors
        ctx.save_for_backward(*parts)
        codes, decode = torch.ops.surogate.quantize_fp8(x, None, *states[0], call.record, call.margin, E4M3)
        matrix = call.kind.dequantize(parts, call.dtype, factors.multiplier)
        y = codes.float() @ matrix.float().t() * _product(decode, factors.whole)
        if factors.rows is not None:
            y = y * factors.rows
        result: Tensor = (y if bias is None else y + bias.float()).to(x.dtype)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Gives dx = dy W; records the amax of what is quantized."""
        call, factors, parts = ctx.call, ctx.factors, ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            codes, decode = torch.ops.surogate.quantize_fp8(
                gradient, factors.rows, *ctx.state, call.record, call.margin, E5M2
            )
            matrix = call.kind.dequantize_for_backward(gradient, parts, call.dtype, factors.multiplier)
            dx = (codes.float() @ matrix.float() * _product(decode, factors.whole)).to(gradient.dtype)
        bias = bias_gradient(gradient, ctx.needs_input_grad[1])
        return dx, bias, None, None, None, *(None for _ in parts)


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

    def multiply(self, x: Tensor, kind: WeightKind, parts: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """See `RecipeLayer.multiply`. Records amax only where a training step is under way."""
        record = self.training and torch.is_grad_enabled()
        if record:
            self.input.check_watched()
        weight = self.weight.operand(kind, tuple(parts))
        call = _Call(weight.kind, weight.dtype, self._margin, record)
        states = (self.input.state(), self.gradient.state())
        y: Tensor = Fp8Linear.apply(x, bias, call, states, weight.factors, *weight.parts)  # type: ignore[no-untyped-call]
        return y
