"""Rows for experts: every token once for each of its experts, sorted by expert; and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Which rows are whose. T tokens, k experts for each, S = T * k rows.

    Attributes:
        tokens: int64 [S], the token of each row.
        slots: int64 [S], which of the router's T * k weights is the row's.
        places: int64 [T, k], the rows of each token, in the order of their experts.
        experts: int64 [S], each row's expert, ascending.
        ends: int32 [E], where each expert's rows end.
    """

    tokens: Tensor
    slots: Tensor
    places: Tensor
    experts: Tensor
    ends: Tensor


def route(top_k_index: Tensor, experts: int) -> Routing:
    """The routing of a router's choice, [T, k] of numbers below `experts`.

    An expert's rows stand in the order in which transformers' own loop takes them, so that sums come out the same.
    """
    count, k = top_k_index.shape
    chosen, order = torch.sort(top_k_index.t().reshape(-1), stable=True)
    tokens = order % max(count, 1)
    rows = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    places = rows.view(k, count).t().sort(dim=1).values
    ends = torch.searchsorted(chosen, torch.arange(experts, device=chosen.device), right=True, out_int32=True)
    return Routing(tokens, tokens * k + order // max(count, 1), places, chosen, ends)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        (places,) = ctx.saved_tensors
        return _summed(gradient, places), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        return _summed(y, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        (tokens,) = ctx.saved_tensors
        return gradient.index_select(0, tokens), None, None


def _summed(rows: Tensor, places: Tensor) -> Tensor:
    """[S, H] to [T, H], the same in every run: no two threads add to one place."""
    return rows.index_select(0, places.reshape(-1)).view(*places.shape, rows.shape[-1]).sum(1)


def spread(x: Tensor, routing: Routing) -> Tensor:
    """Tokens [T, H] to rows [S, H]."""
    rows: Tensor = _Spread.apply(x, routing.tokens, routing.places)  # type: ignore[no-untyped-call]
    return rows


def gather(y: Tensor, routing: Routing) -> Tensor:
    """Rows [S, H] to tokens [T, H]: the sum of each token's rows."""
    tokens: Tensor = _Gather.apply(y, routing.tokens, routing.places)  # type: ignore[no-untyped-call]
    return tokens
