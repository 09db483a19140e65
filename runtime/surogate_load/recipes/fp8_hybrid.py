"""Recipe fp8-hybrid: E4M3 x E4M3 forward, E5M2 x E4M3 for the gradient of x, delayed scales for x and dy.

On tensor cores, or emulated: the same quantized operands multiplied in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from surogate_formats.fp8 import FP8
from surogate_formats.recipe import Recipe
from surogate_load.recipes.delayed import DelayedScale
from surogate_load.recipes.fp8_weight import E4M3, E4m3Source, Factors
from surogate_load.recipes.layer import PackedWeight, RecipeLayer
from surogate_load.recipes.notes import Notes
from surogate_load.recipes.product import Operands, Pair, add_pair
from surogate_load.weight import WeightKind

E5M2 = torch.float8_e5m2

_SIDE = 16
"""Tensor cores take sides of an FP8 matrix that are multiples of this."""


class _State(NamedTuple):
    """(scale, current) of x and of dy, what surrounds the weight's E4M3 matrix, and a 1."""

    input: tuple[Tensor, Tensor]
    gradient: tuple[Tensor, Tensor]
    factors: Factors
    one: Tensor


@dataclass(frozen=True)
class _Fp8Product:
    """Products with x in E4M3, dy in E5M2 and W in E4M3; each records the amax of what it quantizes.

    Attributes:
        kind: of the weight's E4M3 matrix.
        dtype: in which that is dequantized.
        margin: of the recipe.
        record: whether this is part of a training step.
    """

    kind: WeightKind
    dtype: torch.dtype
    margin: int
    record: bool

    def forward(
        self, x: Tensor, bias: Tensor | None, state: _State, parts: Sequence[Tensor], plus: Pair | None = None
    ) -> Tensor:
        copies = self._decodes(x, state.factors)
        codes, decode = torch.ops.surogate.quantize_fp8(x, None, *state.input, self.record, self.margin, E4M3, copies)
        return add_pair(self._forward_product(codes, decode, bias, state, parts, x.dtype), plus)

    def input_gradient(
        self, gradient: Tensor, state: _State, parts: Sequence[Tensor], plus: Pair | None = None
    ) -> Tensor:
        factors = state.factors
        codes, decode = torch.ops.surogate.quantize_fp8(
            gradient, factors.rows, *state.gradient, self.record, self.margin, E5M2
        )
        return add_pair(self._gradient_product(codes, decode, state, parts, gradient), plus)

    def _decodes(self, x: Tensor, factors: Factors) -> int:
        """How often the forward product takes the factor that decodes x."""
        return 1

    def _forward_product(
        self,
        codes: Tensor,
        decode: Tensor,
        bias: Tensor | None,
        state: _State,
        parts: Sequence[Tensor],
        dtype: torch.dtype,
    ) -> Tensor:
        factors = state.factors
        matrix = self.kind.dequantize(parts, self.dtype, factors.multiplier)
        y = codes.float() @ matrix.float().t() * _product(decode, factors.whole)
        if factors.rows is not None:
            y = y * factors.rows
        return (y if bias is None else y + bias.float()).to(dtype)

    def _gradient_product(
        self, codes: Tensor, decode: Tensor, state: _State, parts: Sequence[Tensor], gradient: Tensor
    ) -> Tensor:
        factors = state.factors
        matrix = self.kind.dequantize_for_backward(gradient, parts, self.dtype, factors.multiplier)
        return (codes.float() @ matrix.float() * _product(decode, factors.whole)).to(gradient.dtype)


