"""The products of a packed base weight, and of adapters beside it, as one autograd function each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from surogate_load import ops  # noqa: F401  (registers torch.ops.surogate)

Pair = tuple[Tensor, Tensor]
"""Two matrices [T, r] and [r, N] whose product is wanted beside another one [T, N]."""


class Product(Protocol):
    """How W multiplies in both directions: static, so that compiled code may depend on it.

    `state` holds what tensors the product needs besides the packed parts: scaling state, factors, noise. `plus` is
    added to the result, in whichever order is faster.
    """

    def forward(
        self, x: Tensor, bias: Tensor | None, state: Any, parts: Sequence[Tensor], plus: Pair | None = None
    ) -> Tensor:
        """X W^T + bias: [..., K] to a new contiguous [..., N] in the dtype of x."""

    def input_gradient(self, gradient: Tensor, state: Any, parts: Sequence[Tensor], plus: Pair | None = None) -> Tensor:
        """Dy W: [..., N] to a new contiguous [..., K] in the dtype of dy."""


class Operands(NamedTuple):
    """What a recipe multiplies with, as the autograd functions take it."""

    product: Product
    state: Any
    parts: tuple[Tensor, ...]


class Adapter(NamedTuple):
    """scaling * B A with A [r, K] and B [N, r]."""

    lora_a: Tensor
    lora_b: Tensor
    scaling: float


@dataclass(frozen=True)
class Placement:
    """Where adapters stand beside a weight whose rows belong to several layers, one after the other.

    Attributes:
        size: rows of the weight.
        rows: (first, end) of them for each adapter.
        ranks: of each.
        scaling: of all.
    """

    size: int
    rows: tuple[tuple[int, int], ...]
    ranks: tuple[int, ...]
    scaling: float


def add_pair(y: Tensor, plus: Pair | None) -> Tensor:
    """Y [..., N], contiguous, with the product of a pair added where it stands."""
    if plus is not None:
        torch.ops.surogate.add_product_(y.view(-1, y.shape[-1]), *plus, 1.0)
    return y


def bias_gradient(gradient: Tensor, wanted: bool) -> Tensor | None:
    """The sum of [..., N] over all but the last axis, if wanted."""
    return gradient.reshape(-1, gradient.shape[-1]).sum(0) if wanted else None


class PackedLinear(torch.autograd.Function):
    """x W^T + bias. Saves the packed parts only."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """Of x [..., K], bias, product, state and parts: [..., N]."""
        # Not by name: dynamo leaves ctx out where as many arguments come as `forward` names, which two parts would do.
        x, bias, product, state, *parts = arguments
        ctx.product, ctx.state = product, state
        ctx.save_for_backward(*parts)
        y: Tensor = product.forward(x, bias, state, parts)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Gives dx and the bias's gradient; none of W is ever formed."""
        parts = ctx.saved_tensors
        dx = ctx.product.input_gradient(gradient, ctx.state, parts) if ctx.needs_input_grad[0] else None
        return dx, bias_gradient(gradient, ctx.needs_input_grad[1]), None, None, *(None for _ in parts)


class PackedLoraLinear(torch.autograd.Function):
    """x W^T + bias + scaling * (x A^T) B^T, the adapters' A one below the other, their B block-diagonal.

    Saves x, scaling * x A^T, A, B and the packed parts.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        placement: Placement,
        product: Product,
        state: Any,
        *tensors: Tensor,
    ) -> Tensor:
        """[..., K] to [..., N]; `tensors` are every adapter's A, every adapter's B, and the packed parts."""
        count = len(placement.ranks)
        parts = tensors[2 * count :]
        lora_a = _below_each_other(tensors[:count])
        lora_b = _block_diagonal(tensors[count : 2 * count], placement)
        xa = _scaled_product(_rows(x), lora_a.t(), placement.scaling)
        y = product.forward(x, bias, state, parts, (xa, lora_b.t()))
        ctx.product, ctx.state, ctx.placement = product, state, placement
        ctx.save_for_backward(x, xa, lora_a, lora_b, *parts)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Gives dx and the gradients of bias, A and B."""
        x, xa, lora_a, lora_b, *parts = ctx.saved_tensors
        placement, dy = ctx.placement, _rows(gradient)
        dya = _scaled_product(dy, lora_b, placement.scaling)
        da = torch.split(dya.t() @ _rows(x), list(placement.ranks))
        db = _diagonal_blocks(dy.t() @ xa, placement)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = ctx.product.input_gradient(gradient, ctx.state, parts, (dya, lora_a))
        bias = bias_gradient(gradient, ctx.needs_input_grad[1])
        return dx, bias, None, None, None, *da, *db, *(None for _ in parts)


def multiply_with_adapters(
    x: Tensor, bias: Tensor | None, adapters: Sequence[Adapter], placement: Placement, operands: Operands
) -> Tensor:
    """See `PackedLoraLinear`."""
    product, state, parts = operands
    tensors = (*(a.lora_a for a in adapters), *(a.lora_b for a in adapters), *parts)
    y: Tensor = PackedLoraLinear.apply(x, bias, placement, product, state, *tensors)  # type: ignore[no-untyped-call]
    return y


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _scaled_product(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """Gives scaling * left @ right, scaled where it is made: inductor would make a kernel of its own of the scaling.

    The first argument of `addmm` is something of the right form, which beta=0 has it not read.
    """
    return torch.addmm(right[:1], left, right, beta=0, alpha=scaling)


def _below_each_other(matrices: Sequence[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(tuple(matrices))


def _block_diagonal(matrices: Sequence[Tensor], placement: Placement) -> Tensor:
    rows = placement.size
    if placement.rows == ((0, rows),):
        return matrices[0]
    columns = []
    for (first, end), matrix in zip(placement.rows, matrices, strict=True):
        columns.append(torch.nn.functional.pad(matrix, (0, 0, first, rows - end)))
    return torch.cat(columns, dim=1)


def _diagonal_blocks(matrix: Tensor, placement: Placement) -> list[Tensor]:
    columns = torch.split(matrix, list(placement.ranks), dim=1)
    return [column[first:end].contiguous() for (first, end), column in zip(placement.rows, columns, strict=True)]
