"""A base weight as FP4 operand of both directions under recipe nvfp4, quantized anew where its codes can't be used."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from surogate_formats.nvfp4 import BLOCK, NVFP4
from surogate_formats.recipe import Recipe
from surogate_load.errors import NeedsTwoDimensionalScalesError
from surogate_load.placement import FixedDtypeModule
from surogate_load.recipes.fp4_matmul import swizzle
from surogate_load.recipes.layer import PackedWeight
from surogate_load.recipes.notes import Notes
from surogate_load.weight import WeightKind

Parts = tuple[Tensor, ...]


@dataclass(frozen=True)
class Fp4Operand:
    """What is multiplied in one direction.

    Attributes:
        kind: of W, or of its transpose.
        fp4: both factors are NVFP4; else the product is one of the compute dtype with the dequantized weight.
        transposed: the parts are those of W^T [K, N].
    """

    kind: WeightKind
    fp4: bool = True
    transposed: bool = False


class Fp4Weights(FixedDtypeModule):
    """The two operands, and the parts of those that the artifact doesn't hold; derived from it, so not saved.

    Attributes:
        swizzled: the forward's block scales in the order of tensor cores; None where those don't multiply.
    """

    swizzled: Tensor | None

    def __init__(self, forward: Fp4Operand, backward: Fp4Operand) -> None:
        """Operands whose parts are the artifact's, until `own` adds others."""
        super().__init__()
        self._operands = (forward, backward)
        self._own: dict[str, int] = {}
        self.register_buffer("swizzled", None, persistent=False)

    @property
    def fp4(self) -> bool:
        """Whether the forward multiplies FP4 operands."""
        return self._operands[0].fp4

    def own(self, direction: str, parts: Parts) -> None:
        """Keeps parts for the `forward` or the `backward` operand."""
        for index, part in enumerate(parts):
            self.register_buffer(f"{direction}_{index}", part, persistent=False)
        self._own[direction] = len(parts)

    def swizzle(self, stored: Parts) -> None:
        """Lays the scales out for tensor cores: half a bit a weight more, but W^T's own replace the plain ones."""
        self.swizzled = swizzle((self._parts("forward") or stored)[1])
        if "backward" in self._own:
            self.own("backward", tuple(swizzle(p) if i == 1 else p for i, p in enumerate(self._parts("backward"))))

    def operands(self, stored: Parts) -> tuple[Fp4Operand, Fp4Operand, Parts]:
        """(forward, backward, parts): the forward's parts, then the backward's where they are others."""
        forward = self._parts("forward") or stored
        return *self._operands, (*forward, *self._parts("backward"))

    def _parts(self, direction: str) -> Parts:
        return tuple(self.get_buffer(f"{direction}_{index}") for index in range(self._own.get(direction, 0)))


def make_weights(weight: PackedWeight, recipe: Recipe, notes: Notes) -> Fp4Weights:
    """Decides what is multiplied in each direction, and says in `notes` where that isn't the artifact's codes.

    Raises:
        NeedsTwoDimensionalScalesError: `backend=cudnn`, and the weight has, or would get, 1x16 scales.
    """
    rows, columns = weight.kind.shape
    stored = isinstance(weight.kind.format, NVFP4)
    two_d = has_tile_scales(weight.parts[1]) if stored else not recipe.disable_2d_quantization
    if recipe.backend == "cudnn" and not two_d:
        raise NeedsTwoDimensionalScalesError(
            f"backend cudnn needs 16x16 scales, {weight.name} has 1x16: "
            "quantize with --2d, don't disable_2d_quantization, or use backend cutlass"
        )
    if columns % BLOCK:
        notes.add("K is not a multiple of 16: the base is multiplied in bf16", weight.name)
        plain = Fp4Operand(weight.kind, fp4=False)
        return Fp4Weights(plain, plain)
    forward = Fp4Operand(weight.kind if stored else WeightKind(NVFP4(two_d), weight.kind.shape))
    backward = _backward(forward, two_d, rows)
    weights = Fp4Weights(forward, backward)
    if not stored:
        dense = weight.kind.dequantize(weight.parts, torch.float32)
        remark = f"W is quantized to NVFP4 ({'16x16' if two_d else '1x16'} scales)"
        weights.own("forward", _quantize(dense, two_d, recipe, remark, weight, notes))
    if backward.transposed:
        dense = weight.kind.dequantize(weight.parts, torch.float32).t().contiguous()
        remark = "1x16 scales don't transpose: W^T of the base's dgrad is quantized anew"
        weights.own("backward", _quantize(dense, False, recipe, remark, weight, notes))
    if not backward.fp4:
        notes.add("N is not a multiple of 16: the base's dgrad is multiplied in bf16", weight.name)
    return weights


def has_tile_scales(scale: Tensor) -> bool:
    """Whether all rows of each group of 16 have the same scales, E4M3 [N, K/16]: then W^T has the same codes."""
    codes = scale.view(torch.uint8)
    first = codes[::BLOCK].repeat_interleave(BLOCK, dim=0)[: codes.shape[0]]
    return torch.equal(codes, first)


def _backward(forward: Fp4Operand, two_d: bool, rows: int) -> Fp4Operand:
    if rows % BLOCK:
        return Fp4Operand(forward.kind, fp4=False)
    if two_d:
        return forward
    return Fp4Operand(WeightKind(NVFP4(two_d=False), forward.kind.shape[::-1]), transposed=True)


def _quantize(dense: Tensor, two_d: bool, recipe: Recipe, remark: str, weight: PackedWeight, notes: Notes) -> Parts:
    four_over_six = recipe.four_over_six and recipe.backend == "cutlass"
    parts: Parts = torch.ops.surogate.quantize_nvfp4(dense, two_d, four_over_six, recipe.four_over_six_metric, True)
    change = torch.ops.surogate.dequantize_nvfp4(*parts, torch.float32, None) - dense
    notes.add(
        remark,
        weight.name,
        nbytes=sum(part.nbytes for part in parts),
        error=float(change.double().square().sum()),
        norm=float(dense.double().square().sum()),
    )
    return parts