class _TensorCoreProduct(_Fp8Product):
    """The same on tensor cores: sums in their precision, the result rounded once."""

    def _forward_product(
        self,
        codes: Tensor,
        decode: Tensor,
        bias: Tensor | None,
        state: _State,
        parts: Sequence[Tensor],
        dtype: torch.dtype,
    ) -> Tensor:
        rows, factors = codes.reshape(-1, codes.shape[-1]), state.factors
        matrix = parts[0] if self._takes_codes() else self.kind.dequantize(parts, E4M3, factors.multiplier)
        scales = (decode, state.one if factors.whole is None else factors.whole)
        if factors.rows is not None:
            scales = (decode[:, None], factors.rows[None])
        # Fewer bits in the sums, as NVIDIA's Transformer Engine has them in the forward; the gradient has them all.
        y = torch._scaled_mm(rows, matrix.t(), *scales, out_dtype=dtype, use_fast_accum=True)
        y = y if bias is None else y + bias
        return y.reshape(*codes.shape[:-1], matrix.shape[0])

    def _gradient_product(
        self, codes: Tensor, decode: Tensor, state: _State, parts: Sequence[Tensor], gradient: Tensor
    ) -> Tensor:
        matrix, factors = parts[0], state.factors
        if not self._takes_codes():
            matrix = self.kind.dequantize_for_backward(gradient, parts, E4M3, factors.multiplier)
        transposed = torch.ops.surogate.transpose_bytes_for_backward(gradient, matrix)
        rows = codes.reshape(-1, codes.shape[-1])
        whole = state.one if factors.whole is None else factors.whole
        dx = torch._scaled_mm(rows, transposed.t(), decode, whole, out_dtype=gradient.dtype, use_fast_accum=False)
        return dx.reshape(*codes.shape[:-1], matrix.shape[1])

    def _decodes(self, x: Tensor, factors: Factors) -> int:
        """Scales of the weight's rows go with one of each row of x."""
        return 1 if factors.rows is None else x.numel() // x.shape[-1]

    def _takes_codes(self) -> bool:
        """FP8 codes are the operand; other formats become one as they are dequantized."""
        return self.dtype != E4M3


def _product(decode: Tensor, whole: Tensor | None) -> Tensor:
    return decode if whole is None else decode * whole


def tensor_core_obstacle(kind: WeightKind) -> str | None:
    """What keeps tensor cores from multiplying with a weight."""
    if isinstance(kind.format, FP8) and kind.format.scaling == "block":
        return "128x128 scales have no product on tensor cores here"
    return "N or K is not a multiple of 16" if any(side % _SIDE for side in kind.shape) else None


class Fp8Hybrid(RecipeLayer):
    """The scaling state of x and dy, and the weight as an E4M3 operand.

    Attributes:
        input: of x, E4M3.
        gradient: of dy, E5M2.
        weight: how the format becomes an operand.
    """

    def __init__(self, weight: PackedWeight, recipe: Recipe, product: type[_Fp8Product]) -> None:
        """Fresh state."""
        super().__init__()
        self.input = DelayedScale(E4M3, recipe)
        self.gradient = DelayedScale(E5M2, recipe)
        self.weight = E4m3Source(weight)
        self._margin = recipe.margin
        self._product = product

    @classmethod
    def build(cls, weight: PackedWeight, recipe: Recipe, notes: Notes, emulate: bool) -> Fp8Hybrid:
        """On tensor cores, unless emulated; what those can't multiply is emulated, and `notes` says so."""
        reason = None if emulate else tensor_core_obstacle(weight.kind)
        if reason is not None:
            notes.add(f"{reason}: the base is multiplied in float32, slowly", weight.name)
        return cls(weight, recipe, _Fp8Product if emulate or reason is not None else _TensorCoreProduct)

    @classmethod
    def unite(cls, layers: Sequence[RecipeLayer], kind: WeightKind) -> bool:
        """See `RecipeLayer.unite`. They quantize the same x; their dy, beside each other, get one scale."""
        members = [layer for layer in layers if isinstance(layer, Fp8Hybrid)]
        first = members[0]
        if len(members) < len(layers) or len({layer._product for layer in members}) > 1:
            return False
        for layer in members[1:]:
            layer.input, layer.gradient = first.input, first.gradient
        E4m3Source.unite([layer.weight for layer in members], kind)
        return True

    @property
    def waits(self) -> bool:  # type: ignore[override]
        """See `RecipeLayer`."""
        return not self.weight.measured

    def settle(self, weight: PackedWeight) -> None:
        """See `RecipeLayer.settle`."""
        self.weight.measure(weight)

    def operands(self, kind: WeightKind, parts: tuple[Tensor, ...]) -> Operands:
        """See `RecipeLayer.operands`. Records amax only where a training step is under way."""
        record = self.training and torch.is_grad_enabled()
        if record:
            self.input.check_watched()
        weight = self.weight.operand(kind, parts)
        product = self._product(weight.kind, weight.dtype, self._margin, record)
        state = _State(self.input.state(), self.gradient.state(), weight.factors, self.weight.one)
        return Operands(product, state, weight.parts)
