"""FP8: scales of each kind, the cast against torch's, and edge tiles."""

import ml_dtypes
import numpy as np
import pytest
import torch
from formats.cases import FP8_FORMATS, SHAPES, name_of, weights
from hypothesis import given, settings

from surogate_formats.errors import NonFiniteWeightError, UsageError
from surogate_formats.fp8 import FP8

F32 = np.float32
TINY = np.finfo(F32).tiny


def loop_scale(values, dtype):
    amax = np.abs(values).max()
    scale = max(amax / F32(448), TINY) if amax else F32(1)
    if dtype == "float32":
        return scale
    rounded = F32(scale.astype(ml_dtypes.bfloat16))
    return rounded if rounded >= scale else np.nextafter(rounded.astype(ml_dtypes.bfloat16), ml_dtypes.bfloat16(np.inf))


def tiles(fmt, shape):
    height, width = {"tensor": shape, "channel": (1, shape[1]), "block": (128, 128)}[fmt.scaling]
    for i, top in enumerate(range(0, shape[0], height)):
        for j, left in enumerate(range(0, shape[1], width)):
            yield (i,) if fmt.scaling == "tensor" else (i, j), (slice(top, top + height), slice(left, left + width))


@pytest.mark.parametrize("fmt", FP8_FORMATS, ids=name_of)
@settings(max_examples=20, deadline=None)
@given(weight=weights())
def test_against_torch_tile_by_tile(fmt, weight):
    x = weight.f32
    parts = fmt.quantize(x)
    with np.errstate(over="ignore"):
        back = fmt.dequantize(parts, x.shape)
    codes = parts["codes"].view(np.uint8)
    for where, place in tiles(fmt, x.shape):
        scale = F32(loop_scale(x[place], fmt.scale_dtype))
        assert F32(parts["scale"][where]) == scale
        scaled = torch.from_numpy(x[place] / scale).clamp(-448, 448)
        expected = scaled.to(torch.float8_e4m3fn)
        np.testing.assert_array_equal(codes[place], expected.view(torch.uint8).numpy())
        np.testing.assert_array_equal(back[place], (expected.float() * float(scale)).numpy())


@pytest.mark.parametrize("fmt", FP8_FORMATS, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes(fmt, shape):
    parts = fmt.quantize(np.random.default_rng(0).standard_normal(shape).astype(F32))
    count = sum(1 for _ in tiles(fmt, shape))
    expected = {"codes": shape[0] * shape[1], "scale": count * (4 if fmt.scale_dtype == "float32" else 2)}
    assert {part: array.nbytes for part, array in parts.items()} == expected
    assert {part: spec.nbytes for part, spec in fmt.part_specs(shape).items()} == expected
    assert {part: array.shape for part, array in parts.items()} == {
        part: spec.shape for part, spec in fmt.part_specs(shape).items()
    }


def test_shapes_of_scales():
    scale = {scaling: FP8(scaling).part_specs((129, 300))["scale"].shape for scaling in ("tensor", "channel", "block")}
    assert scale == {"tensor": (1,), "channel": (129, 1), "block": (2, 3)}


@pytest.mark.parametrize("fmt", FP8_FORMATS, ids=name_of)
def test_zero_has_scale_1_and_keeps_its_sign(fmt):
    parts = fmt.quantize(np.array([[0.0, -0.0, 0.0]], F32))
    assert parts["scale"].astype(F32).tolist() in ([1], [[1]])
    assert parts["codes"].view(np.uint8).tolist() == [[0x00, 0x80, 0x00]]


def test_the_largest_value_is_448():
    parts = FP8().quantize(np.array([[-896, 448, 1]], F32))
    assert parts["scale"].tolist() == [2]
    assert parts["codes"].astype(F32).tolist() == [[-448, 224, 0.5]]


@pytest.mark.parametrize("fmt", FP8_FORMATS, ids=name_of)
def test_a_scale_is_at_least_the_smallest_normal(fmt):
    parts = fmt.quantize(np.array([[TINY, -TINY / 2, TINY / 4]], F32))
    assert set(parts["scale"].astype(F32).reshape(-1).tolist()) == {float(TINY)}
    assert parts["codes"].astype(F32).tolist() == [[1, -0.5, 0.25]]


def test_a_bfloat16_scale_is_rounded_up_before_the_codes_are_chosen():
    weight = np.array([[448 * 1.001, 1.0]], F32)
    (scale,) = FP8(scale_dtype="bfloat16").quantize(weight)["scale"].astype(F32)
    assert scale == 1 + 2**-7
    parts = FP8(scale_dtype="bfloat16").quantize(weight)
    assert parts["codes"].astype(F32).tolist() == [[448, 1.0]]
    assert FP8(scale_dtype="bfloat16").dequantize(parts, (1, 2)).tolist() == [[448 * 1.0078125, 1.0078125]]


@pytest.mark.parametrize("fmt", FP8_FORMATS, ids=name_of)
def test_group_amax_counts_for_tensor_scaling_alone(fmt):
    weight = np.random.default_rng(0).standard_normal((5, 32)).astype(F32)
    alone, grouped = fmt.quantize(weight), fmt.quantize(weight, F32(64))
    assert fmt.shares_amax == (fmt.scaling == "tensor")
    assert (alone["scale"].tobytes() == grouped["scale"].tobytes()) == (not fmt.shares_amax)
    if fmt.shares_amax and fmt.scale_dtype == "float32":
        assert grouped["scale"].tolist() == [float(F32(64) / F32(448))]


def test_what_is_not_finite_is_refused_with_its_first_index():
    weight = np.zeros((3, 32), F32)
    weight[0, 31] = np.nan
    with pytest.raises(NonFiniteWeightError, match=r"\[0, 31\] is nan"):
        FP8().quantize(weight)


@pytest.mark.parametrize("arguments", [{"scaling": "row"}, {"scale_dtype": "float16"}])
def test_other_parameters_are_refused(arguments):
    with pytest.raises(UsageError, match=f"fp8: `{next(iter(arguments))}` is"):
        FP8(**arguments)
