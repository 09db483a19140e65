"""NVFP4 on a GPU: the kernels' bytes are those of plain torch on the CPU, and a replayed graph draws new noise."""

import itertools
import math

import numpy as np
import pytest
import torch
from runtime.opcheck import check_op
from runtime.weights import KINDS, make_weight

from surogate_load import ops  # noqa: F401
from surogate_load.kernels import load_kernels
from surogate_load.ops.library import PLAIN

pytestmark = pytest.mark.gpu

SUROGATE = torch.ops.surogate
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 16), (3, 32), (33, 48), (128, 4096), (4097, 112))
OPTIONS = [
    (two_d, four_over_six, metric, power_of_two)
    for two_d, four_over_six, metric, power_of_two in itertools.product(
        (False, True), (False, True), ("mse", "l1", "absmax"), (False, True)
    )
    if four_over_six or metric == "mse"
]
NOISE = ((5, 0), (-(2**63) + 11, 2**40 + 3), (-1, -1))
"""Seeds and offsets; both words of each count."""


def ties(shape):
    """Quarters up to 6 times a power of two for each row: ties in most blocks, and a row of negative zeros."""
    rng = np.random.default_rng(shape[0])
    x = (rng.integers(-24, 25, shape) / 4).astype(np.float32)
    x[:, 0] = 6
    x *= np.exp2(rng.integers(-6, 7, (shape[0], 1))).astype(np.float32)
    if shape[0] > 1:
        x[-1] = -0.0
    return x


def wide(shape):
    """Magnitudes over most of float32's range, within a block too."""
    rng = np.random.default_rng(shape[1])
    return (rng.standard_normal(shape) * np.exp2(rng.uniform(-120, 120, shape))).astype(np.float32)


def make(kind, shape, dtype):
    made = {"ties": ties, "wide": wide}.get(kind)
    x = torch.from_numpy(made(shape) if made else make_weight(kind, shape)).to(dtype)
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest)


def assert_same_bytes(found, wanted):
    for name, one, other in zip(("codes", "scale", "global scale"), found, wanted, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        differ = one.cpu().view(torch.uint8) != other.view(torch.uint8)
        assert not differ.any(), f"{name}: {int(differ.sum())} of {differ.numel()} bytes differ"


def noise(seed, offset, device):
    return torch.tensor([seed], device=device), torch.tensor([offset], device=device)


@pytest.fixture(scope="module", autouse=True)
def _kernels():
    assert load_kernels("cuda")


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options)))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nearest(options, dtype, shape):
    for kind in (*KINDS, "ties", "wide") if shape[0] < 100 else ("outlier", "ties"):
        x = make(kind, shape, dtype)
        assert_same_bytes(SUROGATE.quantize_nvfp4(x.cuda(), *options), PLAIN["quantize_nvfp4"](x, *options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("seed", "offset"), NOISE)
def test_stochastic_draws_and_counts_as_the_cpu(dtype, shape, seed, offset):
    ours, theirs = noise(seed, offset, "cuda"), noise(seed, offset, "cpu")
    for kind in (*KINDS, "ties", "wide") if shape[0] < 100 else ("outlier", "ties"):
        x = make(kind, shape, dtype)
        found = SUROGATE.quantize_nvfp4_stochastic(x.cuda(), *ours)
        assert_same_bytes(found, PLAIN["quantize_nvfp4_stochastic"](x, *theirs))
        assert [int(part) for part in ours] == [int(part) for part in theirs]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 16)], ids=str)
