"""The weight gradient of an adapter under recipe nvfp4: a product over tokens whose two operands are NVFP4.

Both go through the random Hadamard transform along the tokens, which spreads outliers and cancels in the product.

The product is one of the dequantized operands in float32 on every device, tensor cores or not: one of its sides is the
adapter's rank, so that quantizing the operands takes longer than multiplying them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surogate_formats.nvfp4 import BLOCK
from surogate_load.recipes.fp4_operand import (
    ActivationRounding,
    dequantized,
    quantized_activation,
    quantized_gradient,
)
from surogate_load.recipes.noise import Noise


@dataclass(frozen=True)
class TokenRounding:
    """How the two operands are quantized.

    Attributes:
        hadamard: transform them first.
        stochastic: round the gradient stochastically.
    """

    hadamard: bool
    stochastic: bool


def _along_tokens(x: Tensor, rounding: TokenRounding) -> Tensor:
    """[..., F] to float32 [F, T], T padded with zeros to a multiple of 16 and transformed."""
    by_feature = x.reshape(-1, x.shape[-1]).t().float()
    padded = torch.nn.functional.pad(by_feature, (0, -by_feature.shape[1] % BLOCK))
    rotated: Tensor = torch.ops.surogate.hadamard16(padded) if rounding.hadamard else padded
    return rotated


def weight_gradient(gradient: Tensor, x: Tensor, rounding: TokenRounding, noise: tuple[Tensor, Tensor]) -> Tensor:
    """dy^T x, float32 [N, K], of dy [..., N] and x [..., K]."""
    dy = quantized_gradient(_along_tokens(gradient, rounding), rounding.stochastic, noise)
    return dequantized(dy) @ dequantized(quantized_activation(_along_tokens(x, rounding), ActivationRounding())).t()


class _TokenGradientLinear(torch.autograd.Function):
    """x W^T, whose gradient of W is quantized; that of x is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rounding: TokenRounding, noise: tuple[Tensor, Tensor]) -> Tensor:
        ctx.rounding, ctx.noise = rounding, noise
        ctx.save_for_backward(x, weight)
        return torch.nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        dx = gradient @ weight if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            dw = weight_gradient(gradient, x, ctx.rounding, ctx.noise).to(weight.dtype)
        return dx, dw, None, None


class AdapterLinear(nn.Linear):
    """A linear with the parameters of another one, whose weight gradient contracts over tokens in FP4."""

    def __init__(self, linear: nn.Linear, rounding: TokenRounding, noise: Noise) -> None:
        """Shares the parameters of `linear`, and the noise of the layer that it adapts."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._rounding = rounding
        self._noise = (noise,)  # in a tuple: as a child it would be saved with the adapter

    def plain(self) -> nn.Linear:
        """An ordinary linear with the same parameters."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N] in the dtype of x, or autocast's."""
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        weight = self.weight.to(dtype)
        noise = self._noise[0].state()
        y: Tensor = _TokenGradientLinear.apply(x.to(dtype), weight, self._rounding, noise)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(dtype)
