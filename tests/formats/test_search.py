"""The search for scales: never worse than nearest, near the best of all legal scales, and as legal as any."""

import ml_dtypes
import numpy as np
import pytest
from formats.cases import FORMATS, name_of, weights
from hypothesis import given, settings

from surogate_formats.fp8 import FP8, TILE
from surogate_formats.nf4 import NF4, block_absmax
from surogate_formats.nvfp4 import NVFP4
from surogate_formats.rounding import to_e2m1_codes
from surogate_formats.search import FP8_MULTIPLIERS, NF4_BIN_ERRORS, NF4_MULTIPLIERS, pairwise_sum, tile_errors
from surogate_formats.tables import E2M1_VALUES, NF4_CODEBOOK

F32 = np.float32
SEARCHED = [
    NF4(64, "none"),
    NF4(),
    NF4(64, "dynamic"),
    NF4(128),
    NVFP4(False, False),
    NVFP4(False),
    NVFP4(),
    NVFP4(global_scale="amax"),
    FP8("channel"),
    FP8("channel", "bfloat16"),
    FP8("block"),
    FP8("block", "bfloat16"),
]
"""With one scale a tensor there is nothing to search."""

SOURCES = {
    "normal": lambda rng, shape: rng.standard_normal(shape) * 0.02,
    "heavy tails": lambda rng, shape: rng.standard_t(4, shape) * 0.02,
    "outliers": lambda rng, shape: rng.standard_normal(shape) * np.where(rng.random(shape) < 0.001, 30, 1),
}


def weight_of(kind, shape=(130, 256)):
    return SOURCES[kind](np.random.default_rng(0), shape).astype(F32)


