"""What a stage is given: sums over all batches but the last, and nothing that isn't finite."""

import pytest
import torch

from surogate_quantize.calibration.inputs import NotFiniteError, summed
from surogate_quantize.calibration.solver import DAMPING

X = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(0))
ORIGINAL = X + 0.1 * torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(1))


def test_the_last_batch_is_held_out():
    found = summed("q_proj", list(zip(X, ORIGINAL, strict=True)), 3)
    rows = X[:2].flatten(0, 1).double()
    expected = rows.T @ rows / 40
    expected += DAMPING * expected.diagonal().mean() * torch.eye(8)
    torch.testing.assert_close(found.hessian, expected, rtol=1e-5, atol=1e-7)
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    wanted = ORIGINAL[2] @ weight.T
    assert found.error(weight, weight) == pytest.approx(float((X[2] @ weight.T - wanted).norm() / wanted.norm()))


@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("stream", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(batch, stream, value):
    pairs = [[x.clone(), original.clone()] for x, original in zip(X, ORIGINAL, strict=True)]
    pairs[batch][stream][3, 4] = value
    with pytest.raises(NotFiniteError, match="q_proj: its inputs on the calibration text are not finite"):
        summed("q_proj", map(tuple, pairs), 3)
