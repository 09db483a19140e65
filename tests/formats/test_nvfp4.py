"""NVFP4: scales, Four-Over-Six and tiles, against the rules written out block by block."""

import ml_dtypes
import numpy as np
import pytest
from formats.cases import E2M1_TIES, NVFP4_FORMATS, name_of, weights
from hypothesis import given, settings

from surogate_formats.errors import NonFiniteWeightError, UsageError
from surogate_formats.nvfp4 import NVFP4
from surogate_formats.rounding import to_e2m1_codes, unpack_nibbles
from surogate_formats.tables import E2M1_VALUES

F32 = np.float32
PLAIN = NVFP4(two_d=False, four_over_six=False)
ERRORS = {
    "mse": lambda total, difference: total + difference * difference,
    "l1": lambda total, difference: total + abs(difference),
    "absmax": lambda total, difference: max(total, abs(difference)),
}


def codes_of(parts, columns):
    return unpack_nibbles(parts["codes"], columns, first_high=False)


def rounded(block, wanted, g):
    """Scale, codes and values of a block [rows, 16] whose amax isn't 0, for a wanted scale."""
    scale = max(F32(ml_dtypes.float8_e4m3fn(min(wanted, F32(448)))), F32(2**-9))
    step = scale / g
    codes = to_e2m1_codes(block / step)
    return scale, codes, E2M1_VALUES[codes] * step


def loop_block(fmt, block, g):
    amax = np.abs(block).max()
    if amax == 0:
        return F32(0), np.zeros(block.shape, np.uint8)
    sixth = amax / F32(6) * g
    best = rounded(block, sixth, g)
    if fmt.four_over_six:
        other = rounded(block, F32(1.5) * sixth, g)
        error = []
        for _, _, values in (best, other):
            total = F32(0)
            for difference in (values - block).reshape(-1):
                total = ERRORS[fmt.metric](total, difference)
            error.append(total)
        best = other if error[1] < error[0] else best
    return best[0], best[1]


