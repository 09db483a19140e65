"""Cross-entropy of a frozen linear head: each chunk of logits gives its loss and its gradient, and is gone.

The gradient is that of `cross_entropy((h W^T).float(), labels)` as transformers computes it: softmax minus one-hot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

CHUNK = 1024
"""Tokens whose logits exist at the same time."""


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to logits: cap * tanh(scale * logits / cap), without a cap scale * logits.

    Attributes:
        scale: a factor.
        cap: the softcap.
    """

    scale: float = 1.0
    cap: float | None = None

    def apply(self, logits: Tensor) -> Tensor:
        """Of float32 logits."""
        scaled = logits * self.scale
        return scaled if self.cap is None else torch.tanh(scaled / self.cap) * self.cap

    def slope(self, transformed: Tensor) -> Tensor | float:
        """The derivative, from what `apply` returned."""
        if self.cap is None:
            return self.scale
        relative = transformed / self.cap
        return (1.0 - relative * relative) * self.scale


PLAIN = LogitTransform()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    items: Tensor | float | None = None,
    ignore_index: int = -100,
    transform: LogitTransform = PLAIN,
) -> Tensor:
    """The loss of logits `hidden` weight^T, float32 [], differentiable in `hidden` only.

    Args:
        hidden: [T, H].
        weight: [V, H], frozen, in the dtype of `hidden`.
        labels: int64 [T]: what each row predicts.
        items: divides the sum; by default the number of labels that count.
        ignore_index: the label that doesn't count.
        transform: what is done to the logits first.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, items, ignore_index, transform)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        items: Tensor | float | None,
        ignore_index: int,
        transform: LogitTransform,
    ) -> Tensor:
        valid = labels != ignore_index
        divisor = valid.sum() if items is None else torch.as_tensor(items, device=hidden.device)
        factor = valid / divisor.float()
        needed = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if needed else None
        losses = []
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            logits = hidden[part] @ weight.t()
            loss, dlogits = _chunk_function(hidden.device.type)(logits, labels[part], factor[part], transform, needed)
            losses.append(loss)
            if gradient is not None and dlogits is not None:
                torch.mm(dlogits, weight, out=gradient[part])
        ctx.save_for_backward(gradient)
        return torch.stack(losses).sum() if losses else hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        (dhidden,) = ctx.saved_tensors
        return (dhidden * gradient).to(dhidden.dtype), None, None, None, None, None


def _chunk(
    logits: Tensor, labels: Tensor, factor: Tensor, transform: LogitTransform, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Loss, and the gradient of logits [C, V] in their dtype; each row counts `factor` times, which may be 0."""
    values = transform.apply(logits.float())
    normalizer = torch.logsumexp(values, dim=-1, keepdim=True)
    chosen = torch.arange(values.shape[-1], device=labels.device) == labels[:, None]
    target = torch.where(chosen, values, 0.0).sum(-1)
    # A factor of 0 must not meet an infinite loss.
    losses = torch.where(factor > 0, (normalizer[:, 0] - target) * factor, 0.0)
    if not gradient:
        return losses.sum(), None
    probabilities = torch.exp(values - normalizer)
    dlogits = torch.where(chosen, probabilities - 1.0, probabilities) * factor[:, None] * transform.slope(values)
    return losses.sum(), dlogits.to(logits.dtype)


@cache
def _chunk_function(device: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Compiled where that turns a dozen passes over the logits into three."""
    return torch.compile(_chunk, dynamic=True) if device == "cuda" else _chunk
