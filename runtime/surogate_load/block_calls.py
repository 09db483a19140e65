"""What a model calls its blocks with, and modules that stand in their places; why it can't be run block by block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from surogate_formats.errors import SurogateError


class NoBlocksError(SurogateError):
    """The model's blocks can't be found, filled or run one by one."""


class NotFiniteError(SurogateError):
    """The model's own activations hold a NaN or an infinity."""


class Recorder(nn.Module):
    """Stands in a block's place and notes what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.called = False

    def forward(self, hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        """Gives back what it was given."""
        if arguments:
            raise TypeError("its blocks take arguments without names")
        self.called, self.hidden, self.keywords = True, hidden_states, keywords
        return hidden_states


class Answer(nn.Module):
    """Stands in a block's place and gives hidden states that are known."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self._hidden = hidden

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Gives what is known, whatever it was given."""
        return self._hidden


def equal(calls: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
    """Whether all tensors in two lists of keywords are equal; each is compared once."""
    one, other = ({id(tensor): tensor for tensor in _tensors_in(found)} for found in (calls, others))
    return len(one) == len(other) and all(map(torch.equal, one.values(), other.values()))


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(item)
