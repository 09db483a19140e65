"""Recipe nvfp4: FP4 operands in 1x16 blocks in both directions; gradients are rounded stochastically.

The products here are emulated: the quantized operands are multiplied in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surogate_formats.recipe import Recipe
from surogate_load.recipes.fp4_operand import ActivationRounding, rounded_activation, rounded_gradient
from surogate_load.recipes.fp4_weight import Fp4Operand, Fp4Weights, make_weights
from surogate_load.recipes.layer import PackedWeight, RecipeLayer, bias_gradient
from surogate_load.recipes.noise import Noise
from surogate_load.recipes.notes import Notes
from surogate_load.recipes.token_gradient import AdapterLinear, TokenRounding
from surogate_load.weight import WeightKind


@dataclass(frozen=True)
class _Call:
    """The static arguments of one product."""

    forward: Fp4Operand
    backward: Fp4Operand
    activation: ActivationRounding
    stochastic: bool


class Fp4Linear(torch.autograd.Function):
    """x W^T + bias with x, dy and W in NVFP4. Saves the packed parts only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, call: _Call, noise: tuple[Tensor, Tensor], *parts: Tensor
    ) -> Tensor:
        """[..., K] to [..., N]; `parts` are those of the forward operand, then those of the backward, if others."""
        count = len(call.forward.kind.specs)
        ctx.call, ctx.noise, ctx.count = call, noise, len(parts)
        ctx.save_for_backward(*(parts[count:] or parts))
        operand = call.forward
        if not operand.fp4:
            return torch.nn.functional.linear(x, operand.kind.dequantize(parts[:count], x.dtype), bias)
        weight = operand.kind.dequantize(parts[:count], torch.float32)
        y = rounded_activation(x.reshape(-1, x.shape[-1]), call.activation) @ weight.t()
        y = (y if bias is None else y + bias.float()).to(x.dtype)
        return y.reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Gives dx = dy W."""
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _input_gradient(gradient, ctx.call, ctx.noise, ctx.saved_tensors)
        bias = bias_gradient(gradient, ctx.needs_input_grad[1])
        return dx, bias, None, None, *(None for _ in range(ctx.count))


def _input_gradient(gradient: Tensor, call: _Call, noise: tuple[Tensor, Tensor], parts: Sequence[Tensor]) -> Tensor:
    operand = call.backward
    if not operand.fp4:
        return gradient @ operand.kind.dequantize_for_backward(gradient, parts, gradient.dtype)
    weight = operand.kind.dequantize_for_backward(gradient, parts, torch.float32)
    weight = weight.t() if operand.transposed else weight
    dy = rounded_gradient(gradient.reshape(-1, gradient.shape[-1]), call.stochastic, noise)
    return (dy @ weight).to(gradient.dtype).reshape(*gradient.shape[:-1], weight.shape[1])


class Nvfp4(RecipeLayer):
    """The noise of one layer, and its weight as FP4 operands.

    Attributes:
        noise: seed and counter of stochastic rounding.
        weights: what is multiplied forward and backward.
    """

    def __init__(self, weights: Fp4Weights, recipe: Recipe, name: str) -> None:
        """The layer of this full name; `backend` cudnn knows no Four-Over-Six."""
        super().__init__()
        self.noise = Noise(name)
        self.weights = weights
        self._activation = ActivationRounding(
            recipe.four_over_six and recipe.backend == "cutlass", recipe.four_over_six_metric
        )
        self._stochastic = not recipe.disable_stochastic_rounding
        self._tokens = TokenRounding(hadamard=not recipe.disable_rht, stochastic=self._stochastic)

    @classmethod
    def build(cls, weight: PackedWeight, recipe: Recipe, notes: Notes) -> Nvfp4:
        """Quantizes the weight, or its transpose, where the artifact's codes can't be multiplied as they stand."""
        return cls(make_weights(weight, recipe, notes), recipe, weight.name)

    def multiply(self, x: Tensor, kind: WeightKind, parts: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """See `RecipeLayer.multiply`."""
        forward, backward, tensors = self.weights.operands(tuple(parts))
        call = _Call(forward, backward, self._activation, self._stochastic)
        y: Tensor = Fp4Linear.apply(x, bias, call, self.noise.state(), *tensors)  # type: ignore[no-untyped-call]
        return y

    def adapter_linear(self, linear: nn.Linear) -> nn.Linear:
        """A linear whose weight gradient contracts over tokens in FP4."""
        return AdapterLinear(linear, self._tokens, self.noise)
