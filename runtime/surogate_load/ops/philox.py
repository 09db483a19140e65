"""Philox 4x32-10, the generator of stochastic rounding (Salmon et al., SC 2011, doi:10.1145/2063384.2063405).

It is counter based: a value depends on seed, offset and the element's index only, so every device and every order of
evaluation gives the same noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

_WORD = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low word of the 64-bit product of two 32-bit words; int64 arithmetic wraps, its bits are right."""
    product = a * b
    return (product >> 32) & _WORD, product & _WORD


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Four random 32-bit words for each counter.

    Args:
        counter: four int64 tensors that hold 32-bit words, broadcastable.
        key: two int64 tensors that hold 32-bit words.

    Returns:
        Four int64 tensors that hold 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & _WORD, (k1 + KEY_INCREMENTS[1]) & _WORD
    return c0, c1, c2, c3


def uniform(count: int, seed: Tensor, offset: Tensor) -> Tensor:
    """`count` uniform numbers in [0, 1), multiples of 2^-24: element i is word i % 4 of counter i // 4.

    Args:
        count: how many.
        seed: int64 [1]; its two words are the key.
        offset: int64 [1]; its two words are the counter's upper half.

    Returns:
        float32 [count].
    """
    index = torch.arange(-(-count // 4), dtype=torch.int64, device=seed.device)
    counter = (index & _WORD, index >> 32, offset & _WORD, (offset >> 32) & _WORD)
    words = philox(counter, (seed & _WORD, (seed >> 32) & _WORD))
    bits = torch.stack(words, dim=-1).reshape(-1)[:count]
    return (bits >> 8).float() * 2.0**-24
