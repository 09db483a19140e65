"""Grids: what a solver may choose is exactly what the format's own reader decodes."""

import numpy as np
import pytest
import torch
from formats.cases import NF4_FORMATS, NVFP4_FORMATS, name_of

from surogate_formats.fp8 import FP8
from surogate_formats.nf4 import NF4
from surogate_formats.tables import NF4_CODEBOOK
from surogate_quantize.calibration.grid import Blocks, rounded
from surogate_quantize.calibration.grids import make_grid
from surogate_quantize.calibration.solver import search_scales, solve, statistics

FORMATS = [
    *NF4_FORMATS,
    *NVFP4_FORMATS,
    FP8("tensor"),
    FP8("channel"),
    FP8("channel", scale_dtype="bfloat16"),
    FP8("block"),
]
SHAPES = [(48, 256), (33, 208), (5, 96), (7, 25)]


def weights(shape, seed=0):
    values = np.random.default_rng(seed)
    weight = values.standard_normal(shape) * values.random((shape[0], 1))
    weight[0, :17] = 0
    return weight.astype(np.float32)


def inputs(columns, tokens=512, seed=1):
    values = torch.Generator().manual_seed(seed)
    mixing = torch.eye(columns) + torch.randn(columns, columns, generator=values) / columns**0.5
    return torch.randn(tokens, columns, generator=values) @ mixing


def takes(fmt, shape):
    if fmt.keep_reason(shape):
        pytest.skip("the format doesn't take the shape")


