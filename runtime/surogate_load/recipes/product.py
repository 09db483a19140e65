"""The products of a packed base weight, and of an adapter beside it, as one autograd function each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from surogate_load import ops  # noqa: F401  (registers torch.ops.surogate)


class Product(Protocol):
    """How W multiplies in both directions: static, so that compiled code may depend on it.

    `state` holds what tensors the product needs besides the packed parts: scaling state, factors, noise.
    """

    def forward(self, x: Tensor, bias: Tensor | None, state: Any, parts: Sequence[Tensor]) -> Tensor:
        """X W^T + bias: [..., K] to a new contiguous [..., N] in the dtype of x."""

    def input_gradient(self, gradient: Tensor, state: Any, parts: Sequence[Tensor]) -> Tensor:
        """Dy W: [..., N] to a new contiguous [..., K] in the dtype of dy."""


class Operands(NamedTuple):
    """What a recipe multiplies with, as the autograd functions take it."""

    product: Product
    state: Any
    parts: tuple[Tensor, ...]


def bias_gradient(gradient: Tensor, wanted: bool) -> Tensor | None:
    """The sum of [..., N] over all but the last axis, if wanted."""
    return gradient.reshape(-1, gradient.shape[-1]).sum(0) if wanted else None


class PackedLinear(torch.autograd.Function):
    """x W^T + bias. Saves the packed parts only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, product: Product, state: Any, *parts: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        ctx.product, ctx.state = product, state
        ctx.save_for_backward(*parts)
        return product.forward(x, bias, state, parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Gives dx and the bias's gradient; none of W is ever formed."""
        parts = ctx.saved_tensors
        dx = ctx.product.input_gradient(gradient, ctx.state, parts) if ctx.needs_input_grad[0] else None
        return dx, bias_gradient(gradient, ctx.needs_input_grad[1]), None, None, *(None for _ in parts)


class PackedLoraLinear(torch.autograd.Function):
    """x W^T + bias + scaling * (x A^T) B^T with A [r, K] and B [N, r] in the dtype of x.

    Saves x, x A^T, A, B and the packed parts. The adapter's two large results are added where the base's stand, so that
    neither is written twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        product: Product,
        state: Any,
        *parts: Tensor,
    ) -> Tensor:
        """[..., K] to [..., N]."""
        ctx.product, ctx.state, ctx.scaling = product, state, scaling
        y = product.forward(x, bias, state, parts)
        xa = _rows(x) @ lora_a.t()
        torch.ops.surogate.add_product_(y.view(-1, y.shape[-1]), xa, lora_b.t(), scaling)
        ctx.save_for_backward(x, xa, lora_a, lora_b, *parts)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Gives dx and the gradients of bias, A and B."""
        x, xa, lora_a, lora_b, *parts = ctx.saved_tensors
        dy = _rows(gradient)
        dya = torch.ops.surogate.scaled_product(dy, lora_b, ctx.scaling)
        da = dya.t() @ _rows(x) if ctx.needs_input_grad[2] else None
        db = torch.ops.surogate.scaled_product(dy.t(), xa, ctx.scaling) if ctx.needs_input_grad[3] else None
        dx = None
        if ctx.needs_input_grad[0]:
            dx = ctx.product.input_gradient(gradient, ctx.state, parts)
            torch.ops.surogate.add_product_(dx.view(-1, dx.shape[-1]), dya, lora_a, 1.0)
        bias = bias_gradient(gradient, ctx.needs_input_grad[1])
        return dx, bias, da, db, None, None, None, *(None for _ in parts)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def multiply_with_lora(
    x: Tensor, bias: Tensor | None, adapter: tuple[Tensor, Tensor, float], operands: Operands
) -> Tensor:
    """See `PackedLoraLinear`; `adapter` is (A, B, scaling)."""
    product, state, parts = operands
    y: Tensor = PackedLoraLinear.apply(x, bias, *adapter, product, state, *parts)  # type: ignore[no-untyped-call]
    return y
