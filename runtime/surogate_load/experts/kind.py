"""What stacked packed parts mean: the weights of all experts of one projection, each a packed weight of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from torch import Tensor

from surogate_formats.format import Format, TensorSpec, to_dict
from surogate_formats.registry import make_format
from surogate_load.weight import WeightKind


@dataclass(frozen=True)
class ExpertsKind:
    """Everything about one projection of all experts but its bytes: a static argument of autograd functions.

    An expert's weight [M * N, K] is M packed weights [N, K] below each other: gate and up, or down alone.

    Attributes:
        format: the format with its parameters.
        shape: (N, K) of one packed weight.
        experts: E, how many experts there are.
        members: M.
    """

    format: Format
    shape: tuple[int, int]
    experts: int
    members: int

    @cached_property
    def weight(self) -> WeightKind:
        """What one packed weight is."""
        return WeightKind(self.format, self.shape)

    @property
    def rows(self) -> int:
        """M * N: rows of an expert's weight."""
        return self.members * self.shape[0]

    @cached_property
    def key(self) -> str:
        """The kind as a string, which an op can take; `of_key` reads it."""
        return json.dumps([to_dict(self.format), self.shape, self.experts, self.members], sort_keys=True)

    @staticmethod
    @cache
    def of_key(key: str) -> ExpertsKind:
        """The kind of which this is the `key`."""
        parameters, shape, experts, members = json.loads(key)
        return ExpertsKind(make_format(parameters.pop("name"), parameters), tuple(shape), experts, members)

    def stacked(self, spec: TensorSpec) -> tuple[int, ...]:
        """The shape of a parameter that holds one stored tensor of each packed weight, the members along its rows."""
        if not spec.shape:
            return (self.experts, self.members)
        return (self.experts, self.members * spec.shape[0], *spec.shape[1:])

    def parts_of(self, parts: Sequence[Tensor], expert: int, member: int) -> tuple[Tensor, ...]:
        """The parts of one packed weight, as views; `parts` are stacked, in the order of `weight.specs`."""
        index = expert * self.members + member
        return tuple(
            part.reshape(self.experts * self.members, *spec.shape)[index]
            for part, spec in zip(parts, self.weight.specs.values(), strict=True)
        )
