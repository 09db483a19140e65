"""The ops of packed experts: their weights dequantized in one call, and products whose rows belong to experts.

Rows of activations are sorted by expert; `ends`, int32 [E], says where each expert's rows end. What belongs to an
expert without rows is never read: dequantization leaves it uninitialised. Forward and backward dequantize through
different ops, as in `ops.dequantize`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from surogate_load.experts.kind import ExpertsKind
from surogate_load.ops.library import define

ALIGNMENT = 16
"""Bytes that torch's grouped product needs rows to be multiples of."""

_GROUPED = ((9, 0), (10, 0), (10, 3))
"""Compute capabilities on which torch multiplies groups in one launch; elsewhere it loops, as we do."""


def spans(ends: Tensor) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, end) of each expert that has rows; waits for the device."""
    first = 0
    for expert, end in enumerate(ends.tolist()):
        if end > first:
            yield expert, first, end
        first = end


def _dequantize(parts: Sequence[Tensor], ends: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    described = ExpertsKind.of_key(kind)
    out = parts[0].new_empty((described.experts, described.rows, described.shape[1]), dtype=dtype)
    for expert, _, _ in spans(ends):
        for member, rows in enumerate(out[expert].view(described.members, *described.shape)):
            rows.copy_(described.weight.dequantize(described.parts_of(parts, expert, member), dtype))
    return out


def _dequantize_fake(parts: Sequence[Tensor], ends: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    described = ExpertsKind.of_key(kind)
    return parts[0].new_empty((described.experts, described.rows, described.shape[1]), dtype=dtype)


def in_one_launch(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch multiplies groups of rows in one launch; elsewhere a loop waits for the device to know them."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(device) in _GROUPED


def _in_one_launch(*tensors: Tensor) -> bool:
    """The same for these: their rows must be aligned, too."""
    alike = all(in_one_launch(tensor.device, tensor.dtype) for tensor in tensors)
    return alike and all(max(tensor.stride()[-2:]) * tensor.itemsize % ALIGNMENT == 0 for tensor in tensors)


def _product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if x.shape[0] and _in_one_launch(x, weight):
        return torch.nn.functional.grouped_mm(x, weight, offs=ends)
    out = x.new_empty((x.shape[0], weight.shape[2]))
    for expert, first, end in spans(ends):
        torch.mm(x[first:end], weight[expert], out=out[first:end])
    return out


def _product_fake(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[2]))


def _outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    if left.shape[0] and _in_one_launch(left, right):
        found = torch.nn.functional.grouped_mm(left.t(), right, offs=ends)
        used = torch.diff(ends, prepend=ends.new_zeros(1)) > 0
        return torch.where(used[:, None, None], found, 0)
    out = left.new_zeros((ends.shape[0], left.shape[1], right.shape[1]))
    for expert, first, end in spans(ends):
        torch.mm(left[first:end].t(), right[first:end], out=out[expert])
    return out


def _outer_fake(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty((ends.shape[0], left.shape[1], right.shape[1]))


# Stacked packed parts to the dense weights [E, M * N, K] of the experts that have rows.
define("dequantize_experts(Tensor[] parts, Tensor ends, str kind, ScalarType dtype) -> Tensor",
       _dequantize, _dequantize_fake)  # fmt: skip
define(
    "dequantize_experts_for_backward(Tensor gradient, Tensor[] parts, Tensor ends, str kind, ScalarType dtype)"
    " -> Tensor",
    lambda gradient, *rest: _dequantize(*rest),
    lambda gradient, *rest: _dequantize_fake(*rest),
)

# x [S, K] times each row's own weight, of [E, K, N]: [S, N].
define("grouped_product(Tensor x, Tensor weight, Tensor ends) -> Tensor", _product, _product_fake)

# left [S, M] transposed times right [S, N], of each expert's rows alone: [E, M, N], zero where there are none.
define("grouped_outer_product(Tensor left, Tensor right, Tensor ends) -> Tensor", _outer, _outer_fake)
