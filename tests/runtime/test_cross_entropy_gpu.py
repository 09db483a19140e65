"""The loss kernel against plain torch: every dtype, ragged rows, ignored rows, softcaps, rows of infinities."""

import pytest
import torch

from surogate_load import ops  # noqa: F401
from surogate_load.kernels import load_kernels
from surogate_load.loss.linear_cross_entropy import linear_cross_entropy
from surogate_load.ops.library import PLAIN

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def arguments(rows, columns, dtype):
    torch.manual_seed(columns)
    logits = (torch.randn(rows, columns, device="cuda") * 4).to(dtype)
    labels = torch.randint(0, columns, (rows,), device="cuda")
    factor = torch.rand(rows, device="cuda")
    factor[::3] = 0
    labels[::3] = -100
    return logits, labels, factor


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 8, 1003, 8192, 151936])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (0.5, 0.0), (2.0, 30.0)])
def test_kernel_is_plain_torch(dtype, columns, scale, cap):
    assert load_kernels("cuda")
    logits, labels, factor = arguments(20, columns, dtype)
    expected = logits.clone()
    wanted = PLAIN["cross_entropy_"](expected, labels, factor, scale, cap, True)
    unchanged = logits.clone()
    only_loss = torch.ops.surogate.cross_entropy_(unchanged, labels, factor, scale, cap, False)
    assert torch.equal(unchanged, logits)
    found = torch.ops.surogate.cross_entropy_(logits, labels, factor, scale, cap, True)
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)
    assert torch.equal(only_loss, found)
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(logits, expected, rtol=max(2 * ulp, 2e-5), atol=1e-6 if dtype != torch.float16 else 1e-4)
    assert not logits[::3].any()


def test_infinities():
    logits, labels, factor = arguments(6, 64, torch.bfloat16)
    logits[1, :32] = -torch.inf
    labels[1] = 40
    logits[2] = -torch.inf
    expected = logits.clone()
    wanted = PLAIN["cross_entropy_"](expected, labels, factor, 1.0, 0.0, True)
    found = torch.ops.surogate.cross_entropy_(logits, labels, factor, 1.0, 0.0, True)
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5, equal_nan=True)
    torch.testing.assert_close(logits, expected, rtol=2e-2, atol=1e-6, equal_nan=True)


def test_linear_cross_entropy():
    hidden = torch.randn(2500, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1003, 64, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(0, 1003, (2500,), device="cuda")
    labels[::7] = -100
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    found, copied = hidden.grad.clone(), hidden.detach().clone().requires_grad_(True)
    expected = torch.nn.functional.cross_entropy((copied @ weight.t()).float(), labels)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, copied.grad, rtol=2e-2, atol=1e-5)