def blocks_of(fmt, weight):
    """float64 [blocks, values] of what shares a scale."""
    rows, columns = weight.shape
    if fmt.name == "nf4":
        return weight.reshape(-1, fmt.block_size)
    two_d = fmt.two_d if fmt.name == "fp4" else fmt.scaling == "block"
    width = 16 if fmt.name == "fp4" else TILE if two_d else columns
    height = width if two_d else 1
    padded = np.pad(weight, ((0, -rows % height), (0, -columns % width)))
    tiles = padded.reshape(-1, height, padded.shape[1] // width, width).swapaxes(1, 2)
    return tiles.reshape(-1, height * width)


def errors_of(fmt, weight, parts):
    missed = fmt.dequantize(parts, weight.shape).astype(np.float64) - weight
    return (blocks_of(fmt, missed) ** 2).sum(axis=1)


def legal_errors(fmt, weight):
    """The error of each block under each of its legal scales, float64 [scales, blocks]; a dense choice of them where
    every float is legal."""
    blocks, parts = blocks_of(fmt, weight).astype(np.float64), fmt.quantize(weight)
    amax = np.abs(blocks).max(axis=1).astype(F32)
    if fmt.name == "nf4":
        stored = [(amax * F32(m)) for m in np.linspace(0.6, 1.2, 121)]
        if fmt.double_quant != "none":
            stored = [np.full(amax.shape, code, np.uint8) for code in range(256)]
        scales, grid = [np.maximum(block_absmax({**parts, "absmax": each}), 0) for each in stored], NF4_CODEBOOK
    elif fmt.name == "fp4":
        values = np.arange(1, 127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(F32)
        g = parts["global_scale"][0]
        scales, grid = [np.full(amax.shape, v / g) for v in values], E2M1_VALUES
    else:
        scales = [fmt.scales(amax, multiplier) for multiplier in FP8_MULTIPLIERS]
        grid = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    grid = np.unique(grid[np.isfinite(grid)].astype(np.float64))
    middles = (grid[:-1] + grid[1:]) / 2
    found = []
    for scale in scales:
        step = np.where(scale > 0, scale, 1).astype(np.float64)[:, None]
        values = grid[np.searchsorted(middles, blocks / step)] * np.where(scale > 0, step[:, 0], 0)[:, None]
        found.append(((values - blocks) ** 2).sum(axis=1))
    return np.array(found)


def unclipped_codes(fmt, weight):
    """E4M3 codes of the scales that map each block's largest value to 6, one a block."""
    amax = np.abs(blocks_of(fmt, weight)).max(axis=1)
    wanted = amax / F32(6) * fmt.quantize(weight)["global_scale"][0]
    return np.maximum(wanted.astype(ml_dtypes.float8_e4m3fn).view(np.uint8), 1)


@pytest.mark.parametrize("kind", SOURCES)
def test_tiles_are_not_clipped_and_blocks_are(kind):
    weight = weight_of(kind)
    for two_d in (True, False):
        fmt = NVFP4(two_d)
        stored = fmt.quantize(weight, search=True)["scale"].view(np.uint8)[:: 16 if two_d else 1].reshape(-1)
        assert (stored < unclipped_codes(fmt, weight)).any() != two_d


@pytest.mark.parametrize("fmt", SEARCHED, ids=name_of)
@pytest.mark.parametrize("kind", SOURCES)
def test_never_worse_than_nearest_and_near_the_best_legal_scales(fmt, kind):
    weight = weight_of(kind)
    nearest, found = (errors_of(fmt, weight, fmt.quantize(weight, search=search)) for search in (False, True))
    assert (found <= nearest * (1 + 1e-5)).all()
    legal = legal_errors(fmt, weight)
    if getattr(fmt, "two_d", False):  # tiles are not clipped
        legal[np.arange(1, 127)[:, None] < unclipped_codes(fmt, weight)] = np.inf
    best = np.sqrt(np.minimum(legal.min(axis=0), nearest).sum())
    assert best * (1 - 1e-6) <= np.sqrt(found.sum()) <= best * 1.01
    assert found.sum() < nearest.sum() * 0.999


@pytest.mark.parametrize("metric", ["mse", "l1", "absmax"])
@pytest.mark.parametrize("two_d", [True, False])
def test_never_worse_than_four_over_six_down_to_subnormal_scales(two_d, metric):
    rng = np.random.default_rng(1)
    weight = (rng.standard_normal((64, 256)) * 2.0 ** rng.integers(-20, 0, (64, 16)).repeat(16, axis=1)).astype(F32)
    fmt = NVFP4(two_d, True, metric)
    codes = fmt.quantize(weight)["scale"].view(np.uint8)
    if not two_d:
        assert ((codes > 0) & (codes < 8)).sum() > 100
    chosen, found = (errors_of(fmt, weight, fmt.quantize(weight, search=search)) for search in (False, True))
    assert (found <= chosen * (1 + 1e-5)).all()


@pytest.mark.parametrize("fmt", SEARCHED, ids=name_of)
def test_codes_are_those_nearest_to_the_values_under_the_scales_that_the_reader_has(fmt):
    weight = weight_of("outliers")
    parts = fmt.quantize(weight, search=True)
    values = fmt.dequantize(parts, weight.shape)
    if fmt.name == "nf4":
        step, grid = np.repeat(np.maximum(block_absmax(parts), 0), fmt.block_size).reshape(weight.shape), NF4_CODEBOOK
    elif fmt.name == "fp4":
        scale, g = parts["scale"].astype(F32), parts["global_scale"][0]
        step = np.repeat(scale / g, 16, axis=1)
        assert (to_e2m1_codes(weight / step) == to_e2m1_codes(values / step)).all()
        return
    else:
        step = fmt._spread(parts["scale"].astype(F32), weight.shape)
        grid = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(F32)
        grid = np.concatenate([-grid[::-1], grid])
    missed = np.abs(values.astype(np.float64) - weight)
    for value in grid:
        assert (missed <= np.abs(np.float64(value) * step - weight) + 1e-4 * step).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=name_of)
@settings(max_examples=10, deadline=None)
@given(weight=weights())
def test_parts_have_their_shapes_and_what_blocks_share_stays(fmt, weight):
    x = weight.fit(fmt).f32[:40, :96]
    with np.errstate(all="ignore"):
        nearest, found = fmt.quantize(x), fmt.quantize(x, search=True)
        values, plain = fmt.dequantize(found, x.shape), fmt.dequantize(nearest, x.shape)
    assert {part: (array.dtype, array.shape) for part, array in found.items()} == {
        part: (array.dtype, array.shape) for part, array in nearest.items()
    }
    for part in ("absmax_scale", "absmax_offset", "nested_absmax", "nested_offset", "global_scale"):
        assert part not in nearest or found[part].tobytes() == nearest[part].tobytes()
    assert (np.isfinite(values) | ~np.isfinite(plain)).all()
    if not x.any():
        assert not values.any()


def test_one_scale_a_tensor_stays_as_it_is():
    weight = weight_of("normal")
    nearest, found = (FP8().quantize(weight, search=search) for search in (False, True))
    assert {part: array.tobytes() for part, array in nearest.items()} == {
        part: array.tobytes() for part, array in found.items()
    }


def test_neighbours_are_added_first_in_single_precision():
    terms = np.array([1, 2.0**-24, 2.0**-24, 2.0**-24, 1, 0, 0, 2.0**-23], F32)
    expected = ((terms[0] + terms[1]) + (terms[2] + terms[3])) + ((terms[4] + terms[5]) + (terms[6] + terms[7]))
    assert pairwise_sum(terms) == expected


@pytest.mark.parametrize(
    ("height", "width", "shape"), [(1, 2500, (3, 2500)), (128, 128, (130, 300)), (1, 128, (2, 128))]
)
def test_errors_of_tiles_are_sums_of_squares(height, width, shape):
    rng = np.random.default_rng(0)
    x, values = (rng.standard_normal(shape).astype(F32) for _ in range(2))
    found = tile_errors(values, x, height, width)
    for i, j in np.ndindex(found.shape):
        tile = np.s_[i * height : (i + 1) * height, j * width : (j + 1) * width]
        np.testing.assert_allclose(found[i, j], ((values[tile] - x[tile]).astype(np.float64) ** 2).sum(), rtol=1e-5)


def test_bins_hold_the_mean_squared_errors_of_their_values():
    places = (np.arange(256 * 64) + 0.5) / (128 * 64) - 1
    for m, multiplier in enumerate(NF4_MULTIPLIERS.astype(np.float64)):
        values = NF4_CODEBOOK.astype(np.float64) * multiplier
        errors = (np.abs(places[:, None] - values).min(axis=1) ** 2).reshape(256, 64).mean(axis=1)
        np.testing.assert_allclose(NF4_BIN_ERRORS[:, m] * 2.0**-24, errors, rtol=0.01, atol=1e-6)
