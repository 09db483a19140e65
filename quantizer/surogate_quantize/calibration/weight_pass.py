"""The calibrated pass over one weight: rounded, solved for its inputs, and given an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from surogate_formats.format import Parts
from surogate_quantize.bands import Band
from surogate_quantize.calibration.adapter import Factors, factors
from surogate_quantize.calibration.grids import make_grid
from surogate_quantize.calibration.inputs import Inputs
from surogate_quantize.calibration.solver import solve
from surogate_quantize.engine import Engine
from surogate_quantize.options import Options
from surogate_quantize.plan import PlannedTensor
from surogate_quantize.weight_reader import WeightReader

ROUNDS = 2
"""Of codes and adapter in turn, where they are found together."""


@dataclass(frozen=True)
class SolvedBlock:
    """What was found for a block.

    Attributes:
        parts: of each weight, by module.
        errors: of each weight, by module: the relative error of its output on held-out text, with codes that are
            nearest, and with those that were found and the adapter.
        updates: of each weight, by module, where an adapter is asked for.
        starved: tokens that the original gives to an expert, by the expert's name, where those are too few; the name
            ends in `.up_proj` or `.gate_proj/up_proj` where they are too few for these projections alone.
    """

    parts: dict[str, Parts] = field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    updates: dict[str, Factors] = field(default_factory=dict)
    starved: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Rounded:
    """A weight, float32 [N, K], its parts under rounding, and what these stand for."""

    weight: Tensor
    parts: Parts
    values: Tensor


class WeightPass:
    """Finds the parts of weights, and their adapters.

    Args:
        options: how codes are chosen, and the rank of the adapter.
        tensors: the weights to be quantized, by their modules' full names.
        weights: reads them.
        engine: rounds them.
        device: of tensors.
    """

    def __init__(
        self,
        options: Options,
        tensors: Mapping[str, PlannedTensor],
        weights: WeightReader,
        engine: Engine,
        device: torch.device,
    ) -> None:
        """Reads nothing yet."""
        self._options, self._tensors, self._device = options, tensors, device
        self._weights, self._engine = weights, engine

    def rounded(self, name: str) -> Rounded:
        """A weight with its nearest codes, or those of the search."""
        tensor = self._tensors[name]
        loaded = self._weights.load(Band(tensor, 0, tensor.info.shape[0]))
        known = (loaded.amax, self._weights.group_amax(tensor))
        fmt, search = self._options.format, self._options.codes == "search"
        parts, _ = self._engine.quantize(fmt, loaded.source, *known, search=search)
        weight = torch.from_numpy(loaded.source.float32).to(self._device)
        self._weights.release(loaded)
        return Rounded(weight, parts, torch.from_numpy(fmt.dequantize(parts, tensor.info.shape)).to(weight))

    def calibrate(self, name: str, one: Rounded, inputs: Inputs, found: SolvedBlock) -> Tensor:
        """Codes for these inputs; the weight that they stand for, float32 [N, K]."""
        grid = make_grid(self._options.format, one.parts, one.weight)
        solved = solve(inputs.target(one.weight) if grid.asymmetric else one.weight, grid, inputs.known)
        found.parts[name] = grid.parts(solved.values, solved.scales)
        values = solved.dequantized(grid)
        found.errors[name] = (inputs.error(one.weight, one.values), inputs.error(one.weight, values))
        return values

    def adapt(self, name: str, one: Rounded, values: Tensor, inputs: Inputs, found: SolvedBlock) -> Tensor:
        """An adapter of codes that stand for `values`; the weight with it, float32 [N, K]."""
        a, b = found.updates[name] = self._factors(inputs.target(one.weight) - values, inputs)
        found.parts.setdefault(name, one.parts)
        before = found.errors[name][0] if name in found.errors else inputs.error(one.weight, one.values)
        found.errors[name] = (before, inputs.error(one.weight, values + b @ a))
        return values + b @ a

    def calibrate_and_adapt(self, name: str, one: Rounded, inputs: Inputs, found: SolvedBlock) -> Tensor:
        """Codes of what the adapter leaves, and the adapter of what they leave, in turn (as LoftQ, arXiv:2310.08659).

        Returns the weight with both, float32 [N, K].
        """
        grid = make_grid(self._options.format, one.parts, one.weight)
        target = inputs.target(one.weight)
        left = target if grid.asymmetric else one.weight
        update = torch.zeros_like(target)
        for _ in range(ROUNDS):
            solved = solve(left - update, grid, inputs.known)
            values = solved.dequantized(grid)
            a, b = found.updates[name] = self._factors(target - values, inputs)
            update = b @ a
        found.parts[name] = grid.parts(solved.values, solved.scales)
        found.errors[name] = (inputs.error(one.weight, one.values), inputs.error(one.weight, values + update))
        return values + update

    def _factors(self, missing: Tensor, inputs: Inputs) -> Factors:
        rank = self._options.adapter_init
        assert rank is not None
        return factors(missing, inputs.hessian, rank)
