"""Recipe nvfp4: FP4 operands in 1x16 blocks in both directions; gradients are rounded stochastically.

On tensor cores (not run on hardware, see `fp4_matmul`), or emulated: the same quantized operands multiplied in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from surogate_formats.nvfp4 import NVFP4
from surogate_formats.recipe import Recipe
from surogate_load.errors import UnsupportedShardingError
from surogate_load.recipes.fp4_matmul import tensor_core_obstacle
from surogate_load.recipes.fp4_operand import ActivationRounding, dequantized, quantized_activation, quantized_gradient
from surogate_load.recipes.fp4_weight import Fp4Operand, Fp4Weights, make_weights
from surogate_load.recipes.layer import PackedWeight, RecipeLayer
from surogate_load.recipes.noise import Noise
from surogate_load.recipes.notes import Notes
from surogate_load.recipes.product import Operands, Pair, add_pair
from surogate_load.recipes.token_gradient import AdapterLinear, TokenRounding
from surogate_load.weight import WeightKind


class _State(NamedTuple):
    """Seed and offset of the noise, and W's block scales for the forward on tensor cores."""

    noise: tuple[Tensor, Tensor]
    swizzled: Tensor | None


@dataclass(frozen=True)
class _Fp4Product:
    """Products with x, dy and W in NVFP4.

    `parts` are those of the forward operand, then those of the backward's, if others.
    """

    forward_operand: Fp4Operand
    backward_operand: Fp4Operand
    activation: ActivationRounding
    stochastic: bool

    def forward(
        self, x: Tensor, bias: Tensor | None, state: _State, parts: Sequence[Tensor], plus: Pair | None = None
    ) -> Tensor:
        return add_pair(self._forward_product(x, bias, state, parts[: self._forward_parts()]), plus)

    def input_gradient(
        self, gradient: Tensor, state: _State, parts: Sequence[Tensor], plus: Pair | None = None
    ) -> Tensor:
        parts = parts[self._forward_parts() :] or parts
        return add_pair(self._gradient_product(gradient, state, parts), plus)

    def _forward_product(self, x: Tensor, bias: Tensor | None, state: _State, parts: Sequence[Tensor]) -> Tensor:
        operand = self.forward_operand
        if not operand.fp4:
            return torch.nn.functional.linear(x, operand.kind.dequantize(parts, x.dtype), bias)
        weight = operand.kind.dequantize(parts, torch.float32)
        y = dequantized(quantized_activation(x.reshape(-1, x.shape[-1]), self.activation)) @ weight.t()
        y = (y if bias is None else y + bias.float()).to(x.dtype)
        return y.reshape(*x.shape[:-1], weight.shape[0])

    def _gradient_product(self, gradient: Tensor, state: _State, parts: Sequence[Tensor]) -> Tensor:
        operand = self.backward_operand
        if not operand.fp4:
            return gradient @ operand.kind.dequantize_for_backward(gradient, parts, gradient.dtype)
        weight = operand.kind.dequantize_for_backward(gradient, parts, torch.float32)
        weight = weight.t() if operand.transposed else weight
        dy = quantized_gradient(gradient.reshape(-1, gradient.shape[-1]), self.stochastic, state.noise)
        return (dequantized(dy) @ weight).to(gradient.dtype).reshape(*gradient.shape[:-1], weight.shape[1])

    def _forward_parts(self) -> int:
        return len(self.forward_operand.kind.specs)


class _TensorCoreProduct(_Fp4Product):
    """The same on tensor cores; the scales of a backward operand of its own are swizzled. Not run on hardware."""

    def _forward_product(self, x: Tensor, bias: Tensor | None, state: _State, parts: Sequence[Tensor]) -> Tensor:
        codes, _, stored_g = parts
        global_scale = _divisor(self.forward_operand.kind, stored_g)
        rows = quantized_activation(x.reshape(-1, x.shape[-1]), self.activation)
        y: Tensor = torch.ops.surogate.nvfp4_product(*rows, codes, state.swizzled, global_scale, x.dtype)
        y = y if bias is None else y + bias
        return y.reshape(*x.shape[:-1], codes.shape[0])

    def _gradient_product(self, gradient: Tensor, state: _State, parts: Sequence[Tensor]) -> Tensor:
        codes, scale, stored_g = parts
        global_scale = _divisor(self.backward_operand.kind, stored_g)
        if not self.backward_operand.transposed:
            codes, scale = torch.ops.surogate.transpose_nvfp4_for_backward(gradient, codes, scale)
        rows = quantized_gradient(gradient.reshape(-1, gradient.shape[-1]), self.stochastic, state.noise)
        dx: Tensor = torch.ops.surogate.nvfp4_product(*rows, codes, scale, global_scale, gradient.dtype)
        return dx.reshape(*gradient.shape[:-1], codes.shape[0])


def _divisor(kind: WeightKind, global_scale: Tensor) -> Tensor:
    """The global scale as a divisor; of a multiplying one that is no power of two the reciprocal, rounded."""
    fmt = kind.format
    return global_scale.reciprocal() if isinstance(fmt, NVFP4) and fmt.step == "multiply" else global_scale


class Nvfp4(RecipeLayer):
    """The noise of one layer, and its weight as FP4 operands.

    Attributes:
        noise: seed and counter of stochastic rounding.
        weights: what is multiplied forward and backward.
    """

    def __init__(self, weights: Fp4Weights, recipe: Recipe, name: str, product: type[_Fp4Product]) -> None:
        """The layer of this full name; `backend` cudnn knows no Four-Over-Six."""
        super().__init__()
        self.noise = Noise(name)
        self.weights = weights
        self._activation = ActivationRounding(
            recipe.four_over_six and recipe.backend == "cutlass", recipe.four_over_six_metric
        )
        self._stochastic = not recipe.disable_stochastic_rounding
        self._tokens = TokenRounding(hadamard=not recipe.disable_rht, stochastic=self._stochastic)
        self._product = product

    @classmethod
    def build(cls, weight: PackedWeight, recipe: Recipe, notes: Notes, emulate: bool) -> Nvfp4:
        """Quantizes the weight, or its transpose, where the artifact's codes can't be multiplied as they stand.

        On tensor cores, unless emulated; what those can't multiply is emulated, and `notes` says so.
        """
        if weight.parts[0].is_meta:
            raise UnsupportedShardingError(
                "recipe nvfp4 looks at the weights before they are sharded: load the model with device='cpu'"
            )
        weights = make_weights(weight, recipe, notes)
        if emulate or not weights.fp4:
            return cls(weights, recipe, weight.name, _Fp4Product)
        reason = tensor_core_obstacle(weight.kind)
        if reason is not None:
            notes.add(f"{reason}: the base's FP4 operands are multiplied in float32, slowly", weight.name)
            return cls(weights, recipe, weight.name, _Fp4Product)
        weights.swizzle(weight.parts)
        return cls(weights, recipe, weight.name, _TensorCoreProduct)

    def operands(self, kind: WeightKind, parts: tuple[Tensor, ...]) -> Operands:
        """See `RecipeLayer.operands`."""
        forward, backward, tensors = self.weights.operands(parts)
        product = self._product(forward, backward, self._activation, self._stochastic)
        return Operands(product, _State(self.noise.state(), self.weights.swizzled), tensors)

    def adapter_linear(self, linear: nn.Linear) -> nn.Linear:
        """A linear whose weight gradient contracts over tokens in FP4."""
        return AdapterLinear(linear, self._tokens, self.noise)
