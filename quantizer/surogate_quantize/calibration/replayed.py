"""Thousands of small operations as one CUDA graph: on a GPU their launches take ten times as long as they do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]


class Replayed:
    """A function of tensors: on CUDA a graph from the second call with the same shapes on, elsewhere as it is.

    Args:
        function: takes and returns tensors, depends on nothing else that changes, and changes none of what it takes.
    """

    def __init__(self, function: Function) -> None:
        """Captures nothing yet."""
        self._function = function
        self._known: dict[tuple[torch.Size, ...], _Captured | None] = {}

    def __call__(self, *given: Tensor) -> tuple[Tensor, ...]:
        """What the function returns, to the bit; on CUDA it holds until the next call."""
        if not given[0].is_cuda:
            return self._function(*given)
        shapes = tuple(tensor.shape for tensor in given)
        if shapes not in self._known:
            self._known[shapes] = None  # libraries that are first used in a capture would be initialised in it
            return self._function(*given)
        captured = self._known[shapes] or _Captured(self._function, given)
        self._known[shapes] = captured
        return captured.replay(given)


class _Captured:
    def __init__(self, function: Function, given: tuple[Tensor, ...]) -> None:
        self._given = tuple(tensor.contiguous().clone() for tensor in given)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._found = function(*self._given)

    def replay(self, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for mine, tensor in zip(self._given, given, strict=True):
            mine.copy_(tensor)
        self._graph.replay()
        return self._found
