"""Cross-entropy of rows of logits, which become their gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from surogate_load.ops.library import define


def _cross_entropy(logits: Tensor, labels: Tensor, factor: Tensor, scale: float, cap: float, gradient: bool) -> Tensor:
    values = logits.float() * scale
    if cap:
        values = torch.tanh(values / cap) * cap
    counts = factor != 0
    chosen = torch.where(counts, labels, 0)[:, None]
    normalizer = torch.logsumexp(values, dim=-1, keepdim=True)
    loss = (normalizer - values.gather(1, chosen))[:, 0] * factor
    if gradient:
        slope = (1.0 - (values / cap) ** 2) * scale if cap else scale
        probabilities = torch.exp(values - normalizer)
        probabilities.scatter_add_(1, chosen, probabilities.new_full(chosen.shape, -1.0))
        logits.copy_(torch.where(counts[:, None], probabilities * factor[:, None] * slope, 0.0))
    return torch.where(counts, loss, 0.0)


def _fake(logits: Tensor, labels: Tensor, factor: Tensor, scale: float, cap: float, gradient: bool) -> Tensor:
    return factor.new_empty(factor.shape)


# logits [T, V]: float32, bfloat16 or float16. labels: int64 [T]. factor: float32 [T]: how often each row counts; where
# it is 0 the label isn't looked at. The loss is that of the values scale * logits, or cap * tanh(scale * logits / cap)
# where cap isn't 0; float32 [T]. With `gradient`, logits become the gradient of the losses' sum.
define(
    "cross_entropy_(Tensor(a!) logits, Tensor labels, Tensor factor, float scale, float cap, bool gradient) -> Tensor",
    _cross_entropy,
    _fake,
)
