"""The transpose of a matrix of one-byte values: FP8 products want both factors with their common side last."""

from __future__ import annotations

import torch
from torch import Tensor

from surogate_load.ops.library import define


def _transpose(x: Tensor) -> Tensor:
    return x.view(torch.uint8).t().contiguous().view(x.dtype)


def _fake(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[1], x.shape[0]))


# x: [rows, columns] of a one-byte dtype. The second one takes the gradient, so that a compiler can't move it into the
# forward and keep its result.
define("transpose_bytes(Tensor x) -> Tensor", _transpose, _fake)
define(
    "transpose_bytes_for_backward(Tensor gradient, Tensor x) -> Tensor",
    lambda gradient, x: _transpose(x),
    lambda gradient, x: _fake(x),
)
