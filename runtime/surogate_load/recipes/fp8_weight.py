"""A base weight as E4M3 operand of both directions under recipe fp8-hybrid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from surogate_formats.fp8 import FP8
from surogate_formats.tables import E4M3_MAX
from surogate_load.ops.quantize_fp8 import LARGEST_SCALE, SMALLEST_SCALE, largest_magnitude
from surogate_load.ops.rounding import constant, power_of_two_floor
from surogate_load.placement import FixedDtypeModule
from surogate_load.recipes.layer import PackedWeight
from surogate_load.weight import WeightKind

E4M3 = torch.float8_e4m3fn


class Factors(NamedTuple):
    """What surrounds the E4M3 matrix Q of a weight, W = diag(rows) Q * whole: float32, None for 1.

    Attributes:
        multiplier: [1], applied while W is dequantized to E4M3.
        whole: [1].
        rows: [N]. They scale the output's columns, and in the backward dy before it is quantized: there they lie on the
            contraction axis.
    """

    multiplier: Tensor | None = None
    whole: Tensor | None = None
    rows: Tensor | None = None


class E4m3Weight(NamedTuple):
    """A weight as an operand: `kind.dequantize(parts, dtype, multiplier)` gives Q [N, K]."""

    kind: WeightKind
    dtype: torch.dtype
    parts: tuple[Tensor, ...]
    factors: Factors


Parts = tuple[Tensor, ...]


class E4m3Source(FixedDtypeModule):
    """How a format becomes an E4M3 operand, and the power of two that takes; derived from the artifact, so not saved.

    Attributes:
        own: float32 [1], the power of two of this weight; 1 for FP8.
        multiplier: float32 [1], that or a smaller one where several weights are multiplied as one.
        inverse: float32 [1], its reciprocal.
        one: float32 [1], the scale of codes that are taken as they stand.
        measured: whether the power of two is the weight's.
        by_row: whether a scale of the whole weight is applied to each row, as it must be where the weight is one of
            several with scales of their own.
    """

    own: Tensor
    multiplier: Tensor
    inverse: Tensor
    one: Tensor

    def __init__(self, weight: PackedWeight) -> None:
        """Finds the power of two with which a weight that isn't FP8 becomes E4M3, if it has values yet."""
        super().__init__()
        multiplier = torch.ones(1)
        self.measured = isinstance(weight.kind.format, FP8)
        if not self.measured and not weight.parts[0].is_meta:
            multiplier, self.measured = _multiplier(weight), True
        self.register_buffer("own", multiplier, persistent=False)
        self.register_buffer("multiplier", multiplier.clone(), persistent=False)
        self.register_buffer("inverse", 1 / multiplier, persistent=False)
        self.register_buffer("one", torch.ones(1), persistent=False)
        self.by_row = False

    def measure(self, weight: PackedWeight) -> None:
        """Finds the power of two of a weight that had no values before, or others."""
        if isinstance(weight.kind.format, FP8):
            return
        self.own.copy_(_multiplier(weight))
        self.multiplier.copy_(self.own)
        self.inverse.copy_(1 / self.own)
        self.measured = True

    def operand(self, kind: WeightKind, parts: Parts) -> E4m3Weight:
        """The operand of a weight that these parts stand for, alone or with others below it."""
        fmt = kind.format
        return _OPERANDS[fmt.name, fmt.scaling if isinstance(fmt, FP8) else ""](self, kind, parts)

    @staticmethod
    def unite(sources: Sequence[E4m3Source], kind: WeightKind) -> None:
        """Gives weights that are multiplied as one, of this kind, the same power of two, which keeps all below 448."""
        least = torch.stack([source.own for source in sources]).amin(0)
        by_row = isinstance(kind.format, FP8) and kind.format.scaling == "channel"
        first = sources[0]
        if any(source.multiplier is not first.multiplier for source in sources):
            first.multiplier, first.inverse = torch.empty_like(least), torch.empty_like(least)
        first.multiplier.copy_(least)  # where it stands: a captured graph knows addresses
        first.inverse.copy_(1 / least)
        for source in sources:
            source.multiplier, source.inverse, source.by_row = first.multiplier, first.inverse, by_row


def _multiplier(weight: PackedWeight) -> Tensor:
    return power_of_two_scale(largest_magnitude(weight.kind.dequantize(weight.parts, torch.float32)))


def power_of_two_scale(amax: Tensor) -> Tensor:
    """The largest power of two p, float32 [1], with p * amax <= 448 (within [2^-126, 2^126]); 1 where amax is 0.

    Any other scale would round the few significant bits of NF4 and NVFP4 values once more.
    """
    reach = constant(float(E4M3_MAX), amax.device)
    power = power_of_two_floor((reach / amax).clamp(SMALLEST_SCALE, LARGEST_SCALE))
    power = torch.where(power * amax > reach, power / 2, power)
    return torch.where(amax > 0, power, torch.ones_like(power))


Operand = Callable[[E4m3Source, WeightKind, Parts], E4m3Weight]


def _codes_by_tensor(source: E4m3Source, kind: WeightKind, parts: Parts) -> E4m3Weight:
    codes, scale = parts
    unit = WeightKind(FP8("tensor"), kind.shape)
    scale = scale.float()
    factors = Factors(rows=scale.reshape(1).repeat(kind.shape[0])) if source.by_row else Factors(whole=scale)
    return E4m3Weight(unit, torch.float32, (codes, source.one), factors)


def _codes_by_channel(source: E4m3Source, kind: WeightKind, parts: Parts) -> E4m3Weight:
    codes, scale = parts
    unit = WeightKind(FP8("tensor"), kind.shape)
    return E4m3Weight(unit, torch.float32, (codes, source.one), Factors(rows=scale.float().reshape(-1)))


def _codes_by_tile(source: E4m3Source, kind: WeightKind, parts: Parts) -> E4m3Weight:
    """The scaled product of 1x128 and 128x128 blocks; the delayed scale of x or dy fills every 1x128 scale."""
    return E4m3Weight(kind, torch.float32, parts, Factors())


def _rounded_to_e4m3(source: E4m3Source, kind: WeightKind, parts: Parts) -> E4m3Weight:
    return E4m3Weight(kind, E4M3, parts, Factors(source.multiplier, source.inverse))


_OPERANDS: dict[tuple[str, str], Operand] = {
    ("fp8", "tensor"): _codes_by_tensor,
    ("fp8", "channel"): _codes_by_channel,
    ("fp8", "block"): _codes_by_tile,
    ("nf4", ""): _rounded_to_e4m3,
    ("fp4", ""): _rounded_to_e4m3,
}
"""Format and scaling to the operand that its weights become."""
