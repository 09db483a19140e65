"""The small matrix product of an adapter, added where it belongs: of torch's own operator inductor copies first."""

from __future__ import annotations

from torch import Tensor

from surogate_load.ops.library import define


def _add_product(out: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    out.addmm_(left, right, alpha=scaling)


def _add_product_fake(out: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    return None


# out [M, N] += scaling * left [M, r] @ right [r, N].
define("add_product_(Tensor(a!) out, Tensor left, Tensor right, float scaling) -> ()", _add_product, _add_product_fake)
