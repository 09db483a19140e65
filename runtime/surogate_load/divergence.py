"""How far a model's predictions are from a reference model's: mean KL divergence, perplexity, top-1 agreement."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
        top1_agreement: share of the tokens after which both find the same token likeliest.
    """

    tokens: int
    mean_kl: float
    perplexity: float
    reference_perplexity: float
    top1_agreement: float


class OtherVocabularyError(UsageError):
    """Two models that know different numbers of tokens."""


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


@dataclass
class Sums:
    """Adds up a comparison, some positions at a time; in float64."""

    _tokens: int = field(default=0, init=False)
    _predicted: int = field(default=0, init=False)
    _agreed: int = field(default=0, init=False)
    _divergence: float = field(default=0.0, init=False)
    _likelihood: float = field(default=0.0, init=False)
    _expected: float = field(default=0.0, init=False)

    def add(self, expected: Tensor, found: Tensor, following: Tensor) -> None:
        """Adds positions.

        Args:
            expected: float32 [tokens, vocabulary], the reference's log-probabilities.
            found: the model's.
            following: int64 [tokens], the token after each; [tokens - 1] where the window ends with the last.

        Raises:
            OtherVocabularyError: see the class.
        """
        if expected.shape != found.shape:
            raise OtherVocabularyError(
                f"the dense model knows {expected.shape[1]} tokens, the artifact {found.shape[1]}: it wasn't made of it"
            )
        self._tokens += len(expected)
        self._predicted += len(following)
        self._agreed += int((expected.argmax(-1) == found.argmax(-1)).sum())
        self._divergence += _divergence(expected, found)
        self._likelihood += _log_likelihood(found, following)
        self._expected += _log_likelihood(expected, following)

    @property
    def evaluation(self) -> Evaluation:
        """Of all that was added."""
        return Evaluation(
            self._tokens,
            self._divergence / self._tokens,
            math.exp(-self._likelihood / self._predicted),
            math.exp(-self._expected / self._predicted),
            self._agreed / self._tokens,
        )


def evaluate(model: Any, reference: Any, ids: Tensor) -> Evaluation:
    """Compares a model with a reference, window by window, so that memory doesn't grow with the text.

    Args:
        model: a causal language model of transformers.
        reference: another one with the same vocabulary.
        ids: int64 [windows, tokens]; a window never sees another.

    Raises:
        OtherVocabularyError: the vocabularies differ.
    """
    sums = Sums()
    with _evaluating(model), _evaluating(reference):
        for window in ids:
            sums.add(_log_probabilities(reference, window), _log_probabilities(model, window), window[1:])
    return sums.evaluation


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
            likelihood += _log_likelihood(found, window[1:])
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


def _log_likelihood(found: Tensor, following: Tensor) -> float:
    """Sum of the log-probabilities of the tokens that follow the first positions."""
    chosen = following.to(found.device).unsqueeze(1)
    return found[: len(following)].gather(1, chosen).double().sum().item()


def _divergence(expected: Tensor, found: Tensor) -> float:
    """Sum over positions of KL(expected || found), both float32 log-probabilities [tokens, vocabulary]."""
    total = 0.0
    for p, q in zip(torch.split(expected, POSITIONS), torch.split(found, POSITIONS), strict=True):
        here = p.to(q.device)
        total += (here.exp() * (here - q)).sum(dtype=torch.float64).item()
    return total
