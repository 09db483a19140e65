"""The CPU engine byte for byte against the numpy definitions, and its error sums against float64."""

from itertools import product

import ml_dtypes
import numpy as np
import pytest
from formats.cases import FORMATS, SHAPES, SOURCE_DTYPES, Weight, name_of, weights
from hypothesis import given, settings

from surogate_formats.dtypes import NUMPY
from surogate_formats.errors import NonFiniteWeightError, OutOfRangeError
from surogate_formats.fp8 import FP8
from surogate_formats.nf4 import NF4
from surogate_formats.nvfp4 import NVFP4
from surogate_quantize import engine as engine_module
from surogate_quantize import pieces
from surogate_quantize.engine import CpuEngine
from surogate_quantize.source import Source
from surogate_quantize.weight_errors import error_unit

F32 = np.float32


@pytest.fixture(scope="module")
def engine():
    with CpuEngine(2) as opened:
        yield opened


def run(engine, fmt, weight, group_amax=None, search=False):
    source = Source.of(weight.stored, weight.dtype)
    return engine.quantize(fmt, source, engine.amax(source), group_amax, search=search)


def searches(weight):
    """Whether the engine searches: not in the last binade of a dtype."""
    return float(np.abs(weight.f32).max(initial=0)) < weight.limit / 2


def assert_same(parts, expected):
    assert parts.keys() == expected.keys()
    for part, array in expected.items():
        assert (parts[part].dtype, parts[part].shape) == (array.dtype, array.shape), part
        assert parts[part].tobytes() == array.tobytes(), part


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("fmt", FORMATS, ids=name_of)
@settings(max_examples=30, deadline=None)
@given(weight=weights())
def test_equals_numpy(engine, fmt, search, weight):
    weight = weight.fit(fmt)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = fmt.quantize(weight.f32, search=search and searches(weight))
        values = fmt.dequantize(expected, weight.stored.shape)
        in_range = np.isfinite(values.astype(NUMPY[weight.dtype])).all()
    if not in_range:
        with pytest.raises(OutOfRangeError, match=f"dequantizes to no finite {weight.dtype} value"):
            run(engine, fmt, weight, search=search)
        return
    parts, errors = run(engine, fmt, weight, search=search)
    assert_same(parts, expected)
    assert errors.max_error == np.abs(values - weight.f32).max()
    largest = float(np.abs(weight.f32).max())
    if largest > 1e-30:
        difference, x = (array.astype(np.float64) / largest for array in (values - weight.f32, weight.f32))
        for found, exact in ((errors.squared_error, difference), (errors.squared_sum, x)):
            # Counted in whole units of at least largest / 2^21, each value may be off by half of one.
            slack = np.abs(exact).sum() * 2.0**-20 + x.size * 2.0**-42
            assert abs(found / largest**2 - (exact**2).sum()) <= slack


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt.shares_amax], ids=name_of)
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("dtype", SOURCE_DTYPES)
def test_equals_numpy_with_the_amax_of_a_group(engine, fmt, dtype, search):
    stored = (np.random.default_rng(0).standard_normal((33, 144)) * 0.1).astype(NUMPY[dtype])
    weight = Weight(stored, dtype)
    for factor in (1, 1.7, 60):
        amax = F32(np.abs(weight.f32).max() * F32(factor))
        parts, _ = run(engine, fmt, weight, amax, search)
        assert_same(parts, fmt.quantize(weight.f32, amax, search=search))


@pytest.mark.parametrize("fmt", FORMATS, ids=name_of)
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("piece", [1024, 8192])
def test_cuts_leave_no_seam(engine, fmt, piece, search, monkeypatch):
    weight = Weight(np.random.default_rng(0).standard_normal((300, 272)).astype(ml_dtypes.bfloat16), "BF16")
    parts, errors = run(engine, fmt, weight, search=search)
    monkeypatch.setattr(pieces, "PIECE", piece)
    monkeypatch.setattr(engine_module, "PIECE", 8192)
    cut_parts, cut_errors = run(engine, fmt, weight, search=search)
    assert len(next(pieces.cut(fmt, Source.of(weight.stored, "BF16"), pieces.Shared(F32(1), F32(1)))[1])) > 1
    assert_same(cut_parts, parts)
    assert_same(parts, fmt.quantize(weight.f32, search=search))
    assert cut_errors == errors


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_threads_changes_nothing(engine, workers, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 4096)
    weight = Weight(np.random.default_rng(1).standard_normal((300, 272)).astype(F32), "F32")
    with CpuEngine(workers) as other:
        for fmt, search in product(FORMATS, (False, True)):
            parts, errors = run(other, fmt, weight, search=search)
            expected, expected_errors = run(engine, fmt, weight, search=search)
            assert_same(parts, expected)
            assert errors == expected_errors


