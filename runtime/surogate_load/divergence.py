"""How far a model's predictions are from a reference model's: mean KL divergence and perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surogate_formats.errors import UsageError

POSITIONS = 256
"""Token positions compared at once: bounds the temporaries to a few times 256 x vocabulary float32 values."""


@dataclass(frozen=True)
class Evaluation:
    """A comparison on one text.

    Attributes:
        tokens: how many were predicted from.
        mean_kl: mean KL(reference || model) in nats.
        perplexity: of the model.
        reference_perplexity: of the reference.
    """

    tokens: int
    mean_kl: float
    perplexity: float
    reference_perplexity: float


class TooShortTextError(UsageError):
    """A text with fewer tokens than one window."""


def windows(ids: list[int], context: int, count: int) -> Tensor:
    """The first `count` windows of `context` tokens each, int64 [<= count, context]; an incomplete one is left out."""
    whole = min(count, len(ids) // context)
    if whole == 0:
        raise TooShortTextError(
            f"the text has {len(ids)} tokens, fewer than --context {context}: lower it, or give more"
        )
    return torch.tensor(ids[: whole * context]).reshape(whole, context)


def evaluate(model: Any, reference: Any, ids: Tensor) -> Evaluation:
    """Compares a model with a reference, window by window, so that memory doesn't grow with the text.

    Args:
        model: a causal language model of transformers.
        reference: another one with the same vocabulary.
        ids: int64 [windows, tokens]; a window never sees another.
    """
    divergence = own = expected = 0.0
    with _evaluating(model), _evaluating(reference):
        for window in ids:
            p, q = _log_probabilities(reference, window), _log_probabilities(model, window)
            divergence += _divergence(p, q)
            own += _log_likelihood(q, window)
            expected += _log_likelihood(p, window)
    count, tokens = ids.shape
    predicted = count * (tokens - 1)
    mean = divergence / (count * tokens)
    return Evaluation(count * tokens, mean, math.exp(-own / predicted), math.exp(-expected / predicted))


def reference_logprobs(model: Any, ids: Tensor) -> Tensor:
    """The log-probabilities (nats) that a model gives to every next token.

    Args:
        model: a causal language model of transformers.
        ids: int64 [windows, tokens].

    Returns:
        float32 [windows, tokens, vocabulary] on the CPU (3 x 1024 tokens of 49152 words: 604 MB).
    """
    with _evaluating(model):
        return torch.stack([_log_probabilities(model, window).cpu() for window in ids])


def kl_and_perplexity(model: Any, ids: Tensor, reference: Tensor) -> tuple[float, float]:
    """Compares a model with a reference on the same text.

    The divergence is sum_v p(v) (log p(v) - log q(v)), p the reference's distribution and q the model's (Kullback and
    Leibler, 1951), averaged over all windows * tokens positions. Perplexity is exp of the mean negative log-likelihood
    of the windows * (tokens - 1) tokens that have a predecessor. Logits are taken in the model's dtype,
    log-probabilities in float32, sums in float64.

    Args:
        model: a causal language model of transformers.
        ids: int64 [windows, tokens].
        reference: what `reference_logprobs` gave for the same `ids`.

    Returns:
        The mean KL(reference || model) in nats, and the model's perplexity.
    """
    divergence = likelihood = 0.0
    with _evaluating(model):
        for window, expected in zip(ids, reference, strict=True):
            found = _log_probabilities(model, window)
            divergence += _divergence(expected, found)
            likelihood += _log_likelihood(found, window)
    count, tokens = ids.shape
    return divergence / (count * tokens), math.exp(-likelihood / (count * (tokens - 1)))


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Without gradients and without dropout; the training mode is put back afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _log_probabilities(model: Any, window: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=window.unsqueeze(0).to(model.device), use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


def _log_likelihood(found: Tensor, window: Tensor) -> float:
    """Sum of the log-probabilities of the tokens that have a predecessor."""
    following = window[1:].to(found.device).unsqueeze(1)
    return found[:-1].gather(1, following).double().sum().item()


def _divergence(expected: Tensor, found: Tensor) -> float:
    """Sum over positions of KL(expected || found), both float32 log-probabilities [tokens, vocabulary]."""
    total = 0.0
    for p, q in zip(torch.split(expected, POSITIONS), torch.split(found, POSITIONS), strict=True):
        here = p.to(q.device)
        total += (here.exp() * (here - q)).sum(dtype=torch.float64).item()
    return total