def test_hadamard(dtype, shape):
    for kind in (*KINDS, "wide"):
        x = make(kind, (shape[0], math.prod(shape[1:])), dtype).reshape(shape)
        found, wanted = SUROGATE.hadamard16(x.cuda()), PLAIN["hadamard16"](x)
        assert torch.equal(found.cpu().view(torch.int32), wanted.view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_and_any_alignment(dtype):
    x = make("outlier", (48, 64), dtype)
    shifted = torch.empty(1 + x.numel(), dtype=dtype, device="cuda")[1:].view_as(x).copy_(x)
    for one, other in ((shifted, x), (x.cuda().t(), x.t())):
        for options in ((False, True, "mse", False), (True, True, "l1", True)):
            assert_same_bytes(SUROGATE.quantize_nvfp4(one, *options), PLAIN["quantize_nvfp4"](other, *options))
        found = SUROGATE.quantize_nvfp4_stochastic(one, *noise(1, 2, "cuda"))
        assert_same_bytes(found, PLAIN["quantize_nvfp4_stochastic"](other, *noise(1, 2, "cpu")))
        assert torch.equal(SUROGATE.hadamard16(one).cpu(), PLAIN["hadamard16"](other))


def test_no_values_and_other_dtypes():
    x, nothing = make("random", (3, 32), torch.float32), torch.empty(0, 32)
    for source in (x.double(), nothing):
        wanted = PLAIN["quantize_nvfp4"](source, False, True, "mse", False)
        assert_same_bytes(SUROGATE.quantize_nvfp4(source.cuda(), False, True, "mse", False), wanted)
        seed, offset = noise(3, 4, "cuda")
        found = SUROGATE.quantize_nvfp4_stochastic(source.cuda(), seed, offset)
        assert_same_bytes(found, PLAIN["quantize_nvfp4_stochastic"](source, *noise(3, 4, "cpu")))
        assert offset.item() == 5
        assert torch.equal(SUROGATE.hadamard16(source.cuda()).cpu(), PLAIN["hadamard16"](source))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options)))
def test_what_is_not_finite(value, options):
    """Only what the codes stand for: a NaN's sign, and so its code, differs between devices."""
    x = make("random", (20, 48), torch.float32)
    x[3, 5], x[17] = value, 0
    found, wanted = SUROGATE.quantize_nvfp4(x.cuda(), *options), PLAIN["quantize_nvfp4"](x, *options)
    dense = [SUROGATE.dequantize_nvfp4(*parts, torch.float32, None).cpu() for parts in (found, wanted)]
    torch.testing.assert_close(*dense, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found[2].cpu(), wanted[2], rtol=0, atol=0, equal_nan=True)


def test_a_replayed_graph_reads_new_values_and_draws_new_noise():
    x = make("random", (64, 256), torch.bfloat16).cuda()
    seed, offset = noise(7, 40, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        nearest = SUROGATE.quantize_nvfp4(x, False, True, "mse", False)
        first = SUROGATE.quantize_nvfp4_stochastic(x, seed, offset)
        second = SUROGATE.quantize_nvfp4_stochastic(SUROGATE.hadamard16(x), seed, offset)
    theirs = noise(7, 40, "cpu")
    assert offset.item() == 40
    for replay in range(3):
        x.copy_(make("outlier", (64, 256), torch.bfloat16) * (1 + replay))
        graph.replay()
        plain = x.cpu()
        assert_same_bytes(nearest, PLAIN["quantize_nvfp4"](plain, False, True, "mse", False))
        assert_same_bytes(first, PLAIN["quantize_nvfp4_stochastic"](plain, *theirs))
        assert_same_bytes(second, PLAIN["quantize_nvfp4_stochastic"](PLAIN["hadamard16"](plain), *theirs))
        assert offset.item() == theirs[1].item() == 42 + 2 * replay


def test_opcheck():
    x = make("random", (5, 32), torch.float32).cuda()
    for options in ((False, False, "mse", False), (False, True, "absmax", False), (True, True, "l1", True)):
        check_op(SUROGATE.quantize_nvfp4.default, (x, *options))
    check_op(SUROGATE.quantize_nvfp4.default, (x.bfloat16(), False, True, "mse", False))
    check_op(SUROGATE.quantize_nvfp4_stochastic.default, (x, *noise(3, 4, "cuda")))
    check_op(SUROGATE.hadamard16.default, (x.half(),))
