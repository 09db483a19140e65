"""The small matrix products of an adapter, scaled where they are made and added where they belong.

Written in torch's own operators, inductor makes a kernel of its own of every scaling, and of an addition one that
copies first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from surogate_load.ops.library import define


def _scaled_product(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    out = left.new_empty((left.shape[0], right.shape[1]))
    return torch.addmm(out, left, right, beta=0, alpha=scaling, out=out)


def _scaled_product_fake(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    return left.new_empty((left.shape[0], right.shape[1]))


def _add_product(out: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    out.addmm_(left, right, alpha=scaling)


def _add_product_fake(out: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    return None


# scaling * left [M, r] @ right [r, N], all of one dtype.
define("scaled_product(Tensor left, Tensor right, float scaling) -> Tensor", _scaled_product, _scaled_product_fake)

# out [M, N] += scaling * left [M, r] @ right [r, N].
define("add_product_(Tensor(a!) out, Tensor left, Tensor right, float scaling) -> ()", _add_product, _add_product_fake)
