"""A matrix product added to a matrix where it stands."""

from __future__ import annotations

from torch import Tensor

from surogate_load.ops.library import define


def _add_product(out: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    out.addmm_(left, right, alpha=scaling)


def _fake(out: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    return None


# out [M, N] += scaling * left [M, r] @ right [r, N], all of one dtype. It mutates: of `addmm`, inductor would make a
# product that first copies `out`.
define("add_product_(Tensor(a!) out, Tensor left, Tensor right, float scaling) -> ()", _add_product, _fake)
