"""How far a model's predictions are from a reference model's: mean KL divergence and perplexity."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

POSITIONS = 256
"""Token positions handled at once: bounds the temporaries to a few times 256 x vocabulary fp32 values."""


def reference_logprobs(model: Any, ids: "Tensor") -> "Tensor":
    """Returns the log-probabilities (nats) that `model` gives to every next token.

    Args:
        model: a causal language model of transformers.
        ids: int64 token ids `[windows, tokens]`; a window never sees another.

    Returns:
        fp32 `[windows, tokens, vocabulary]` on the CPU (3 x 1024 tokens of 49152 words: 604 MB).
    """
    import torch

    with evaluating(model):
        return torch.stack([_logprobs(model, window).cpu() for window in ids])


def kl_and_perplexity(model: Any, ids: "Tensor", reference: "Tensor") -> tuple[float, float]:
    """Compares `model` with a reference on the same text.

    The divergence is `sum_v p(v) (log p(v) - log q(v))`, p the reference's distribution and q the model's
    (Kullback and Leibler, 1951), averaged over all `windows * tokens` positions. Perplexity is exp of
    the mean negative log-likelihood of the `windows * (tokens - 1)` tokens that have a predecessor. Logits are
    taken in the model's dtype (fp32 compares weights alone), log-probabilities in fp32, sums in fp64.

    Args:
        model: a causal language model of transformers.
        ids: int64 token ids `[windows, tokens]`.
        reference: fp32 `[windows, tokens, vocabulary]` of `reference_logprobs` on the same `ids`.

    Returns:
        The mean KL(reference || model) in nats, and the model's perplexity.
    """
    divergence = likelihood = 0.0
    with evaluating(model):
        for window, expected in zip(ids, reference, strict=True):
            logprobs = _logprobs(model, window)
            divergence += _divergence(expected, logprobs)
            following = window[1:].to(logprobs.device).unsqueeze(1)
            likelihood += logprobs[:-1].gather(1, following).double().sum().item()
    windows, tokens = ids.shape
    return divergence / (windows * tokens), math.exp(-likelihood / (windows * (tokens - 1)))


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Without gradients and without dropout; the training mode is put back afterwards."""
    import torch

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _logprobs(model: Any, window: "Tensor") -> "Tensor":
    logits: Tensor = model(input_ids=window.unsqueeze(0).to(model.device), use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


def _divergence(expected: "Tensor", logprobs: "Tensor") -> float:
    """Sum over positions of KL(expected || logprobs), both fp32 `[tokens, vocabulary]`."""
    import torch

    total = 0.0
    for p, q in zip(torch.split(expected, POSITIONS), torch.split(logprobs, POSITIONS), strict=True):
        p_here = p.to(q.device)
        total += (p_here.exp() * (p_here - q)).sum(dtype=torch.float64).item()
    return total