@pytest.mark.parametrize("fmt", NVFP4_FORMATS, ids=name_of)
@settings(max_examples=8, deadline=None)
@given(weight=weights())
def test_against_a_loop_over_blocks(fmt, weight):
    x = weight.fit(fmt).f32[:17, :48]
    with np.errstate(over="ignore", invalid="ignore"):
        parts = fmt.quantize(x)
        g = parts["global_scale"][0]
        height = 16 if fmt.two_d else 1
        codes, scale = codes_of(parts, x.shape[1]), parts["scale"].astype(F32)
        for row in range(0, x.shape[0], height):
            for column in range(0, x.shape[1], 16):
                place = slice(row, row + height), slice(column, column + 16)
                expected_scale, expected_codes = loop_block(fmt, x[place], g)
                assert set(scale[row : row + height, column // 16].tolist()) == {float(expected_scale)}
                np.testing.assert_array_equal(codes[place], expected_codes)


def test_ties_of_e2m1():
    block = np.array([[6, *E2M1_TIES, 0, -0.0, *(-tie for tie in E2M1_TIES[:6])]], F32)
    parts = PLAIN.quantize(block * F32(2**-5))
    ties = [0, 2, 2, 4, 4, 6, 6]
    assert codes_of(parts, 16)[0].tolist() == [7, *ties, 0, 8, *(8 | code for code in ties[:6])]


def test_first_value_is_in_the_low_nibble():
    parts = PLAIN.quantize(np.array([[6, -6, *[0] * 14]], F32))
    assert parts["codes"].tolist() == [[0xF7, *[0] * 7]]


@pytest.mark.parametrize(("four_over_six", "reach"), [(False, 2688), (True, 1536)])
@pytest.mark.parametrize("amax", [1e-3, 0.75, 1.5, 1.0, 3.0, 448.0, 1e-30, 3e38])
def test_global_scale(four_over_six, reach, amax):
    exact = F32(reach) / F32(amax)
    assert NVFP4(four_over_six=four_over_six, global_scale="amax").divisor(F32(amax)) == exact
    pow2 = NVFP4(four_over_six=four_over_six).divisor(F32(amax))
    assert pow2 <= exact < 2 * pow2
    assert np.frexp(pow2)[0] == 0.5


@pytest.mark.parametrize("fmt", NVFP4_FORMATS, ids=name_of)
def test_global_scale_of_nothing_and_of_next_to_nothing(fmt):
    assert fmt.divisor(F32(0)) == 1
    assert fmt.divisor(np.finfo(F32).smallest_subnormal) == F32(2.0**123)


@settings(max_examples=40, deadline=None)
@given(weights())
def test_pow2_makes_every_value_exact_in_bfloat16(weight):
    x = weight.fit(PLAIN).f32
    for fmt in NVFP4_FORMATS:
        if fmt.global_scale == "pow2" and np.abs(x).max() < 1e38:
            values = fmt.dequantize(fmt.quantize(x), x.shape)
            np.testing.assert_array_equal(values.astype(ml_dtypes.bfloat16).astype(F32), values)


def test_two_dimensional_scales_stand_in_all_16_rows_and_survive_a_transpose():
    weight = np.random.default_rng(0).standard_normal((32, 48)).astype(F32)
    parts, transposed = NVFP4().quantize(weight), NVFP4().quantize(np.ascontiguousarray(weight.T))
    scale = parts["scale"].reshape(2, 16, 3)
    assert (scale == scale[:, :1]).all()
    np.testing.assert_array_equal(codes_of(transposed, 32), codes_of(parts, 48).T)
    np.testing.assert_array_equal(NVFP4().dequantize(transposed, (48, 32)), NVFP4().dequantize(parts, weight.shape).T)


def test_rows_beyond_the_last_tile_do_not_touch_its_scale():
    weight = np.random.default_rng(0).standard_normal((19, 32)).astype(F32)
    padded = np.concatenate([weight, np.zeros((13, 32), F32)])
    parts, whole = NVFP4().quantize(weight), NVFP4().quantize(padded)
    for part in ("codes", "scale"):
        assert parts[part].tobytes() == whole[part][:19].tobytes()


def test_four_over_six_is_in_no_block_worse_by_its_own_metric():
    weight = np.random.default_rng(0).standard_normal((64, 256)).astype(F32)
    # With this amax the reaches 448 * 6 and 256 * 6 give the same power of two.
    weight *= F32(1.4) / np.abs(weight).max()
    assert NVFP4(four_over_six=True).divisor(F32(1.4)) == NVFP4(four_over_six=False).divisor(F32(1.4))
    blocks = weight.reshape(-1, 16).astype(np.float64)

    def block_errors(fmt):
        error = np.abs(fmt.dequantize(fmt.quantize(weight), weight.shape).reshape(-1, 16) - blocks)
        return {"mse": (error**2).sum(1), "l1": error.sum(1), "absmax": error.max(1)}

    plain = block_errors(PLAIN)
    for metric in ERRORS:
        chosen = block_errors(NVFP4(False, True, metric))
        for other in (plain, *(block_errors(NVFP4(False, True, name)) for name in ERRORS)):
            assert (chosen[metric] <= other[metric] * (1 + 1e-5)).all()
        assert (chosen[metric] < plain[metric] * 0.99).mean() > 0.2


@pytest.mark.parametrize(
    ("fmt", "error"),
    [(NVFP4(False, False), 0.0950), (NVFP4(False, True), 0.0869), (NVFP4(True, True), 0.1113)],
    ids=name_of,
)
def test_relative_error_on_gaussian_weights(fmt, error):
    weight = np.random.default_rng(0).standard_normal((512, 512)).astype(F32)
    difference = fmt.dequantize(fmt.quantize(weight), weight.shape) - weight
    assert np.linalg.norm(difference) / np.linalg.norm(weight) == pytest.approx(error, abs=6e-4)


@pytest.mark.parametrize("fmt", NVFP4_FORMATS, ids=name_of)
def test_group_amax_sets_the_global_scale_and_zero_stays_zero(fmt):
    weight = np.random.default_rng(0).standard_normal((16, 32)).astype(F32)
    parts = fmt.quantize(weight, F32(64))
    assert parts["global_scale"] == [fmt.divisor(F32(64))]
    zero = fmt.quantize(np.zeros((3, 32), F32), F32(64))
    assert not zero["codes"].any()
    assert not zero["scale"].view(np.uint8).any()


def test_bytes_and_bits():
    for fmt in NVFP4_FORMATS:
        parts = fmt.quantize(np.ones((19, 48), F32))
        expected = {"codes": 19 * 24, "scale": 19 * 3, "global_scale": 4}
        assert {part: array.nbytes for part, array in parts.items()} == expected
        assert {part: spec.nbytes for part, spec in fmt.part_specs((19, 48)).items()} == expected
        assert parts["global_scale"].shape == (1,)


def test_k_must_divide_into_blocks():
    assert PLAIN.keep_reason((16, 40)) == "K = 40 is not a multiple of 16"
    assert PLAIN.keep_reason((1, 16)) is None


def test_what_is_not_finite_is_refused_with_its_first_index():
    weight = np.zeros((3, 32), F32)
    weight[2, 7] = np.inf
    with pytest.raises(NonFiniteWeightError, match=r"\[2, 7\] is inf"):
        NVFP4().quantize(weight)


@pytest.mark.parametrize("arguments", [{"metric": "MSE"}, {"global_scale": "max"}])
def test_other_parameters_are_refused(arguments):
    with pytest.raises(UsageError, match=f"fp4: `{next(iter(arguments))}` is"):
        NVFP4(**arguments)
