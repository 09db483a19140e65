"""The ops of a training step: schema, fake and plain kernel agree, and compute what they say."""

import pytest
import torch
from runtime.opcheck import check_op
from torch import nn

from surogate_load import ops  # noqa: F401

SUROGATE = torch.ops.surogate


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def test_opcheck():
    labels, factor = torch.tensor([1, 2, -100]), torch.tensor([0.5, 1.0, 0.0])
    codes = drawn(8, 12).to(torch.float8_e4m3fn)
    check_op(SUROGATE.cross_entropy_.default, (drawn(3, 7), labels, factor, 1.5, 3.0, True))
    check_op(SUROGATE.add_product_.default, (drawn(4, 6), drawn(4, 5), drawn(5, 6), 0.5))
    check_op(SUROGATE.transpose_bytes.default, (codes,))
    check_op(SUROGATE.transpose_bytes_for_backward.default, (drawn(2), codes))


def test_add_product():
    left, right, out = drawn(4, 5), drawn(5, 6, seed=1), drawn(4, 6, seed=2)
    expected = out + 2 * left @ right
    SUROGATE.add_product_(out, left, right, 2.0)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8])
def test_transpose(dtype):
    x = torch.arange(24, dtype=torch.uint8).reshape(4, 6).view(dtype)
    found = SUROGATE.transpose_bytes(x)
    assert found.dtype == dtype
    assert found.is_contiguous()
    assert torch.equal(found.view(torch.uint8), x.view(torch.uint8).t())


@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (0.5, 0.0), (2.0, 3.0)])
def test_cross_entropy(scale, cap):
    logits, labels = drawn(5, 11).requires_grad_(True), torch.tensor([0, 10, 3, -100, 5])
    factor = torch.tensor([0.25, 0.5, 1.0, 0.0, 2.0])
    values = logits * scale
    values = cap * torch.tanh(values / cap) if cap else values
    losses = nn.functional.cross_entropy(values, labels, reduction="none", ignore_index=-100) * factor
    losses.sum().backward()
    made = logits.detach().clone()
    found = SUROGATE.cross_entropy_(made, labels, factor, scale, cap, True)
    torch.testing.assert_close(found, losses.detach())
    torch.testing.assert_close(made, logits.grad)
    unchanged = logits.detach().clone()
    torch.testing.assert_close(SUROGATE.cross_entropy_(unchanged, labels, factor, scale, cap, False), losses.detach())
    assert torch.equal(unchanged, logits)
