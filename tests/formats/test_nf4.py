"""NF4: blocks, double quantization and sizes, against what the specification says and against plain loops."""

from fractions import Fraction

import numpy as np
import pytest
from formats.cases import NF4_FORMATS, SHAPES, name_of, weights
from hypothesis import given, settings

from surogate_formats.errors import NonFiniteWeightError, UsageError
from surogate_formats.nf4 import NF4, block_absmax, quantize_absmax
from surogate_formats.rounding import unpack_nibbles
from surogate_formats.tables import NF4_CODEBOOK, NF4_MIDPOINTS

PLAIN = NF4(double_quant="none")


def codes_of(parts, count):
    return unpack_nibbles(parts["codes"].reshape(-1), count, first_high=True)


def loop_codes(weight, absmax, block):
    """Count of thresholds strictly below x * (1 / absmax), value by value."""
    codes = []
    for i, x in enumerate(weight.reshape(-1)):
        inverse = np.float32(1) / max(absmax[i // block], np.float32(1e-38))
        with np.errstate(over="ignore"):
            scaled = x * inverse
        codes.append(sum(bool(threshold < scaled) for threshold in NF4_MIDPOINTS) if absmax[i // block] else 7)
    return codes


def test_a_tie_takes_the_lower_code_and_its_neighbours_the_nearest():
    for i, threshold in enumerate(NF4_MIDPOINTS):
        near = [np.nextafter(threshold, np.float32(-2)), threshold, np.nextafter(threshold, np.float32(2))]
        parts = PLAIN.quantize(np.array([[1, -1, *near, 0]], np.float32))
        assert codes_of(parts, 6).tolist() == [15, 0, i, i, i + 1, 7]


def test_first_value_is_in_the_high_nibble_and_an_odd_tail_is_filled_with_code_7():
    parts = PLAIN.quantize(np.array([[1, -1, 1]], np.float32))
    assert parts["codes"].tolist() == [0xF0, 0xF7]
    assert parts["absmax"].tolist() == [1]


@pytest.mark.parametrize("fmt", NF4_FORMATS, ids=name_of)
def test_all_zero_is_code_7_and_exact(fmt):
    zero = np.zeros((5, 127), np.float32)
    zero[1] = -0.0
    parts = fmt.quantize(zero)
    assert set(parts["codes"].reshape(-1).tolist()) == {0x77}
    assert not fmt.dequantize(parts, zero.shape).any()


@pytest.mark.parametrize("fmt", NF4_FORMATS, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_are_the_specifications_memory_layout(fmt, shape):
    n = shape[0] * shape[1]
    parts = fmt.quantize(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    blocks = -(-n // fmt.block_size)
    expected = {"codes": -(-n // 2), "absmax": 4 * blocks}
    if fmt.double_quant == "affine":
        groups = -(-blocks // 256)
        expected |= {"absmax": blocks, "absmax_scale": 4 * groups, "absmax_offset": 4 * groups}
    if fmt.double_quant == "dynamic":
        expected |= {"absmax": blocks, "nested_absmax": 4 * -(-blocks // 256), "nested_offset": 4}
    assert {part: array.nbytes for part, array in parts.items()} == expected
    assert {part: spec.nbytes for part, spec in fmt.part_specs(shape).items()} == expected
    for part, spec in fmt.part_specs(shape).items():
        assert parts[part].shape == spec.shape
    assert parts["codes"].ndim == (1 if shape[1] % 2 else 2)


@pytest.mark.parametrize(
    ("fmt", "bits"),
    [
        (NF4(64, "affine"), Fraction(4) + Fraction(8, 64) + Fraction(64, 64 * 256)),
        (NF4(64, "none"), Fraction(4) + Fraction(32, 64)),
        (NF4(128, "affine"), Fraction(4) + Fraction(8, 128) + Fraction(64, 128 * 256)),
        (NF4(128, "none"), Fraction(4) + Fraction(32, 128)),
        (NF4(64, "dynamic"), Fraction(4) + Fraction(8, 64) + Fraction(32, 64 * 256) + Fraction(32, 512 * 1024)),
    ],
    ids=str,
)
def test_bits_per_weight_of_whole_groups(fmt, bits):
    shape = (512, 1024)
    assert Fraction(8 * sum(spec.nbytes for spec in fmt.part_specs(shape).values()), 512 * 1024) == bits


@settings(max_examples=25, deadline=None)
@given(weights())
def test_codes_and_absmax_without_double_quantization_against_a_loop(weight):
    x = weight.f32[:5, :80]
    parts = PLAIN.quantize(x)
    flat = np.abs(x).reshape(-1)
    assert parts["absmax"].tolist() == [flat[i : i + 64].max() for i in range(0, flat.size, 64)]
    assert codes_of(parts, x.size).tolist() == loop_codes(x, parts["absmax"], 64)


@settings(max_examples=25, deadline=None)
@given(weights())
def test_double_quantization_chooses_codes_against_the_restored_absmax(weight):
    x = weight.f32[:5, :80]
    parts = NF4().quantize(x)
    restored = block_absmax(parts)
    assert (restored >= 0).all()
    assert np.isfinite(restored).all()
    assert codes_of(parts, x.size).tolist() == loop_codes(x, restored, 64)


@settings(max_examples=25, deadline=None)
@given(weights())
def test_dequantize_is_one_product(weight):
    x = weight.f32
    for fmt in NF4_FORMATS:
        parts = fmt.quantize(x)
        absmax = block_absmax(parts)[np.arange(x.size) // fmt.block_size]
        expected = (NF4_CODEBOOK[codes_of(parts, x.size)] * absmax).reshape(x.shape)
        np.testing.assert_array_equal(fmt.dequantize(parts, x.shape), expected)


def test_double_quantization_step_by_step():
    absmax = np.array([1.0, 3.0, 1.5, 2.0], np.float32)
    parts = quantize_absmax(absmax)
    assert parts["absmax_offset"].tolist() == [2.0]
    assert parts["absmax_scale"].tolist() == [float(np.float32(2) / np.float32(254))]
    # -127, 127, -63.5 (a tie, to the even -64) and 0 steps, stored with 128 added
    assert parts["absmax"].tolist() == [1, 255, 64, 128]


def test_groups_of_double_quantization_are_256_blocks_and_do_not_touch_each_other():
    absmax = np.concatenate([np.full(256, 2.0), np.linspace(1, 5, 256), [7.0]]).astype(np.float32)
    parts = quantize_absmax(absmax)
    assert parts["absmax_scale"].tolist()[::2] == [0, 0]
    assert parts["absmax_offset"].tolist() == [2, 3, 7]
    assert set(parts["absmax"][:256].tolist()) == {128}
    assert parts["absmax"][[256, 511, 512]].tolist() == [1, 255, 128]
    assert np.abs(block_absmax(parts) - absmax).max() <= 4 / 254 / 2 * 1.001


def test_one_outlier_block_flips_no_sign():
    """With the mean as offset, the small absmax of its group would come out negative."""
    absmax = np.full(256, 0.1, np.float32)
    absmax[17] = 100
    restored = block_absmax(quantize_absmax(absmax))
    assert (restored > 0).all()
    weight = np.random.default_rng(0).standard_normal((256, 64)).astype(np.float32) * np.float32(0.05)
    weight[17, 3] = 100
    back = NF4().dequantize(NF4().quantize(weight), weight.shape)
    assert not (np.sign(back) * np.sign(weight) < 0).any()


def test_a_zero_block_in_a_group_is_restored_without_a_sign():
    below = 0
    for high in np.random.default_rng(0).random(200).astype(np.float32):
        absmax = np.array([0, high], np.float32)
        parts = quantize_absmax(absmax)
        below += np.float32(-127) * parts["absmax_scale"][0] + parts["absmax_offset"][0] < 0
        assert (block_absmax(parts) >= 0).all()
    assert below > 0


def test_range_of_absmax_does_not_overflow():
    absmax = np.array([3.4e38, 3.0e38], np.float32)
    parts = quantize_absmax(absmax)
    assert all(np.isfinite(array).all() for array in parts.values())
    np.testing.assert_allclose(block_absmax(parts), absmax, rtol=1e-6)


def test_an_empty_weight_has_empty_parts():
    for fmt in NF4_FORMATS:
        parts = fmt.quantize(np.empty((0, 16), np.float32))
        sizes = dict.fromkeys(fmt.part_specs((0, 16)), 0)
        assert {part: array.size for part, array in parts.items()} == {
            **sizes,
            **({"nested_offset": 1} if fmt.double_quant == "dynamic" else {}),
        }


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_with_its_first_index(value):
    weight = np.zeros((3, 64), np.float32)
    weight[1, 5], weight[2, 0] = value, np.nan
    with pytest.raises(NonFiniteWeightError, match=r"\[1, 5\]"):
        PLAIN.quantize(weight)


@pytest.mark.parametrize("arguments", [{"block_size": 32}, {"block_size": 65}, {"double_quant": True}])
def test_other_parameters_are_refused(arguments):
    with pytest.raises(UsageError, match=f"nf4: `{next(iter(arguments))}` is"):
        NF4(**arguments)