@pytest.mark.parametrize("dtype", SOURCE_DTYPES)
def test_every_bit_pattern_of_a_source_widens_as_numpy_does(engine, dtype):
    """Through FP8 of one value a row: its scale is |x| / 448 (or the floor), so nothing of x is lost to the test."""
    words = np.arange(2**16, dtype=np.uint16) if dtype != "F32" else np.arange(0, 2**32, 65521, dtype=np.uint32)
    stored = words.view(NUMPY[dtype])
    with np.errstate(invalid="ignore"):
        stored = stored[
            np.isfinite(stored.astype(F32)) & (np.abs(stored.astype(F32)) < ml_dtypes.finfo(NUMPY[dtype]).max / 4)
        ]
    weight = Weight(np.ascontiguousarray(stored[:, None]), dtype)
    parts, _ = run(engine, FP8("channel"), weight)
    assert_same(parts, FP8("channel").quantize(weight.f32))


@pytest.mark.parametrize("dtype", SOURCE_DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (129, 7), (299, 271)])
def test_what_is_not_finite_is_found_with_its_first_index(engine, dtype, bad, place):
    stored = np.ones((300, 272), NUMPY[dtype])
    stored[place] = bad
    stored[299, 271] = np.nan
    expected = rf"^\[{place[0]}, {place[1]}\] is {'nan' if place == (299, 271) else bad}$"
    with pytest.raises(NonFiniteWeightError, match=expected):
        engine.amax(Source.of(stored, dtype))


@pytest.mark.parametrize("dtype", SOURCE_DTYPES)
def test_amax_is_the_largest_magnitude(engine, dtype):
    for shape in SHAPES:
        stored = np.random.default_rng(0).standard_normal(shape).astype(NUMPY[dtype])
        stored[-1, -1] = -9
        assert engine.amax(Source.of(stored, dtype)) == 9
    assert engine.amax(Source.of(np.zeros((3, 4), NUMPY[dtype]), dtype)) == 0


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("fmt", [NF4(), NVFP4(), FP8(), FP8("channel"), FP8("block")], ids=name_of)
def test_an_empty_weight(engine, fmt, search):
    weight = Weight(np.empty((0, 16), F32), "F32")
    parts, errors = run(engine, fmt, weight, search=search)
    assert_same(parts, fmt.quantize(weight.f32, search=search))
    assert errors.relative == 0


def test_a_value_that_overflows_its_dtype_is_refused_and_its_neighbour_is_not(engine):
    """The bfloat16 scale is rounded up, so the largest half comes back larger than a half can be."""
    fmt = FP8("tensor", "bfloat16")
    largest = Weight(np.full((2, 16), 65504, np.float16), "F16")
    with pytest.raises(OutOfRangeError, match=r"65504\.0 dequantizes to no finite F16"):
        run(engine, fmt, largest)
    run(engine, FP8("tensor", "float32"), largest)
    run(engine, fmt, Weight(np.full((2, 16), 60000, np.float16), "F16"))
    run(engine, FP8("channel"), Weight(np.full((2, 16), 65504, np.float16), "F16"), search=True)
    run(engine, fmt, Weight(np.full((2, 16), 65504, F32), "F32"))


@pytest.mark.parametrize("fmt", [NF4(), NVFP4(), FP8(), FP8("channel"), FP8("block")], ids=name_of)
def test_sums_of_the_widest_bands_do_not_overflow(engine, fmt):
    """Each value is 2^21 units, nearly: 2^21 of their squares would not fit 63 bits."""
    stored = np.full((128, 28672), 1 - 2.0**-8, ml_dtypes.bfloat16)
    weight = Weight(stored, "BF16")
    parts, errors = run(engine, fmt, weight)
    assert errors.squared_sum == stored.size * float(stored[0, 0]) ** 2
    if fmt.name == "fp8":
        assert_same(parts, fmt.quantize(weight.f32))


def test_error_units_are_powers_of_two_that_fit_the_largest_value():
    for amax in (1e-45, 1e-38, 1e-3, 0.75, 1.0, 448.0, 3.4e38):
        unit = error_unit(F32(amax))
        assert np.frexp(unit)[0] == 0.5
        assert float(amax) * float(unit) <= 2**21
    assert error_unit(F32(0)) == 1
