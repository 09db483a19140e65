"""The product of one projection of all experts, and of adapters beside it, as one autograd function each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from surogate_load.experts.kind import ExpertsKind
from surogate_load.kernels import experts as _kernels  # noqa: F401  (registers the ops and what runs them on CUDA)


class GroupedWeight(Protocol):
    """What gives the dense weights [E, N, K] of all experts; static, so that compiled code may depend on it.

    What belongs to experts without rows is never read.
    """

    def forward(self, parts: Sequence[Tensor], ends: Tensor, dtype: torch.dtype) -> Tensor:
        """The weights, for the forward."""

    def backward(self, gradient: Tensor, parts: Sequence[Tensor], ends: Tensor, dtype: torch.dtype) -> Tensor:
        """The same for the backward, in a way that can't be moved into the forward and saved."""


@dataclass(frozen=True)
class PackedWeight:
    """Weights that are dequantized for each product; see `GroupedWeight`.

    Attributes:
        kind: the `key` of their `ExpertsKind`.
    """

    kind: str

    @classmethod
    def of(cls, kind: ExpertsKind) -> PackedWeight:
        """For stacked parts of this kind."""
        return cls(kind.key)

    def forward(self, parts: Sequence[Tensor], ends: Tensor, dtype: torch.dtype) -> Tensor:
        """See `GroupedWeight`."""
        weight: Tensor = torch.ops.surogate.dequantize_experts(parts, ends, self.kind, dtype)
        return weight

    def backward(self, gradient: Tensor, parts: Sequence[Tensor], ends: Tensor, dtype: torch.dtype) -> Tensor:
        """See `GroupedWeight`."""
        weight: Tensor = torch.ops.surogate.dequantize_experts_for_backward(gradient, parts, ends, self.kind, dtype)
        return weight


class ExpertsAdapter(NamedTuple):
    """scaling * B A of each expert, with A [E, r, K] and B [E, N, r]."""

    lora_a: Tensor
    lora_b: Tensor
    scaling: float


class _Grouped(torch.autograd.Function):
    """Rows times their experts' weights. Saves the packed parts only."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        # Not by name: dynamo leaves ctx out where as many arguments come as `forward` names, which two parts would do.
        x, ends, weight, *parts = arguments
        ctx.weight = weight
        ctx.save_for_backward(ends, *parts)
        return _product(x, weight.forward(parts, ends, x.dtype).mT, ends)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        ends, *parts = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            gradient = gradient.contiguous()
            dx = _product(gradient, ctx.weight.backward(gradient, parts, ends, gradient.dtype), ends)
        return dx, None, None, *(None for _ in parts)


class _GroupedLora(torch.autograd.Function):
    """The same, plus scaling * (x A^T) B^T. Saves x, scaling * x A^T, A, B and the packed parts."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        ends: Tensor,
        scaling: float,
        weight: GroupedWeight,
        *parts: Tensor,
    ) -> Tensor:
        ctx.weight, ctx.scaling = weight, scaling
        xa = _product(x, lora_a.mT, ends) * scaling
        y = _product(x, weight.forward(parts, ends, x.dtype).mT, ends)
        ctx.save_for_backward(x, xa, lora_a, lora_b, ends, *parts)
        return y.add_(_product(xa, lora_b.mT, ends))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, xa, lora_a, lora_b, ends, *parts = ctx.saved_tensors
        dy = gradient.contiguous()
        dya = _product(dy, lora_b, ends) * ctx.scaling
        da = torch.ops.surogate.grouped_outer_product(dya, x, ends)
        db = torch.ops.surogate.grouped_outer_product(dy, xa, ends)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _product(dy, ctx.weight.backward(dy, parts, ends, dy.dtype), ends)
            dx.add_(_product(dya, lora_a, ends))
        return dx, da, db, None, None, None, *(None for _ in parts)


def _product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    y: Tensor = torch.ops.surogate.grouped_product(x, weight, ends)
    return y


def multiply(
    x: Tensor, ends: Tensor, weight: GroupedWeight, parts: Sequence[Tensor], adapter: ExpertsAdapter | None = None
) -> Tensor:
    """Rows [S, K], sorted by expert, times the weights of their experts: [S, N] in the dtype of x.

    Differentiable in x and in the adapter's matrices; of the base nothing dense is kept for the backward.

    Args:
        x: contiguous rows.
        ends: int32 [E], where each expert's rows end.
        weight: gives the weights.
        parts: what it makes them of.
        adapter: in the dtype of x; its gradients are zero for experts without rows.
    """
    if adapter is None:
        y: Tensor = _Grouped.apply(x, ends, weight, *parts)  # type: ignore[no-untyped-call]
        return y
    lora_a, lora_b, scaling = adapter
    added: Tensor = _GroupedLora.apply(x, lora_a, lora_b, ends, scaling, weight, *parts)  # type: ignore[no-untyped-call]
    return added