@pytest.mark.parametrize("fmt", FORMATS, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_solved_is_what_the_reader_decodes(fmt, shape):
    takes(fmt, shape)
    weight = weights(shape)
    nearest = fmt.quantize(weight)
    grid = make_grid(fmt, nearest, torch.from_numpy(weight))
    solved = solve(torch.from_numpy(weight), grid, statistics(torch.from_numpy(np.cov(inputs(shape[1]).T.numpy()))))
    parts = grid.parts(solved.values, solved.scales)
    assert {key: (array.dtype, array.shape) for key, array in parts.items()} == {
        key: (array.dtype, array.shape) for key, array in nearest.items()
    }
    assert np.array_equal(fmt.dequantize(parts, shape), solved.dequantized(grid).numpy())


@pytest.mark.parametrize("fmt", FORMATS, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_scales_of_nearest_are_legal_and_legal_ones_stay(fmt, shape):
    takes(fmt, shape)
    weight = weights(shape)
    grid = make_grid(fmt, fmt.quantize(weight), torch.from_numpy(weight))
    scales = grid.legal(grid.scales * 0.83)
    assert torch.equal(grid.legal(scales), scales)
    if fmt.name != "nf4" or fmt.double_quant != "dynamic":  # bitsandbytes restores a negative absmax at times
        assert torch.equal(grid.legal(grid.scales), grid.scales)
    if len(grid.blocks.count) == 2:
        place = slice(1, 2) if grid.blocks.count[1] > 1 else slice(0, 1)
        assert torch.equal(grid.legal((grid.scales * 0.83)[:, place], place), scales[:, place])


@pytest.mark.parametrize("blocks", [Blocks((6, 10), 1, 4), Blocks((6, 10), 4, 4), Blocks((6, 10), 0, 7)], ids=str)
def test_blocks_add_up_what_they_expand_to(blocks):
    scales = torch.arange(float(np.prod(blocks.count))).reshape(blocks.count) + 1
    spread = blocks.expand(scales)
    assert spread.shape == blocks.shape
    counts = blocks.sums(torch.ones(blocks.shape))
    assert counts.sum() == 60
    assert torch.equal(blocks.sums(spread), scales * counts)
    assert torch.equal(blocks.largest(-spread), scales)


def loss(weight, values, hessian):
    missed = (values - weight).double()
    return float(((missed @ hessian) * missed).sum())


@pytest.mark.parametrize("fmt", FORMATS, ids=name_of)
def test_uncorrelated_inputs_give_rounding_with_searched_scales(fmt):
    takes(fmt, (48, 256))
    weight = torch.from_numpy(weights((48, 256)))
    grid = make_grid(fmt, fmt.quantize(weight.numpy()), weight)
    solved = solve(weight, grid, statistics(torch.eye(256, dtype=torch.float64)), sweeps=0)
    scales = search_scales(weight, grid)
    assert torch.equal(solved.scales, scales)
    expanded = grid.blocks.expand(scales)
    assert torch.equal(solved.values, rounded(grid, weight, expanded))


@pytest.mark.parametrize("fmt", FORMATS, ids=name_of)
def test_inputs_of_unequal_size_give_a_weighted_search(fmt):
    takes(fmt, (48, 256))
    weight = torch.from_numpy(weights((48, 256)))
    grid = make_grid(fmt, fmt.quantize(weight.numpy()), weight)
    sizes = torch.rand(256, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    known = statistics(sizes.diag(), damping=0)
    solved = solve(weight, grid, known, sweeps=0)
    importance = 1 / known.upper.diagonal()[known.order.argsort()] ** 2
    torch.testing.assert_close(importance.double(), sizes)
    assert torch.equal(solved.scales, search_scales(weight, grid, importance))


@pytest.mark.parametrize("fmt", FORMATS, ids=name_of)
def test_each_step_lowers_the_error_of_the_output(fmt):
    takes(fmt, (48, 256))
    weight = torch.from_numpy(weights((48, 256)))
    x = inputs(256).double()
    hessian = x.T @ x / len(x)
    nearest = fmt.quantize(weight.numpy())
    grid = make_grid(fmt, nearest, weight)
    known = statistics(hessian)
    losses = [loss(weight, torch.from_numpy(fmt.dequantize(nearest, (48, 256))), known.hessian)]
    losses += [loss(weight, solve(weight, grid, known, n).dequantized(grid), known.hessian) for n in (0, 1, 3)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.6 * losses[0]


def test_a_tiny_block_is_near_to_brute_force():
    """All codes of five values under the scale that was found: the solver's are the best but for one percent."""
    fmt, values = NF4(64, "none"), torch.from_numpy(NF4_CODEBOOK)
    ratios = []
    for seed in range(8):
        weight, x = torch.from_numpy(weights((2, 5), seed))[1:], inputs(5, seed=seed).double()
        known = statistics(x.T @ x / len(x))
        grid = make_grid(fmt, fmt.quantize(weight.numpy()), weight)
        solved = solve(weight, grid, known, sweeps=6)
        scale = solved.scales.reshape(-1)[0]
        choices = torch.cartesian_prod(*[values] * 5) * scale
        missed = (choices - weight).double()
        best = float(((missed @ known.hessian) * missed).sum(1).min())
        ratios.append(loss(weight, solved.dequantized(grid), known.hessian) / best)
    assert np.median(ratios) < 1.01


@pytest.mark.parametrize("fmt", FORMATS, ids=name_of)
def test_inputs_that_say_nothing(fmt):
    """Dead channels, one token, no token at all: what is found is finite and no worse than rounding."""
    takes(fmt, (48, 256))
    weight = torch.from_numpy(weights((48, 256)))
    x = inputs(256).double()
    dead = x.clone()
    dead[:, ::3] = 0
    nearest = torch.from_numpy(fmt.dequantize(fmt.quantize(weight.numpy()), (48, 256)))
    for seen in (dead, x[:1], torch.zeros(1, 256).double()):
        grid = make_grid(fmt, fmt.quantize(weight.numpy()), weight)
        known = statistics(seen.T @ seen / len(seen))
        found = solve(weight, grid, known).dequantized(grid)
        assert torch.isfinite(found).all()
        assert loss(weight, found, known.hessian) <= loss(weight, nearest, known.hessian)
