"""Cross-entropy of a frozen linear head: each chunk of logits gives its loss and its gradient, and is gone.

The gradient is that of `cross_entropy((h W^T).float(), labels)` as transformers computes it: softmax minus one-hot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surogate_load import ops  # noqa: F401  (registers torch.ops.surogate)

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
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        losses = []
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            logits = hidden[part] @ weight.t()
            losses.append(
                torch.ops.surogate.cross_entropy_(
                    logits, labels[part], factor[part], transform.scale, transform.cap or 0.0, gradient is not None
                )
            )
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[part])
        ctx.save_for_backward(gradient)
        return torch.cat(losses).sum() if losses else hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        (dhidden,) = ctx.saved_tensors
        return (dhidden * gradient).to(dhidden.dtype), None, None, None, None, None
